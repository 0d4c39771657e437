"""Bundles: what is saved is what is loaded, in the same bytes, within little more memory than the weights take."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from varestorer.systems.varestorer import VARestorer
from varestorer.transformer.adapters import plain_state_dict
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.seeds import torch_generator
from varestorer.weights.bundle import save_bundle

PHOTO = torch.rand(3, 20, 27, generator=torch_generator(0, "photo"))


def weights_of(system: VARestorer) -> dict[str, torch.Tensor]:
    return plain_state_dict(system)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_saved_system_comes_back_bit_for_bit(tiny_system: VARestorer, tmp_path: Path) -> None:
    tiny_system.save_pretrained(tmp_path / "bundle")
    loaded = VARestorer.from_pretrained(tmp_path / "bundle")
    wanted = weights_of(tiny_system)
    assert weights_of(loaded).keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights_of(loaded).items())
    assert not loaded.training
    assert torch.equal(loaded.restore(PHOTO, 2).image, tiny_system.restore(PHOTO, 2).image)


def test_saving_twice_gives_the_same_bytes(tiny_system: VARestorer, tmp_path: Path) -> None:
    tiny_system.save_pretrained(tmp_path / "one")
    VARestorer.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_merged_bundle_restores_alike_without_adapters_and_without_a_teacher(
    tiny_system: VARestorer, tmp_path: Path
) -> None:
    squares = torch.rand(2, 3, 32, 32, generator=torch_generator(0, "squares"))
    unmerged = tiny_system.restore_batch(squares).logits
    tiny_system.save_pretrained(tmp_path / "bundle")  # a folder that held another form before
    tiny_system.merge_adapters().save_pretrained(tmp_path / "bundle")
    assert {path.stem for path in (tmp_path / "bundle").glob("*.safetensors")} == {"tokenizer", "transformer"}
    merged = VARestorer.from_pretrained(tmp_path / "bundle")
    logits = merged.restore_batch(squares).logits
    assert unmerged is not None
    assert logits is not None
    assert torch.allclose(logits, unmerged, atol=1e-5)
    assert not torch.equal(logits, unmerged)
    with pytest.raises(UserError, match="steps=multi needs the teacher"):
        merged.restore_batch(squares, steps="multi")


@pytest.mark.parametrize("student", [{"lora_rank": 4}, {"lora_rank": 4, "lora_targets": ["ffn"]}])
def test_merging_while_loading_gives_the_weights_of_merging_afterwards(
    student: dict[str, object], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"schedule": {"sides": [1, 2]}, "student": student}
    tokenizer = {
        "channels": 32,
        "multipliers": [1],
        "latent_width": 8,
        "num_encoder_blocks": 1,
        "num_decoder_blocks": 1,
    }
    transformer = {"width": 16, "depth": 2, "num_heads": 1, "latent_width": 8, "text_width": 8, "text_length": 2}
    system = VARestorer(tokenizer=tokenizer, transformer=transformer, **sizes)
    with torch.no_grad():
        for name, parameter in system.transformer.named_parameters():
            if ".lora_B" in name or name.endswith("v_bias"):
                parameter.normal_()
    system.save_pretrained(tmp_path)
    at_once = VARestorer.from_pretrained(tmp_path, merge=True)
    afterwards = VARestorer.from_pretrained(tmp_path).merge_adapters()
    assert at_once.config == afterwards.config
    for name, tensor in afterwards.state_dict().items():
        assert torch.equal(at_once.state_dict()[name], tensor), name


def test_half_precision_is_for_storing_only(tiny_system: VARestorer, tmp_path: Path) -> None:
    save_bundle(tiny_system, tmp_path, half=True)
    assert {tensor.dtype for tensor in load_file(tmp_path / "transformer.safetensors").values()} == {torch.float16}
    again = VARestorer.from_pretrained(tmp_path)
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tiny_system.state_dict()[name].half().float()), name


def test_weights_beyond_half_precision_are_refused(tiny_system: VARestorer, tmp_path: Path) -> None:
    with torch.no_grad():
        tiny_system.transformer.head.bias[0] = 1e6
    with pytest.raises(UserError, match=r"transformer\.safetensors .* head\.bias .* fp32 or bf16"):
        save_bundle(tiny_system, tmp_path, half=True)
    assert not (tmp_path / "config.json").exists()


def test_bf16_keeps_only_the_blocks_small(tiny_system: VARestorer, tmp_path: Path) -> None:
    squares = torch.rand(2, 3, 32, 32, generator=torch_generator(0, "squares"))
    exact = tiny_system.restore_batch(squares).logits
    tiny_system.set_precision("bf16").save_pretrained(tmp_path / "bundle")
    loaded = VARestorer.from_pretrained(tmp_path / "bundle")
    dtypes = {name: tensor.dtype for name, tensor in weights_of(loaded).items()}
    small = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert small == {name for name in dtypes if name.startswith("transformer.blocks.")}
    rounded = loaded.restore_batch(squares).logits
    assert exact is not None
    assert rounded is not None
    assert rounded.dtype == torch.float32
    error = (rounded - exact).abs().max()
    assert 0 < error < 0.1 * exact.abs().max()


def test_a_bundle_gives_its_parts_to_other_models(tiny_system: VARestorer, tmp_path: Path, caplog) -> None:
    tiny_system.save_pretrained(tmp_path / "bundle")
    places = {"tokenizer": str(tmp_path / "bundle"), "transformer": str(tmp_path / "bundle")}
    config = tiny_system.config
    same = VARestorer(**config, weights=places)
    assert torch.equal(same.restore(PHOTO, 2).image, tiny_system.restore(PHOTO, 2).image)
    other = VARestorer(**(config | {"student": {"lora_rank": 2}}), weights=places)
    assert "are left out; its teacher is taken" in caplog.text
    up = [tensor for name, tensor in weights_of(other).items() if name.endswith("lora_up.weight")]
    assert up
    assert all(tensor.eq(0).all() for tensor in up)


def test_adapters_say_what_they_belong_to(tiny_system: VARestorer, tmp_path: Path) -> None:
    tiny_system.save_pretrained(tmp_path / "bundle")
    with safe_open(tmp_path / "bundle" / "adapters.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["student"])["lora_rank"] == 4
        assert all(".lora_" in name for name in file.keys())  # noqa: SIM118  # not a dictionary


def test_half_a_bundle_is_none(tiny_system: VARestorer, tmp_path: Path) -> None:
    tiny_system.save_pretrained(tmp_path / "bundle")
    (tmp_path / "bundle" / "config.json").unlink()
    with pytest.raises(UserError, match="holds no model; give a run"):
        VARestorer.from_pretrained(tmp_path / "bundle")


@pytest.mark.parametrize(("content", "words"), [("{", "no bundle's config"), ('{"format": 9}', "bundle format 9")])
def test_a_config_that_cannot_be_used_is_named(
    tiny_system: VARestorer, tmp_path: Path, content: str, words: str
) -> None:
    tiny_system.save_pretrained(tmp_path / "bundle")
    (tmp_path / "bundle" / "config.json").write_text(content)
    with pytest.raises(UserError, match=rf"config\.json.*{words}"):
        VARestorer.from_pretrained(tmp_path / "bundle")


@pytest.mark.parametrize("part", ["schedule", "tokenizer", "transformer", "student"])
def test_a_config_with_entries_of_a_later_version_is_refused(
    tiny_system: VARestorer, tmp_path: Path, part: str
) -> None:
    tiny_system.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[part]["novelty"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    wanted = rf"config\.json has entries this version does not know \({part}\.novelty\); update varestorer"
    with pytest.raises(UserError, match=wanted):
        VARestorer.from_pretrained(tmp_path)


def test_one_file_of_a_model_is_refused_with_what_to_give(tiny_system: VARestorer, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    tiny_system.save_pretrained(folder)
    for part in ("transformer", "tokenizer", "adapters"):
        with pytest.raises(UsageError, match=rf"one file of a model; give the folder {re.escape(str(folder))}$"):
            VARestorer.from_pretrained(folder / f"{part}.safetensors")
    (folder / "adapters.safetensors").rename(tmp_path / "student.safetensors")
    with pytest.raises(UsageError, match=r"holds adapters alone; .*scripts/convert\.py input=.* base=MODEL"):
        VARestorer.from_pretrained(tmp_path / "student.safetensors")


def test_a_bundle_with_a_tensor_missing_is_refused(tiny_system: VARestorer, tmp_path: Path) -> None:
    tiny_system.save_pretrained(tmp_path / "bundle")
    path = tmp_path / "bundle" / "transformer.safetensors"
    tensors = load_file(path)
    del tensors["head.bias"]
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"transformer\.safetensors does not fit the model; 1 missing: head\.bias"):
        VARestorer.from_pretrained(tmp_path / "bundle")


def test_a_bundle_that_has_lost_a_file_is_refused(tiny_system: VARestorer, tmp_path: Path) -> None:
    tiny_system.save_pretrained(tmp_path / "bundle")
    (tmp_path / "bundle" / "adapters.safetensors").rename(tmp_path / "adapters.safetensors")
    with pytest.raises(UserError, match=r"not found: .*adapters\.safetensors"):
        VARestorer.from_pretrained(tmp_path / "bundle")
    (tmp_path / "adapters.safetensors").rename(tmp_path / "bundle" / "adapters.safetensors")
    path = tmp_path / "bundle" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"restorer": True}))
    with pytest.raises(UserError, match=r"has lost its restorer\.safetensors"):
        VARestorer.from_pretrained(tmp_path / "bundle")


def test_half_the_adapters_are_refused(tiny_system: VARestorer, tmp_path: Path) -> None:
    tiny_system.save_pretrained(tmp_path / "bundle")
    path = tmp_path / "bundle" / "adapters.safetensors"
    tensors = load_file(path)
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, path)
    with pytest.raises(UserError, match=rf"adapters\.safetensors does not fit the model; 1 missing: {re.escape(lost)}"):
        VARestorer.from_pretrained(tmp_path / "bundle")


@pytest.mark.parametrize("name", ["nowhere.pth", "a/b/c", "/no/such/place"])
def test_a_missing_path_is_named(name: str) -> None:
    with pytest.raises(UsageError, match=f"{re.escape(name)} does not exist; give a run"):
        VARestorer.from_pretrained(name)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the hub does not give someone/none, which is no path here either") as caught:
        VARestorer.from_pretrained("someone/none", local_files_only=True, cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


WRITE_2B = """
import sys, torch
from varestorer import VARestorer
from varestorer.transformer.adapters import assign_plain, plain_state_dict
torch.set_num_threads(2)
with torch.device("meta"):
    system = VARestorer({"size": "0.25M"}, {}, {}, {})
system.set_precision("bf16")
for part in (system.tokenizer, system.transformer):
    wanted = plain_state_dict(part)
    assign_plain(part, {n: torch.empty(t.shape, dtype=t.dtype).uniform_(-0.02, 0.02) for n, t in wanted.items()})
system.save_pretrained(sys.argv[1])
"""

LOAD_2B = """
import resource, sys, time, torch
from varestorer import VARestorer
import transformers, peft
torch.zeros(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start = peak(), time.perf_counter()
system = VARestorer.from_pretrained(sys.argv[1])
loaded = time.perf_counter() - start
size = sum(t.numel() * t.element_size() for t in system.state_dict().values())
total = sum(float(t.sum()) for t in system.state_dict().values())  # reads every page
print(size, peak() - before, loaded, time.perf_counter() - start)
"""


@pytest.mark.slow
def test_the_full_size_bundle_loads_within_a_quarter_more_than_its_weights(tmp_path: Path) -> None:
    for script in (WRITE_2B, LOAD_2B):
        command = [sys.executable, "-c", script, str(tmp_path / "2b")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    size, peak, loaded, touched = map(float, done.stdout.split())
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "2b").iterdir()}
    print(  # noqa: T201  # asked for with `pytest -m slow -s`
        f"\nweights {size / 1e9:.2f} GB, peak over the start {peak / 1e9:.2f} GB = {peak / size:.3f} of them; loaded "
        f"after {loaded:.1f} s, every page read after {touched:.1f} s; files {sizes}"
    )
    assert size > 4.4e9
    assert peak < 1.25 * size
