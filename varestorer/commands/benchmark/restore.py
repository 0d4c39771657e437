"""`benchmark what=restore`: one-step restoring by variants in turns, as a whole and stage by stage."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from varestorer.commands.benchmark.shared import (
    build_system,
    heading,
    is_paper_model,
    model_name,
    out_folder,
    where,
    write_json,
)
from varestorer.commands.entry import FAILED, OK, say
from varestorer.utils.errors import UsageError, UserError

if TYPE_CHECKING:
    import torch

    from varestorer.evaluation.speed.restoring import Rates, Speed, StageSpeed
    from varestorer.evaluation.speed.subjects import Subject
    from varestorer.utils.timing import Timing

LOG = logging.getLogger(__name__)
VARIANTS = {
    "cuda": ("eager", "merged", "bf16", "bf16+compile", "bf16+graphs", "bf16+compile+graphs"),
    "cpu": ("eager", "merged"),
}
"""What is compared on a device where `variants` does not say."""


def run(cfg: DictConfig) -> int:
    """Measure, print, and write benchmark.json and benchmark.png.

    Returns:
        exit status: 1 if a variant could not be measured.
    Raises:
        UsageError: options that cannot be.
        UserError: no variant could be measured, or a checkpoint, text encoder or captioner cannot be used.
    """
    from varestorer.evaluation.speed.report import speed_content, speed_text, write_bars
    from varestorer.evaluation.speed.targets import DEVICE, restoring_targets, targets_content, targets_text
    from varestorer.utils.device import pick_device

    check(cfg)
    device = pick_device(str(cfg.device))
    variants = list(dict.fromkeys(map(str, cfg.variants or default_variants(device))))
    subjects = build_variants(cfg, variants, device)
    rates = measure_rates(subjects, device)
    speeds = measure(cfg, subjects)
    beside = texts(cfg, device)
    pictures = picture(cfg, subjects)
    place, name = where(device), model_name(cfg)
    title = heading("restore", name, place)
    say(f"{title}\n{speed_text(speeds, rates, beside)}{picture_text(pictures, cfg.picture)}")
    content = {"what": "restore", "model": name, **place, **speed_content(speeds, rates, beside)}
    content["picture"] = {"side": cfg.picture, "runs": {key: asdict(timing) for key, timing in pictures.items()}}
    if is_paper_model(cfg) and DEVICE in place["device"]:
        targets = restoring_targets(content)
        content["targets"] = targets_content(targets)
        say(f"\n{targets_text(targets)}")
    folder = out_folder(cfg)
    write_json(folder, content)
    write_bars(folder / "benchmark.png", speeds, rates, title.partition("\n")[0])
    say(f"\nwritten: benchmark.json and benchmark.png to {folder}")
    return OK if len(speeds) == len(variants) * len(cfg.batch) else FAILED


def check(cfg: DictConfig) -> None:
    """Refuse options that cannot be, before anything is built."""
    from varestorer.utils.color import COLOR_METHODS

    if cfg.repeats < 1 or cfg.warmup < 0:
        raise UsageError(f"repeats must be at least 1 and warmup 0, got repeats={cfg.repeats} warmup={cfg.warmup}")
    if not cfg.batch or min(cfg.batch) < 1:
        raise UsageError(f"batch must list numbers of images from 1 on, such as [1,16], got batch={list(cfg.batch)}")
    if cfg.color not in COLOR_METHODS:
        raise UsageError(f"color must be one of {', '.join(COLOR_METHODS)}, got color={cfg.color}")


def default_variants(device: torch.device) -> list[str]:
    """What the device can do."""
    from varestorer.utils.device import gains_from_bf16

    chosen = list(VARIANTS.get(device.type, VARIANTS["cpu"]))
    return [*chosen, "bf16"] if device.type == "cpu" and gains_from_bf16(device) else chosen


def build_variants(cfg: DictConfig, variants: list[str], device: torch.device) -> dict[str, Subject]:
    """The systems by their variants' names; what this machine cannot do is left out, with a warning.

    Raises:
        UsageError: a name that is none.
        UserError: none is left.
    """
    from varestorer.evaluation.speed.subjects import subject
    from varestorer.systems.acceleration import Acceleration

    subjects = {}
    for name, acceleration in {name: Acceleration.parse(name) for name in variants}.items():
        system = build_system(cfg, device)
        try:
            subjects[name] = subject(system, acceleration)
        except UserError as error:
            LOG.warning("%s is not measured: %s", name, error)
    if not subjects:
        raise UserError(f"none of the variants {', '.join(variants)} can be measured here; choose others")
    return subjects


def measure_rates(subjects: dict[str, Subject], device: torch.device) -> Rates:
    """The rates that the variants are held against."""
    import torch

    from varestorer.evaluation.speed.restoring import Rates
    from varestorer.utils.rates import copy_bandwidth, matrix_rate

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    found = dict.fromkeys(["fp32", *(subject.precision for subject in subjects.values())])
    return Rates({name: matrix_rate(device, dtypes[name]) for name in found}, copy_bandwidth(device))


def measure(cfg: DictConfig, subjects: dict[str, Subject]) -> list[Speed]:
    """All variants at each size of batch."""
    from varestorer.evaluation.speed.restoring import measure_restoring

    speeds: list[Speed] = []
    with TemporaryDirectory() as folder:
        for batch in cfg.batch:
            turns = int(cfg.repeats), int(cfg.warmup)
            found = measure_restoring(subjects, int(batch), Path(folder), *turns, str(cfg.color))
            LOG.info("batch %d: %s", batch, ", ".join(f"{one.variant} {one.whole.median:.3f} s" for one in found))
            speeds += found
    if not speeds:
        raise UserError("no variant could be measured; see the warnings above")
    return speeds


def picture(cfg: DictConfig, subjects: dict[str, Subject]) -> dict[str, Timing]:
    """Seconds of a whole picture, where one is asked for."""
    from varestorer.evaluation.speed.pictures import measure_picture

    if cfg.picture is None:
        return {}
    return measure_picture(subjects, int(cfg.picture), int(cfg.repeats), int(cfg.warmup))


def picture_text(timings: dict[str, Timing], side: int | None) -> str:
    """A line for each variant, below a heading; nothing where there are none."""
    lines = [f"\n\na picture of {side}x{side} pixels by tiles, seconds"] if timings else []
    lines += [f"{name:20}{found.median:10.3f}  spread {found.spread:.3f}" for name, found in timings.items()]
    return "\n".join(lines)


def texts(cfg: DictConfig, device: torch.device) -> list[StageSpeed]:
    """The text encoder and the captioner, where they are asked for."""
    import torch

    from varestorer.evaluation.speed.text import captioner_speed, text_encoder_speed
    from varestorer.utils.seeds import torch_generator

    found: list[Any] = []
    turns = int(cfg.repeats), int(cfg.warmup)
    if cfg.captioner is not None:
        image = torch.rand(1, 3, 512, 512, generator=torch_generator(0, "captioned"))
        found.append(captioner_speed(str(cfg.captioner), image, device, *turns))
    if cfg.text is not None:
        found.append(text_encoder_speed(str(cfg.text), int(cfg.text_tokens), device, *turns))
    return found
