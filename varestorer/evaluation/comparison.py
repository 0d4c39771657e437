"""What a run has learned, on held-out photographs: every way to restore them, side by side, in one report.

Of H-VAR every size of one pass, against the photograph reduced to it, beside what the tokenizer keeps of it.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varestorer.evaluation.evaluator import Evaluator
from varestorer.evaluation.protocols import PROTOCOLS
from varestorer.evaluation.report import write_run_report
from varestorer.systems.base import System
from varestorer.systems.hvar import HVAR
from varestorer.systems.one_step import OneStepSystem
from varestorer.systems.varestorer import VARestorer
from varestorer.systems.varsr import VARSR
from varestorer.transformer.adapters import init_adapters
from varestorer.utils.files import write_json
from varestorer.utils.images import resize
from varestorer.utils.tiling import restore_tiled

SCALE = 4
PROTOCOL = "varestorer"  # whose metrics are used
UNDISTILLED = "one step, before distillation"
TUNED_PLAIN, READ_PLAIN = "plain tokenizer", "same tokenizer read plain"
"""Trained without the hierarchy; and trained for it but used without, which is no fair stand-in for the first."""


@dataclass(frozen=True)
class Photograph:
    """A held-out photograph: LR and HQ, (3, h, w) and (3, 4h, 4w) in [0, 1]."""

    name: str
    lr: Tensor
    hq: Tensor


Ways = dict[str, Callable[[Photograph], Tensor]]
"""What makes an image of a photograph's LR, by the name of its column."""


def photographs(samples: Iterable[Mapping[str, Any]]) -> list[Photograph]:
    """LR images of held-out pairs, whose degraded side comes at the size of the good one."""
    found = []
    for sample in samples:
        height, width = (side // SCALE for side in sample["lq"].shape[-2:])
        lr = resize(sample["lq"], (height, width), "area")
        found.append(Photograph(sample["name"], lr, sample["hq"][:, : height * SCALE, : width * SCALE]))
    return found


def _restored(system: System, photo: Photograph, **options: Any) -> Tensor:
    return system.restore(photo.lr, SCALE, **options).image


def _framed(system: System, ways: Ways) -> Ways:
    """Ways between the least and the most that can be: bicubic, and what the tokenizer keeps of the photograph."""

    def bicubic(photo: Photograph) -> Tensor:
        return resize(photo.lr, (photo.hq.shape[-2], photo.hq.shape[-1]), "bicubic")

    return {"bicubic": bicubic, **ways, "tokenizer ceiling": lambda photo: system.reconstruct(photo.hq)}


def _undistilled(system: OneStepSystem | VARestorer) -> Any:
    """The same networks as a student starts: the teacher, asked for all scales at once."""
    other = copy.deepcopy(system)
    init_adapters(other.transformer)
    return other


def _sampled_by(system: VARSR, **sampling: float | bool) -> VARSR:
    """The same networks with another sampling."""
    other = copy.copy(system)
    other.sampling = replace(system.sampling, **sampling)  # type: ignore[arg-type]
    return other


def methods(system: VARestorer) -> Ways:
    """Every way to a full-size image, by the name of its column."""
    ways: Ways = {"multi-step": partial(_restored, system, steps="multi")}
    if system.student_config.lora_rank:  # else all of the network trained, and nothing is left of its start
        ways[UNDISTILLED] = partial(_restored, _undistilled(system).merge_adapters())
    student = copy.deepcopy(system).merge_adapters()  # as `restore` does where no teacher is needed
    return _framed(system, ways | {"one step": partial(_restored, student)})


def guided_methods(system: VARSR) -> Ways:
    """VARSR's ways: asked for bad and for good quality, guided from one to the other, and with the refiner."""
    bad, plain = (_sampled_by(system, guidance=0.0, use_refiner=False) for _ in range(2))
    bad.qualities = bad.prepare(torch.tensor([system.transformer.config.num_classes - 1], device=system.device))
    guided = _sampled_by(system, use_refiner=False)
    columns = {"negative-prompted": bad, "unguided": plain, "guided": guided, "refined": system}
    return _framed(system, {name: partial(_restored, one) for name, one in columns.items()})


def curve_methods(system: VARSR) -> Ways:
    """What guidance and the refiner's steps buy: quality against seconds, one of them changed at a time."""
    trained = system.sampling
    strengths = [trained.guidance * factor for factor in (0, 0.5, 1, 2)]
    chosen: dict[str, dict[str, float | bool]] = {
        f"guidance {strength:g}, no refiner": {"guidance": strength, "use_refiner": False} for strength in strengths
    }
    if system.refiner is not None:
        chosen |= {f"{steps} refiner steps": {"refiner_steps": steps} for steps in (1, 2, 5, 10, 20, 50)}
    return {name: partial(_restored, _sampled_by(system, **sampling)) for name, sampling in chosen.items()}


def one_step_methods(system: OneStepSystem) -> Ways:
    """A student that reads a prefix beside its teacher, which goes scale by scale."""
    ways: Ways = {"multi-step": partial(_restored, system, steps="multi")}
    if isinstance(system, VARSR) and system.refiner is not None:
        ways["multi-step, no refiner"] = partial(_restored, _sampled_by(system, use_refiner=False), steps="multi")
    own = {UNDISTILLED: partial(_restored, _undistilled(system)), "one step": partial(_restored, system)}
    return _framed(system, ways | own)


WAYS: dict[str, Callable[[Any], Ways]] = {
    "distilled": methods,
    "guided": guided_methods,
    "curve": curve_methods,
    "one_step": one_step_methods,
}


def compare_methods(
    system: System, photos: Sequence[Photograph], metrics: Sequence[str], ways: Ways
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Tensor]]]:
    """Restore every photograph in every way (by the name of its column), and score it.

    Methods take turns on each photograph, so that a machine's moods meet all of them.

    Returns:
        a row per method (mean metrics, seconds per image), and the pictures of each photograph by column.
    """
    evaluator = Evaluator(PROTOCOLS[PROTOCOL], metrics, device=system.device, offline=True)
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    pictures: dict[str, dict[str, Tensor]] = {}
    for restore in ways.values():  # the first call pays for memory and kernels
        restore(photos[0])
    for photo in photos:
        columns = {"LQ": photo.lr}
        for name, restore in ways.items():
            start = time.perf_counter()
            columns[name] = restore(photo)
            if system.device.type == "cuda":
                torch.cuda.synchronize(system.device)
            seconds = time.perf_counter() - start
            scores[name].append(evaluator.score(columns[name], photo.hq).values | {"seconds": seconds})
        pictures[photo.name] = columns | {"HQ": photo.hq}
    return [{"method": name, **_means(found)} for name, found in scores.items()], pictures


def _means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: sum(scores[key] for scores in found) / len(found) for key in found[0]}


def write_comparison(
    run_dir: Path,
    system: Any,
    config: Mapping[str, Any],
    device: torch.device,
    heldout: Sequence[Mapping[str, Any]],
    title: str = "varestorer run",
    metrics: Sequence[str] = ("psnr", "ssim"),
    ways: str = "distilled",
) -> Path:
    """Write `report.html` into a run: curves, held-out pictures, and a table of metrics and seconds.

    Args:
        run_dir: the run's folder, with its `metrics.jsonl`.
        system: as trained.
        config: of the run, for the facts.
        device: where it runs.
        heldout: pairs that were not trained on (`data.heldout_pairs`).
        title: of the page.
        metrics: of `PROTOCOL`, or of pyiqa; those whose weights are not at hand are left out.
        ways: which methods to compare, one of `WAYS`.
    """
    system.to(device).eval()
    rows, pictures = compare_methods(system, photographs(heldout), metrics, WAYS[ways](system))
    seconds = {row["method"]: row["seconds"] for row in rows}
    facts: dict[str, Any] = {"parameters": parameter_counts(system)}
    if "one step" in seconds:
        facts["one step against multi-step"] = f"{seconds['multi-step'] / seconds['one step']:.2f} times as fast"
    return _write(run_dir, title, rows, pictures, facts, config["seed"], device)


def _write(
    run_dir: Path,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Mapping[str, Tensor]],
    facts: Mapping[str, Any],
    seed: int,
    device: torch.device,
) -> Path:
    """Write `report.html`, and its rows and facts as `report.json`; returns the report's path."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for text in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        curves.setdefault(line["stage"], []).append(line)
    training = ", ".join(f"{stage} {len(c)} steps {c[-1]['seconds']:.0f} s" for stage, c in curves.items())
    facts = {"training": training, **facts, "protocol": PROTOCOL, "seed": seed, "device": str(device)}
    write_run_report(run_dir / "report.html", title, curves, rows, pictures, facts)
    write_json(run_dir / "report.json", {"rows": rows, "facts": facts}, indent=1)
    return run_dir / "report.html"


def parameter_counts(system: Any) -> str:
    """Millions of parameters of each part, in words."""
    adapters = sum(p.numel() for name, p in system.transformer.named_parameters() if ".lora_" in name)
    transformer = sum(p.numel() for p in system.transformer.parameters()) - adapters
    tokenizer = sum(p.numel() for p in system.tokenizer.parameters())
    counts = {"tokenizer": tokenizer, "transformer": transformer} | ({"adapters": adapters} if adapters else {})
    for name in ("restorer", "prefix_encoder", "refiner"):
        if (part := getattr(system, name, None)) is not None:
            counts = {name.replace("_", " "): sum(p.numel() for p in part.parameters()), **counts}
    return ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in counts.items())


def reduced_plain(plain: HVAR, photo: Photograph, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The scales up to each target, summed and decoded at the full size, then reduced: how VAR shows a coarse image."""
    images = []
    for target, size in zip(plain.nested.targets, sizes, strict=True):
        count = sum(h <= target[0] for h, _ in plain.nested.scales)

        def first_scales(tiles_B3tt: Tensor, numbers: list[int], count: int = count) -> Tensor:
            indices = plain.encode(tiles_B3tt.to(plain.device)).indices[:count]
            codes = plain.tokenizer.quantizer.indices_to_codes(indices, plain.schedule)
            return plain.decode(codes).cpu()

        whole = (photo.hq.shape[-2], photo.hq.shape[-1])
        decoded = restore_tiled(photo.hq, whole, plain.tile, plain.tile // 4, 8, first_scales).clamp_(0, 1)
        images.append(resize(decoded, size, "area"))
    return images


@torch.inference_mode()
def compare_sizes(
    system: HVAR, photos: Sequence[Photograph], metrics: Sequence[str], plain: HVAR | None
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Tensor]]]:
    """Restore and reconstruct every photograph at every size, and score it against the photograph reduced to it.

    `plain` is a system with a plain tokenizer; None for the system's own weights read so.

    Returns:
        a row per method and size (mean metrics), and the pictures of each photograph by column.
    """
    evaluator = Evaluator(PROTOCOLS[PROTOCOL], metrics, device=system.device, offline=True)
    label = READ_PLAIN if plain is None else TUNED_PLAIN
    if plain is None:  # all scales are found at the last size then
        plain = HVAR(**system.config | {"tokenizer": system.config["tokenizer"] | {"reuse": "none"}})
        plain.load_state_dict(system.state_dict())
        plain.to(system.device).eval()
    factors = [SCALE * side / system.tile for side in system.sides]
    scores: dict[tuple[str, int], list[dict[str, float]]] = {}
    pictures: dict[str, dict[str, Tensor]] = {}
    for photo in photos:
        start = time.perf_counter()
        result = system.restore(photo.lr, SCALE, sizes=factors)
        seconds = time.perf_counter() - start
        restored = [*result.smaller.values(), result.image]
        sizes = [(image.shape[-2], image.shape[-1]) for image in restored]
        ways: dict[str, list[Tensor]] = {
            "bicubic": [resize(photo.lr, size, "bicubic") for size in sizes],
            "H-VAR": restored,
            "tokenizer": system.reconstruct_sizes(photo.hq),
            f"{label}, decoded at the size": plain.reconstruct_sizes(photo.hq),
            f"{label}, decoded whole and reduced": reduced_plain(plain, photo, sizes),
        }
        columns = {"LQ": photo.lr}
        for name, images in ways.items():
            for image, side in zip(images, system.sides, strict=True):
                wanted = resize(photo.hq, (image.shape[-2], image.shape[-1]), "area")
                found = dict(evaluator.score(image, wanted).values)
                own = {"seconds of all sizes": seconds} if name == "H-VAR" else {}
                scores.setdefault((name, side), []).append(found | own)
                columns[f"{name}, {side} pixels"] = image
        pictures[photo.name] = columns | {"HQ": photo.hq}
    by_size = sorted(scores.items(), key=lambda item: item[0][1])
    return [{"method": name, "pixels": side, **_means(found)} for (name, side), found in by_size], pictures


def write_sizes(
    run_dir: Path,
    system: HVAR,
    config: Mapping[str, Any],
    device: torch.device,
    heldout: Sequence[Mapping[str, Any]],
    title: str = "H-VAR run",
    metrics: Sequence[str] = ("psnr", "ssim"),
    plain: str | None = None,
) -> Path:
    """As `write_comparison`, with held-out pictures at all sizes.

    `plain` is a run with a plain tokenizer (`reuse: none`), tuned as long; None: this run's own networks read so.
    """
    system.to(device).eval()
    other = None if plain is None else HVAR.from_pretrained(plain, device=device)
    rows, pictures = compare_sizes(system, photographs(heldout), metrics, other)
    facts: dict[str, Any] = {
        "parameters": parameter_counts(system),
        "plain tokenizer": plain or "the same networks, which were tuned for the hierarchy",
    }
    return _write(run_dir, title, rows, pictures, facts, config["seed"], device)
