"""VAR's and VARSR's networks against golden tensors of the published ones."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from varestorer.commands.parity import COMMAND
from varestorer.parity import compare, varsr
from varestorer.parity.golden import Check, GoldenVARSR, Group
from varestorer.systems import official_varsr
from varestorer.systems.varsr import VARSR
from varestorer.systems.varsr_files import class_to_restoration
from varestorer.tokenizer import quantizer
from varestorer.tokenizer.quantizer import RESIZES, MultiScaleQuantizer, phi_index
from varestorer.training.tasks.varsr import VARSRTask
from varestorer.transformer import blocks, layout
from varestorer.transformer.refiner import DATA_SCALE, Refiner
from varestorer.weights.published.varsr import published_varsr_name

pytestmark = pytest.mark.parity
INPUTS = re.compile(
    r"image|lr|hr_u8|lr_u8|label|infer_label|gt_idx|rows|filter_in|filter/in|last_layer_gt|infer_is_safe|(source|target)|"
    r"ref_(x|t|z|noise|target)|train_(t|noise)(_\d+)?|droppath/keep|refiner/z|(.*_)?(init|step)_noise(_half)?|"
    r"refsample_init_half|refiner/.*/(init|steps)|color_\d/(source|target)_u8|resize_\d/in_u8"
)


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    folder = shared / "fixtures" / "varsr"
    if not folder.is_dir():
        pytest.skip(f"no golden tensors in {folder}")
    return folder


def one_group(golden: Path, stem: str) -> Iterator[Check]:
    folder = GoldenVARSR(golden)
    compare_group = varsr.COMPARISONS["isr" if stem.startswith("isr") else stem]
    with torch.no_grad():
        yield from compare_group(Group(folder, stem, folder.io(stem)))


def test_every_golden_output_is_compared_and_agrees(golden: Path) -> None:
    checks = list(compare(golden))
    assert [check for check in checks if not check.ok] == []
    compared = {check.name for check in checks}
    outputs = {
        f"{file.name.removesuffix('.io.safetensors')}/{name}"
        for file in golden.glob("*.io.safetensors")
        for name in load_file(file)
        if not INPUTS.fullmatch(name)
    }
    assert outputs - compared == {"isr12/f"}  # where its picture is not there, the features are an input
    assert len(compared) >= 726


def without_phi_rule(forward: Callable) -> Callable:
    return lambda self, *args, **options: forward(self, *args, **{**options, "raw_last": False})


def detached(condition: Callable) -> Callable:
    def changed(self: VARSR, hidden: torch.Tensor, indices: torch.Tensor) -> tuple:
        z, codes = condition(self, hidden, indices)
        return z.detach(), codes

    return changed


def unguided(sample: Callable) -> Callable:
    return lambda self, z, noise, negative, guidance, *rest: sample(self, z, noise, None, 0.0, *rest)


@pytest.mark.parametrize(
    ("where", "name", "change", "stem", "found"),
    [
        (MultiScaleQuantizer, "forward", without_phi_rule, "varsr_vae", "varsr_vae/f_hat_5"),
        (Refiner, "sample", unguided, "varsr", "varsr/infer_refiner_out"),
    ],
)
def test_a_planted_error_is_found(
    golden: Path, monkeypatch: pytest.MonkeyPatch, where: type, name: str, change: Callable, stem: str, found: str
) -> None:
    monkeypatch.setattr(where, name, change(getattr(where, name)))
    assert found in {check.name for check in one_group(golden, stem) if not check.ok}


def by_halves(_: Callable) -> Callable:
    def rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        one, two = x.chunk(2, dim=-1)
        turned = torch.complex(one, two) * turns
        return torch.cat([turned.real, turned.imag], dim=-1)

    return rotate


def off_center(_: Callable) -> Callable:
    bell = torch.exp(-((torch.arange(32, dtype=torch.float64) - 15.5) / 32).square() / 0.02)
    return lambda: torch.outer(bell, bell)


SLIPS: dict[str, tuple[Any, str, Callable, str]] = {
    "GELU by erf": (F, "gelu", lambda gelu: lambda x, approximate="none": gelu(x), "varsr"),
    "eps of the norms": (F, "layer_norm", lambda norm: lambda *a, eps=1e-5: norm(*a[:4], eps=1e-5), "varsr"),
    "halves instead of pairs rotate": (layout, "rotate_complex", by_halves, "varsr"),
    "scales without a limit": (blocks, "MAX_LOG_SCALE", lambda _: 100.0, "isr10"),
    "bilinear sums": (RESIZES, "bicubic", lambda _: RESIZES["bilinear"], "varsr_vae"),
    "nearest ticks": (quantizer, "phi_index", lambda _: lambda k, count, convs=4: min(k, convs - 1), "varsr_vae"),
    "tiles weighed evenly": (official_varsr, "tile_weights", off_center, "tiles"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_slips_of_a_second_implementation_are_found(golden: Path, monkeypatch: pytest.MonkeyPatch, slip: str) -> None:
    where, name, change, stem = SLIPS[slip]
    if isinstance(where, dict):
        monkeypatch.setitem(where, name, change(where[name]))
    else:
        monkeypatch.setattr(where, name, change(getattr(where, name)))
    assert [check.name for check in one_group(golden, stem) if not check.ok]


def test_planted_errors_of_training_are_found(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VARSR, "refiner_condition", detached(VARSR.refiner_condition))
    assert "train/grad/class_emb.weight" in {check.name for check in one_group(golden, "train") if not check.ok}
    monkeypatch.undo()
    monkeypatch.setattr(VARSRTask, "no_decay", lambda self, name, parameter: parameter.ndim < 2)
    over = {check.name for check in one_group(golden, "train") if not check.ok}
    assert "train/steps/after/lvl_embed.weight" in over


def test_an_error_in_a_weight_is_reported(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["varsr", "vae", "varsr_vae", "var_vae"]
    for name in names:
        for file in golden.glob(f"{name}.*"):
            shutil.copy(file, tmp_path)
    weights = load_file(golden / "varsr.weights.safetensors")
    weights["blocks.0.ffn.fc1.bias"][0] += 0.5
    save_file(weights, tmp_path / "varsr.weights.safetensors")
    assert COMMAND.main([f"fixtures={tmp_path}"]) == 1
    over = [line for line in capsys.readouterr().out.splitlines() if line.startswith("over: ")]
    assert any("varsr/hidden_0 " in line for line in over)
    assert not any("varsr_vae" in line for line in over)


def test_constants_are_the_published_ones(golden: Path) -> None:
    folder = GoldenVARSR(golden)
    for num_scales, wanted in folder.json("misc")["phi_index"].items():
        assert [phi_index(k, int(num_scales)) for k in range(int(num_scales))] == wanted
    assert folder.json("varsr")["config"]["refiner_vae_scale"] == DATA_SCALE


@pytest.mark.parametrize("case", ["same 6 scales", "other number of scales"])
def test_a_restorer_takes_of_a_class_model_what_the_published_one_does(golden: Path, case: str) -> None:
    meta = GoldenVARSR(golden).json("misc")["c2i_to_isr"][case]
    kept = {name for name in meta["kept_as_initialised"] if name not in ("lvl_1L", "attn_bias_for_masking")}
    system = GoldenVARSR(golden).system("varsr")
    restorer = {published_varsr_name(name): name for name in system.network()}
    given = {name: t for name, t in system.network().items() if not name.startswith("prefix_encoder.")}
    given["start"] = given["start"][:, :1]
    given["condition.embedding.weight"] = torch.rand(7, 64)
    if case != "same 6 scales":
        given["level_embed.weight"] = torch.rand(9, 64)
    taken = class_to_restoration(system.network(), given, "file")
    assert {name for name, ours in restorer.items() if ours not in taken} == kept
    assert torch.equal(taken["condition.embedding.weight"], given["condition.embedding.weight"][:2])
