"""One-step restoring taken apart: its stages, each of which takes what the one before it gives.

Shapes: `B` batch, `t` side of the squares, `Z` bits, `L` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varestorer.conditioning.pyramid import Condition
from varestorer.evaluation.cost import DECODER, ENCODER, RESTORER, TRANSFORMER
from varestorer.systems.varestorer import VARestorer
from varestorer.utils.color import match_color
from varestorer.utils.device import num_bytes
from varestorer.utils.errors import UserError
from varestorer.utils.images import from_network, load_image, save_image, to_network
from varestorer.utils.timing import Clock

QUANTISE, SELECT, SUM, COLOUR, READ, WRITE = "quantise", "select", "sum codes", "colour", "decode PNG", "encode PNG"
ON_HOST = (READ, WRITE)
"""Stages whose work is the host's: the device's rates say nothing about them."""


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: of the stage.
        work: what comes out, of what goes in.
        modules: networks whose weights it reads.
    """

    name: str
    work: Callable[[Any], Any]
    modules: tuple[nn.Module, ...] = ()


def restoring_stages(
    system: VARestorer,
    lq_B3tt: Tensor,
    text: Any,
    folder: Path,
    color: str = "adain",
) -> list[Stage]:
    """The stages of `restore_batch`, between reading and writing PNG files; the first takes nothing.

    Args:
        system: restores in one step from a pyramid of tokens.
        lq_B3tt: degraded images in [0, 1] of side `tile`; the first stage reads them from files.
        text: of the images; features are encoded each time, as a part of the transformer's stage.
        folder: where the files are.
        color: see `utils.color.match_color`.
    Raises:
        UserError: a system that restores scale by scale.
    """
    if system.student_config.conditioning != "pyramid":
        raise UserError("stages are those of one-step restoring, and this system restores scale by scale")
    read, write = _file_stages(lq_B3tt, folder, system.device)
    restorer = [] if system.restorer is None else [Stage(RESTORER, system.restorer, (system.restorer,))]
    colour = Stage(COLOUR, lambda images: match_color(images, lq_B3tt, color))
    return [read, *restorer, *_network_stages(system, text), colour, write]


def _file_stages(lq_B3tt: Tensor, folder: Path, device: torch.device) -> tuple[Stage, Stage]:
    """Reading the images, which are written into the folder now, and writing the results beside them."""
    paths = [folder / f"{number}.png" for number in range(len(lq_B3tt))]
    for path, image in zip(paths, lq_B3tt, strict=True):
        save_image(path, image)

    def read(_: None) -> Tensor:
        return torch.stack([load_image(path) for path in paths]).to(device)

    def write(images_B3tt: Tensor) -> None:
        for path, image in zip(paths, images_B3tt.cpu(), strict=True):
            save_image(path.with_suffix(".out.png"), image)

    return Stage(READ, read), Stage(WRITE, write)


def _network_stages(system: VARestorer, text: Any) -> list[Stage]:
    """From cleaned images to the student's; image and condition are kept for the stages that want them again."""
    tokenizer, schedule = system.tokenizer, system.schedule
    kept: dict[str, Any] = {}

    def encode(images_B3tt: Tensor) -> Tensor:
        kept["image"] = to_network(images_B3tt)
        return tokenizer.features(kept["image"])

    def condition(features_BZhw: Tensor) -> Condition:
        pyramid = tokenizer.quantizer(features_BZhw, schedule)
        kept["condition"] = system.conditioner.from_pyramid(pyramid, schedule, kept["image"])
        return kept["condition"]

    def decode(codes_BZhw: Tensor) -> Tensor:
        return from_network(system.student_image(codes_BZhw, system.residual(kept["condition"])))

    return [
        Stage(ENCODER, encode, (tokenizer.encoder,)),
        Stage(QUANTISE, condition),
        Stage(TRANSFORMER, lambda x: system.student_logits(x, text), (system.transformer,)),
        Stage(SELECT, lambda logits: system.split(system.transformer.head.select(logits))),
        Stage(SUM, lambda bits: tokenizer.quantizer.indices_to_codes(bits, schedule)),
        Stage(DECODER, decode, (tokenizer.decoder,)),
    ]


@torch.inference_mode()
def time_stages(stages: Sequence[Stage], clock: Clock) -> dict[str, float]:
    """Seconds of each stage of one run through all of them; a GPU is not waited for between them."""
    clock.synchronize()
    value, marks = None, [clock.mark()]
    for stage in stages:
        value = stage.work(value)
        marks.append(clock.mark())
    return {stage.name: clock.between(*marks[n : n + 2]) for n, stage in enumerate(stages)}


@torch.inference_mode()
def least_bytes(stages: Sequence[Stage]) -> dict[str, int]:
    """Bytes that each stage must move at the least: its weights once, what goes in, and what comes out."""
    value: Any = None
    found: dict[str, int] = {}
    for stage in stages:
        given, value = value, stage.work(value)
        found[stage.name] = weight_bytes(stage.modules) + num_bytes(_tensors(given)) + num_bytes(_tensors(value))
    return found


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of parameters and buffers."""
    return sum(num_bytes([*module.parameters(), *module.buffers()]) for module in modules)


def _tensors(value: Any) -> list[Tensor]:
    """What is handed on; of a condition, the tokens."""
    if isinstance(value, Condition):
        return [value.tokens_BLZ]
    if isinstance(value, Tensor):
        return [value]
    return list(value or [])
