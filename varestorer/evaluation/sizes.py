"""Every size of one pass against the photograph reduced to it, beside what the tokenizer keeps of it (H-VAR)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varestorer.evaluation.comparison import SCALE, Photograph, photographs, read_curves
from varestorer.evaluation.evaluator import Evaluator
from varestorer.evaluation.protocols import load_protocol
from varestorer.evaluation.report import write_run_report
from varestorer.systems.hvar import HVAR
from varestorer.utils.images import resize

TUNED_PLAIN, READ_PLAIN = "plain tokenizer", "same tokenizer read plain"
"""Trained without the hierarchy; and trained for it but used without, which is no fair stand-in for the first."""


def plain_twin(system: HVAR) -> HVAR:
    """The same networks read as a plain residual tokenizer: all scales found at the last size."""
    config = system.config
    plain = HVAR(**config | {"tokenizer": config["tokenizer"] | {"reuse": "none"}})
    plain.load_state_dict(system.state_dict())
    return plain.to(system.device).eval()


def reduced_plain(plain: HVAR, photo: Photograph, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The scales up to each target, summed and decoded at the full size, then reduced: how VAR shows a coarse image."""
    images = []
    for target, size in zip(plain.nested.targets, sizes, strict=True):
        count = sum(h <= target[0] for h, _ in plain.nested.scales)

        def first_scales(image_3HW: Tensor, count: int = count) -> Tensor:
            indices = plain.encode(image_3HW[None].to(plain.device)).indices[:count]
            codes = plain.tokenizer.quantizer.indices_to_codes(indices, plain.schedule)
            return plain.decode(codes)[0].cpu()

        images.append(resize(_by_squares(photo.hq, plain.tile, first_scales), size, "area"))
    return images


def _by_squares(image_3HW: Tensor, side: int, restore: Any) -> Tensor:
    """An image through a function of squares, by tiles."""
    from varestorer.utils.tiling import restore_tiled

    def run(tiles_B3tt: Tensor, numbers: list[int]) -> Tensor:
        return torch.stack([restore(tile) for tile in tiles_B3tt])

    size = (image_3HW.shape[-2], image_3HW.shape[-1])
    return restore_tiled(image_3HW, size, side, side // 4, 8, run).clamp_(0, 1)


@torch.inference_mode()
def compare_sizes(
    system: HVAR, photos: Sequence[Photograph], protocol: str, metrics: Sequence[str], plain: HVAR | None = None
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Tensor]]]:
    """Restore and reconstruct every photograph at every size, and score it against the photograph reduced to it.

    Args:
        system: gives all sizes in one pass.
        photos: held out.
        protocol: whose metrics are used.
        metrics: of that protocol, or of pyiqa.
        plain: a system with a plain tokenizer; None for the system's own weights read so.

    Returns:
        a row per method and size (mean metrics), and the pictures of each photograph by column.
    """
    evaluator = Evaluator(load_protocol(protocol), metrics=list(metrics), device=system.device, offline=True)
    label = READ_PLAIN if plain is None else TUNED_PLAIN
    plain = plain or plain_twin(system)
    factors = [SCALE * side / system.tile for side in system.sides]
    scores: dict[tuple[str, int], list[dict[str, float]]] = {}
    pictures: dict[str, dict[str, Tensor]] = {}
    for photo in photos:
        start = time.perf_counter()
        restored = _all_sizes(system, photo, factors)
        seconds = time.perf_counter() - start
        sizes = [(image.shape[-2], image.shape[-1]) for image in restored]
        ways: dict[str, list[Tensor]] = {
            "bicubic": [resize(photo.lr, size, "bicubic") for size in sizes],
            "H-VAR": restored,
            "tokenizer": system.reconstruct_sizes(photo.hq),
            f"{label}, decoded at the size": plain.reconstruct_sizes(photo.hq),
            f"{label}, decoded whole and reduced": reduced_plain(plain, photo, sizes),
        }
        columns = {"LQ": torch.nn.functional.interpolate(photo.lr[None], size=sizes[-1], mode="nearest")[0]}
        for name, images in ways.items():
            for image, side in zip(images, system.sides, strict=True):
                wanted = resize(photo.hq, (image.shape[-2], image.shape[-1]), "area")
                found = dict(evaluator.score(image, wanted).values)
                own = {"seconds of all sizes": seconds} if name == "H-VAR" else {}
                scores.setdefault((name, side), []).append(found | own)
                columns[f"{name}, {side} pixels"] = image
        pictures[photo.name] = columns | {"HQ": photo.hq}
    rows = [
        {"method": name, "pixels": side, **{key: sum(s[key] for s in found) / len(found) for key in found[0]}}
        for (name, side), found in sorted(scores.items(), key=lambda item: item[0][1])
    ]
    return rows, pictures


def _all_sizes(system: HVAR, photo: Photograph, factors: Sequence[float]) -> list[Tensor]:
    """All sizes of one pass, smallest first."""
    result = system.restore(photo.lr, SCALE, sizes=factors)
    return [*result.smaller.values(), result.image]


def write_sizes(
    run_dir: Path,
    system: HVAR,
    config: Mapping[str, Any],
    device: torch.device,
    heldout: Sequence[Mapping[str, Any]],
    title: str = "H-VAR run",
    protocol: str = "varestorer",
    metrics: Sequence[str] = ("psnr", "ssim"),
    plain: str | None = None,
) -> Path:
    """Write `report.html` into a run: curves, held-out pictures at all sizes, and a table of metrics.

    Args:
        run_dir: the run's folder, with its `metrics.jsonl`.
        system: as trained.
        config: of the run, for the facts.
        device: where it runs.
        heldout: pairs that were not trained on (`data.heldout_pairs`).
        title: of the page.
        protocol: whose metrics are used, see `evaluation.protocols`.
        metrics: of that protocol, or of pyiqa; those whose weights are not at hand are left out.
        plain: a run with a plain tokenizer (`reuse: none`), tuned as long; None: this run's own networks read so.

    Returns:
        the report's path.
    """
    system.to(device).eval()
    other = None if plain is None else HVAR.from_pretrained(plain, device=device)
    rows, pictures = compare_sizes(system, photographs(heldout), protocol, metrics, other)
    curves = read_curves(run_dir / "metrics.jsonl")
    counts = {part: sum(p.numel() for p in getattr(system, part).parameters()) for part in ("tokenizer", "transformer")}
    facts = {
        "training": ", ".join(f"{stage} {len(c)} steps {c[-1]['seconds']:.0f} s" for stage, c in curves.items()),
        "parameters": ", ".join(f"{part} {count / 1e6:.2f} M" for part, count in counts.items()),
        "plain tokenizer": plain or "the same networks, which were tuned for the hierarchy",
        "protocol": protocol,
        "seed": config["seed"],
        "device": str(device),
    }
    path = run_dir / "report.html"
    write_run_report(path, title, curves, rows, pictures, facts)
    (run_dir / "report.json").write_text(json.dumps({"rows": rows, "facts": facts}, indent=1), encoding="utf-8")
    return path
