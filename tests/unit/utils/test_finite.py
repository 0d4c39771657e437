"""Numbers that are not finite: a NaN anywhere in the networks ends as an error, never as pixels."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from varestorer.evaluation.evaluator import Evaluator
from varestorer.evaluation.protocols import load_protocol
from varestorer.evaluation.sources import Candidate
from varestorer.systems.base import RestoredBatch
from varestorer.systems.folder import Restored, restore_files
from varestorer.systems.official import restore_official
from varestorer.systems.plan import plan_restoration
from varestorer.systems.varestorer import VARestorer
from varestorer.training.scores import ImageScores
from varestorer.utils.errors import UserError
from varestorer.utils.files import write_json
from varestorer.utils.finite import check_weights, is_finite, spread_nan
from varestorer.utils.images import from_network, save_image
from varestorer.weights.files import read_tensors
from varestorer.weights.restorers import load_restorer
from varestorer.weights.runs import load_ema, load_run_weights, sealed_folder, write_tensors

NAN, INF = float("nan"), float("inf")


def photo(height: int = 12, width: int = 20) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_nan_and_infinity_are_seen_in_every_type(dtype: torch.dtype) -> None:
    for bad in (NAN, INF, -INF):
        assert not is_finite(torch.tensor([0.0, bad, 1.0]).to(dtype))
    assert is_finite(torch.tensor([-2.0, 0.0, 1.0]).to(dtype))


def test_whole_numbers_and_nothing_are_finite() -> None:
    assert is_finite(torch.tensor([1, 2])) and is_finite(torch.zeros(0, 3)) and is_finite(torch.tensor([True]))


def test_nan_spreads_to_its_own_sample_only() -> None:
    source = torch.zeros(3, 4, 2)
    source[1, 2, 0] = INF
    spread = spread_nan(torch.ones(3, 5, 2, 2), torch.ones(3, 1), source)
    assert spread.isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert torch.equal(spread[[0, 2]], torch.ones(2, 5, 2, 2))


def test_infinity_is_no_white_pixel() -> None:
    assert from_network(torch.tensor([INF, -INF, NAN])).isnan().all()
    assert from_network(torch.tensor([-3.0, 0.0, 3.0])).tolist() == [0, 0.5, 1]


# where in the networks, and with which options it matters there
PLACES = {
    "decoder": ("tokenizer.decoder.conv_in.weight", {}),
    "encoder": ("tokenizer.encoder.conv_out.bias", {}),
    "head": ("transformer.head.bias", {}),
    "blocks": ("transformer.blocks.0", {}),
    "head-uncertainty": ("transformer.head.bias", {"uncertainty": True}),
    "head-sample": ("transformer.head.bias", {"select": "sample"}),
    "head-color": ("transformer.head.bias", {"color": "adain"}),
    "head-steps": ("transformer.head.bias", {"steps": 2}),
    "head-multi": ("transformer.head.bias", {"steps": "multi"}),
    "encoder-multi": ("tokenizer.encoder.conv_out.bias", {"steps": "multi"}),
}


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("place", PLACES)
def test_a_result_that_is_not_finite_is_an_error(tiny_system: VARestorer, place: str, bad: float) -> None:
    name, options = PLACES[place]
    tensor = next(value for key, value in tiny_system.named_parameters() if key.startswith(name))
    assert tiny_system.restore(photo(), 2, **options).image.isfinite().all()
    with torch.no_grad():
        tensor[(0,) * tensor.ndim] = bad
    with pytest.raises(UserError, match=r"^the result is not finite \(NaN or infinite numbers\)"):
        tiny_system.restore(photo(), 2, **options)


def test_reconstruction_and_the_released_arithmetic_stop_too(tiny_system: VARestorer) -> None:
    with torch.no_grad():
        tiny_system.tokenizer.encoder.conv_out.bias[0] = NAN
    for restore in (lambda: tiny_system.reconstruct(photo()), lambda: restore_official(tiny_system, photo(), 2)):
        with pytest.raises(UserError, match="the result is not finite"):
            restore()


def test_bf16_stops_too(tiny_system: VARestorer) -> None:
    tiny_system.set_precision("bf16")
    with torch.no_grad():
        tiny_system.transformer.head.bias[0] = NAN
    with pytest.raises(UserError, match="the result is not finite"):
        tiny_system.restore(photo(), 2)


@pytest.mark.parametrize("part", ["image", "uncertainty"])
def test_one_bad_square_of_many_is_enough(tiny_system: VARestorer, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    good = tiny_system.restore_batch
    calls = []

    def second_is_bad(*args: object) -> RestoredBatch:
        restored = good(*args)
        calls.append(len(restored.images_B3HW))
        if len(calls) == 2 and part == "image":
            restored.images_B3HW[0, 0, 0, 0] = NAN
        elif len(calls) == 2:
            restored.logits[0, 0, 0, 0] = NAN
        return restored

    monkeypatch.setattr(tiny_system, "restore_batch", second_is_bad)
    with pytest.raises(UserError, match="the result is not finite"):
        tiny_system.restore(photo(40, 40), 2, batch=1, uncertainty=True)
    assert len(calls) > 2


def test_the_picture_is_named_the_others_go_on_and_nothing_is_written(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        save_image(tmp_path / "in" / name, photo())

    def restore(image_3HW: Tensor, job: object, seed: int) -> Restored:
        image = image_3HW.clone()
        if job.name == "b.png":
            image[0, 0, 0] = INF
        return Restored(image, torch.full(image.shape[1:], NAN) if job.name == "c.png" else None)

    report = restore_files(plan_restoration(tmp_path / "in", tmp_path / "out"), restore)
    assert list(report.failed) == ["b.png", "c.png"] and report.num_restored == 1
    assert all("not finite" in reason for reason in report.failed.values())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.png", "restore.json"}


def test_a_picture_to_be_scored_fails_and_the_others_go_on(tmp_path: Path) -> None:
    pairs = [(name, tmp_path / f"{name}.png", tmp_path / f"{name}.png") for name in ("a", "b")]
    for _, lq, _ in pairs:
        save_image(lq, photo(40, 40))

    def source(name: str, lq: Path) -> Candidate:
        return Candidate(photo(40, 40) * (INF if name == "a" else 1))

    evaluator = Evaluator(load_protocol("varestorer"), ["psnr"])
    bad, good = evaluator.evaluate(pairs, source).rows
    assert bad.scores == {} and re.search(r"the result for .*a\.png is not finite", bad.errors[0])
    assert good.errors == () and good.scores["psnr"] > 40
    with pytest.raises(UserError, match="an image to be scored is not finite"):
        evaluator.score(photo() * NAN, photo())


def test_scores_while_training_are_nan_not_those_of_black() -> None:
    black = torch.zeros(1, 3, 16, 16)
    assert next(iter(ImageScores(["psnr"])({"": (black * NAN, black)}).values())).isnan()
    assert next(iter(ImageScores(["psnr"])({"": (black, black)}).values())) > 40


def in_bundle(system: VARestorer, folder: Path, file: str) -> tuple[Path, str]:
    system.save_pretrained(folder)
    return folder / f"{file}.safetensors", str(folder)


FILES = ["tokenizer", "transformer", "adapters"]


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("file", FILES)
def test_a_bundle_with_a_nan_is_refused_by_name(
    tiny_system: VARestorer, tmp_path: Path, file: str, merge: bool
) -> None:
    path, bundle = in_bundle(tiny_system, tmp_path / "bundle", file)
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[-1] = NAN
    save_file(tensors, path)
    with pytest.raises(UserError, match=rf"{file}\.safetensors: the tensor {re.escape(name)} holds NaN or infinite"):
        VARestorer.from_pretrained(bundle, merge=merge)


def published(tensors: dict[str, Tensor], path: Path) -> None:
    torch.save(tensors, path)


def plain(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path)


@pytest.mark.parametrize(("write", "name"), [(published, "a.pth"), (plain, "a.safetensors")])
def test_a_published_file_with_infinity_is_refused_by_name(
    tmp_path: Path, write: Callable[[dict[str, Tensor], Path], None], name: str
) -> None:
    tensors = {"a.weight": torch.ones(3), "b.weight": torch.tensor([1.0, -INF]), "c.bias": torch.tensor([NAN])}
    write(tensors, tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: the tensor b\.weight and 1 more holds NaN or infinite numbers"):
        read_tensors(tmp_path / name)
    with pytest.raises(UserError, match=r"b\.weight"):
        load_restorer(tmp_path / name)


def test_a_run_with_a_nan_is_refused_by_name(tmp_path: Path) -> None:
    with sealed_folder(tmp_path / "checkpoints" / "toy" / "step_000001") as folder:
        write_tensors(folder / "ema.safetensors", {"transformer.start": torch.tensor([NAN, 1.0])})
        write_json(folder / "state.json", {"stage_index": 0})
    for load in (load_ema, load_run_weights):
        with pytest.raises(UserError, match=r"ema\.safetensors: the tensor transformer\.start holds NaN"):
            load(tmp_path)


def test_tensors_without_values_pass() -> None:
    check_weights({"a": torch.empty(3, device="meta"), "b": torch.tensor([1, 2])}, "a file")
