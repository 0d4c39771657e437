"""Each means of restoring faster against plain float32 code with its adapters apart."""

import copy
import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from varestorer.conditioning.restorer import Restorer
from varestorer.systems.acceleration import Acceleration, fill, key_of, map_tensors, tensors_of
from varestorer.systems.base import RestoredBatch
from varestorer.systems.varestorer import VARestorer
from varestorer.transformer.heads import keyed_noise
from varestorer.utils import device as device_module
from varestorer.utils.device import gains_from_bf16, limit_threads, processor_flags, usable_cores
from varestorer.utils.errors import UsageError, UserError

CPU = torch.device("cpu")


def squares(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def fast(system: VARestorer, name: str) -> VARestorer:
    """A copy of a system, accelerated as a variant's name says."""
    return copy.deepcopy(system).accelerate(Acceleration.parse(name))


def share_of_equal_bits(one: RestoredBatch, other: RestoredBatch) -> float:
    pairs = zip(one.indices, other.indices, strict=True)
    return torch.cat([(a == b).flatten() for a, b in pairs]).float().mean().item()


def assert_near(fast: RestoredBatch, plain: RestoredBatch, error: float, share: float) -> None:
    """Logits within `error` of their standard deviation, and at least `share` of the bits alike."""
    assert fast.logits is not None and plain.logits is not None
    assert (fast.logits - plain.logits).abs().max() <= error * plain.logits.std()
    assert share_of_equal_bits(fast, plain) >= share
    assert fast.images_B3HW.dtype == torch.float32


def test_variants_are_named_by_their_means() -> None:
    assert Acceleration.parse("eager") == Acceleration(merge=False, precision="fp32")
    assert Acceleration.parse("bf16") == Acceleration.parse("merged+bf16") == Acceleration(precision="bf16")
    wanted = Acceleration(precision="bf16", compile=True, graphs=True, linears="fp8")
    assert Acceleration.parse("fp8+graphs+compile+bf16") == wanted
    for wrong in ("fast", "eager+bf16", ""):
        with pytest.raises(UsageError, match="a variant is eager, or some of merged"):
            Acceleration.parse(wrong)
    with pytest.raises(UsageError, match="linears must be one of none, int8, fp8, got linears=int4"):
        Acceleration(linears="int4")


def test_merged_adapters_give_the_same_logits(tiny_system: VARestorer) -> None:
    plain = tiny_system.restore_batch(squares())
    merged = fast(tiny_system, "merged")
    assert merged.student_config.merged and not tiny_system.student_config.merged
    assert_near(merged.restore_batch(squares()), plain, error=1e-4, share=0.999)


def test_float32_is_what_it_was_without_acceleration(tiny_system: VARestorer) -> None:
    photo = torch.rand(3, 20, 33, generator=torch.Generator().manual_seed(1))
    prompt = torch.rand(2, 16, generator=torch.Generator().manual_seed(3))
    merged = copy.deepcopy(tiny_system).merge_adapters()
    same = fast(tiny_system, "merged+fp32")
    for options in ({}, {"select": "sample"}, {"prompt": prompt}, {}, {"prompt": prompt.clone() + 1}):
        assert torch.equal(same.restore(photo, 4, **options).image, merged.restore(photo, 4, **options).image)


def test_bfloat16_keeps_nearly_all_bits(tiny_system: VARestorer) -> None:
    plain = tiny_system.restore_batch(squares(8))
    lowered = fast(tiny_system, "bf16")
    assert_near(lowered.restore_batch(squares(8)), plain, error=0.05, share=0.98)
    assert next(lowered.transformer.blocks.parameters()).dtype == torch.bfloat16


def test_bfloat16_leaves_the_tokens_of_the_input_alone(tiny_system: VARestorer) -> None:
    lowered = fast(tiny_system, "bf16")
    before, after = tiny_system.condition(squares()), lowered.condition(squares())
    assert torch.equal(before.tokens_BLZ, after.tokens_BLZ)


def test_the_decoder_in_bfloat16_is_off_by_less_than_a_level_of_eight_bits(tiny_system: VARestorer) -> None:
    codes = tiny_system.encode(squares(8)).codes
    images, lowered = tiny_system.decode(codes), fast(tiny_system, "bf16").decode(codes)
    assert 0 < (images - lowered).abs().mean() < 0.5 / 255
    assert (images - lowered).abs().max() < 4 / 255
    assert len(lowered.unique()) > 10_000  # pixels are not rounded to bfloat16, which has a few hundred values here


def test_the_restorer_in_bfloat16_returns_float32() -> None:
    restorer = Restorer(torch.nn.Conv2d(3, 3, 3, padding=1), multiple=8)
    plain = restorer(squares())
    restorer.use_bf16 = True
    lowered = restorer(squares())
    assert lowered.dtype == torch.float32
    assert 0 < (lowered - plain).abs().max() < 0.02


def test_masks_of_shifted_windows_are_made_once_for_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from spandrel.architectures.SwinIR import SwinIR

    network = SwinIR(
        img_size=16, embed_dim=12, depths=[2, 2], num_heads=[2, 2], window_size=4, upscale=1, upsampler=""
    ).eval()
    kind, made = type(network.layers[0].residual_group.blocks[0]), []
    calculate = kind.calculate_mask
    monkeypatch.setattr(kind, "calculate_mask", lambda block, size: made.append(size) or calculate(block, size))
    image = squares(1)
    with torch.no_grad():
        plain = network(image)
        assert len(made) > 2
        made.clear()
        restorer = Restorer(network)
        assert torch.equal(restorer(image), plain) and torch.equal(restorer(image), plain)
    assert len(made) == 2  # of shifted and of other windows


def test_text_is_prepared_once_for_all_tiles_and_images(
    tiny_system: VARestorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = fast(tiny_system, "merged")
    prepared: list[int] = []
    prepare = system.transformer.prepare
    monkeypatch.setattr(system.transformer, "prepare", lambda text: prepared.append(len(text.lengths)) or prepare(text))
    photo = torch.rand(3, 30, 30, generator=torch.Generator().manual_seed(1))
    prompt = torch.rand(2, 16, generator=torch.Generator().manual_seed(3))
    for features in (None, None, prompt, prompt):
        system.restore(photo, 4, prompt=features, batch=2)
    assert prepared == [1, 1]
    assert system.restore_batch(squares()).images_B3HW.shape == (3, 3, 32, 32)
    assert prepared == [1, 1]


def test_weights_that_change_between_images_are_seen(tiny_system: VARestorer) -> None:
    photo = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1))
    before = tiny_system.restore(photo, 4).image
    with torch.no_grad():
        tiny_system.transformer.condition.null_features.add_(3.0)
    assert not torch.equal(tiny_system.restore(photo, 4).image, before)


def test_precision_is_chosen_by_what_the_processor_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, gains in (("amx_tile avx512_bf16 amx_bf16", True), ("avx512f avx512_bf16", True), ("avx512f", False)):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: none\n")
        monkeypatch.setattr(device_module, "CPUINFO", tmp_path / "cpuinfo")
        processor_flags.cache_clear()
        assert gains_from_bf16(CPU) is gains
        assert Acceleration().on(CPU).precision == ("bf16" if gains else "fp32")
        assert Acceleration(precision="fp32").on(CPU).precision == "fp32"
    monkeypatch.setattr(device_module, "CPUINFO", tmp_path / "none")
    processor_flags.cache_clear()
    assert not gains_from_bf16(CPU)
    assert not gains_from_bf16(torch.device("mps"))
    processor_flags.cache_clear()


def test_torch_takes_no_more_threads_than_a_container_has_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module.os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    monkeypatch.setattr(device_module, "CPU_QUOTA", tmp_path / "cpu.max")
    assert usable_cores() == 16
    for text, cores in (("max 100000", 16), ("250000 100000", 2), ("20000 100000", 1), ("3200000 100000", 16)):
        (tmp_path / "cpu.max").write_text(text)
        assert usable_cores() == cores
    threads = torch.get_num_threads()
    (tmp_path / "cpu.max").write_text("100000 100000")
    try:
        limit_threads()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_what_a_machine_cannot_do_is_refused_and_leaves_the_system_as_it_was(
    tiny_system: VARestorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("varestorer.systems.acceleration.find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for name, message in {
        "graphs": "graphs=true records CUDA graphs, and the device is cpu",
        "compile": r"compile=true needs a C\+\+ compiler",
        "int8": "linears=int8 needs torchao: pip install torchao",
    }.items():
        with pytest.raises(UserError, match=message):
            tiny_system.accelerate(Acceleration.parse(name))
    with pytest.raises(UserError, match="linears=int8 needs merged adapters"):
        tiny_system.accelerate(Acceleration(merge=False, linears="int8"))
    monkeypatch.setattr("varestorer.systems.acceleration.find_spec", lambda name: object())
    with pytest.raises(UserError, match=r"linears=fp8 needs an NVIDIA GPU of compute capability 8\.9"):
        tiny_system.accelerate(Acceleration.parse("fp8"))
    assert tiny_system.acceleration is None and not tiny_system.student_config.merged


def test_an_accelerated_system_stays_as_it_is(tiny_system: VARestorer, tmp_path: Path) -> None:
    system = tiny_system.accelerate(Acceleration.parse("bf16"))
    assert system.accelerate(Acceleration.parse("bf16")) is system
    with pytest.raises(UserError, match="accelerated already"):
        system.accelerate(Acceleration.parse("merged"))
    with pytest.raises(UserError, match="cannot be saved"):
        system.save_pretrained(tmp_path / "bundle")
    assert not (tmp_path / "bundle" / "config.json").exists()


def test_a_system_is_loaded_with_its_means(tiny_system: VARestorer, tmp_path: Path) -> None:
    tiny_system.save_pretrained(tmp_path / "bundle")

    def loaded(**options: object) -> VARestorer:
        return VARestorer.from_pretrained(tmp_path / "bundle", **options)

    assert loaded().acceleration is None and not loaded().student_config.merged
    assert loaded(merge=True).student_config.merged
    system = loaded(precision="bf16")
    assert system.acceleration == Acceleration(merge=False, precision="bf16")
    chosen = Acceleration.parse("merged+fp32")
    assert loaded(acceleration=chosen).acceleration == loaded(merge=True, precision="fp32").acceleration == chosen
    restored = loaded(acceleration=chosen).restore_batch(squares())
    assert torch.equal(restored.images_B3HW, tiny_system.merge_adapters().restore_batch(squares()).images_B3HW)


def test_trees_of_tensors_are_told_apart_by_shapes_and_constants() -> None:
    @dataclasses.dataclass(frozen=True)
    class Leaf:
        values: Tensor
        name: str

    def tree(size: int, name: str, value: float) -> tuple:
        return Leaf(torch.full((size,), value), name), [torch.ones(2), None]

    assert key_of(tree(3, "a", 1.0)) == key_of(tree(3, "a", 2.0))
    assert len({key_of(tree(3, "a", 1.0)), key_of(tree(4, "a", 1.0)), key_of(tree(3, "b", 1.0))}) == 3
    doubled = map_tensors(lambda tensor: tensor * 2, tree(3, "a", 1.5))
    assert [tensor.tolist() for tensor in tensors_of(doubled)] == [[3.0] * 3, [2.0] * 2]
    assert doubled[0].name == "a" and doubled[1][1] is None


def test_only_dataclasses_are_taken_for_unchanged() -> None:
    @dataclasses.dataclass(frozen=True)
    class Leaf:
        values: Tensor

    image, text = torch.zeros(2), Leaf(torch.zeros(2))
    memory = map_tensors(torch.clone, (image, text))
    image += 1
    text.values.add_(1)
    fill(memory, (image, text), (image, text))
    assert memory[0].tolist() == [1, 1] and memory[1].values.tolist() == [0, 0]
    fill(memory, (image, Leaf(text.values)), (image, text))
    assert memory[1].values.tolist() == [1, 1]


@pytest.mark.slow
def test_compiled_networks_give_the_same_logits(tiny_system: VARestorer) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    plain, compiled = tiny_system.restore_batch(squares()), fast(tiny_system, "compile")
    assert_near(compiled.restore_batch(squares()), plain, error=1e-4, share=0.999)
    alone = tiny_system.restore_batch(squares()[:1])
    assert_near(compiled.restore_batch(squares()[:1]), alone, error=1e-4, share=0.999)


def test_linear_layers_in_eight_bits_keep_nearly_all_bits(tiny_system: VARestorer) -> None:
    pytest.importorskip("torchao")
    plain = tiny_system.restore_batch(squares(8))
    assert_near(fast(tiny_system, "int8").restore_batch(squares(8)), plain, error=0.1, share=0.96)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["graphs", "bf16+graphs"])
def test_cuda_graphs_replay_what_eager_code_does(tiny_system: VARestorer, name: str) -> None:
    tiny_system.cuda()
    plain, graphed = fast(tiny_system, name.replace("+graphs", "").replace("graphs", "merged")), fast(tiny_system, name)
    prompt = torch.rand(2, 16, generator=torch.Generator().manual_seed(3))
    for count, text in ((3, None), (1, None), (3, None), (3, prompt), (3, None)):
        batch = squares(count).cuda() * torch.rand(1, device="cuda")
        noise = keyed_noise(1, range(count), "test", "cuda")
        features = [system.text_batch(text, count) for system in (plain, graphed)]
        for uniform in (None, noise):
            wanted = plain.restore_batch(batch, uniform, text=features[0])
            got = graphed.restore_batch(batch, uniform, text=features[1])
            assert_near(got, wanted, error=1e-5, share=1.0)
            assert torch.allclose(got.images_B3HW, wanted.images_B3HW, atol=1e-5)


@pytest.mark.gpu
def test_nothing_waits_for_the_device_between_the_image_and_the_result(tiny_system: VARestorer) -> None:
    system = fast(tiny_system.cuda(), "merged")
    batch, text = squares().cuda(), system.transformer.prepare(system.null_text(1))
    with torch.inference_mode():
        system.predict_squares(text, batch, None)
        torch.cuda.set_sync_debug_mode("error")
        try:
            system.predict_squares(text, batch, None)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_images_come_back_to_where_they_were(tiny_system: VARestorer) -> None:
    photo = torch.rand(3, 20, 33, generator=torch.Generator().manual_seed(1))
    wanted = tiny_system.restore(photo, 4).image
    got = tiny_system.cuda().restore(photo, 4).image
    assert got.device == CPU and got.shape == wanted.shape
    assert tiny_system.restore(photo.cuda(), 4).image.is_cuda
