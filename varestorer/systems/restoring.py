"""Restoring with a system's networks: squares in one pass or in several, and where the student guessed.

Shapes: `B` batch, `H W` pixels, `L` tokens of all scales, `Z` bits per token, `K` scales.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from varestorer.systems.prefix import generate_from_prefix
from varestorer.tokenizer import TokenPyramid
from varestorer.transformer import TextContext, TextFeatures
from varestorer.transformer.adapters import adapters_off
from varestorer.transformer.generation import Generation, MultiStepGenerator, SamplingOptions
from varestorer.transformer.model import PreparedText
from varestorer.transformer.sampling import Noise, bit_entropy, bits_to_map, select_bits
from varestorer.utils.errors import UserError
from varestorer.utils.finite import spread_nan
from varestorer.utils.images import from_network

if TYPE_CHECKING:
    from varestorer.systems.varestorer import VARestorer

MOST_TEXTS = 8

Text = TextFeatures | TextContext | PreparedText
"""Text in one of the forms that the transformer takes."""


@dataclass(frozen=True)
class RestoredBatch:
    """Restored squares.

    Attributes:
        images_B3HW: in [0, 1]; NaN where the networks' numbers were not finite.
        bits: of each scale, (B, Z, h, w) bool.
        logits_BLZ2: of the student; None for multi-step generation.
    """

    images_B3HW: Tensor
    bits: list[Tensor]
    logits_BLZ2: Tensor | None


class PreparedTexts:
    """What the transformer makes of the prompts used last, so that tiles, and images, of one prompt share it."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, tuple[Tensor | None, PreparedText]] = OrderedDict()

    def of(self, system: VARestorer, features_TE: Tensor | None) -> PreparedText:
        """A prompt, prepared for batches of any size.

        Args:
            system: its weights and its device are the same at every call.
            features_TE: of the prompt, known again by being the same tensor; None for no prompt.
        """
        key = id(features_TE)
        if key not in self._kept:
            while len(self._kept) >= MOST_TEXTS:
                self._kept.popitem(last=False)
            # the features are kept as well, as their id might else be that of others later
            self._kept[key] = features_TE, system.transformer.prepare(system.text_batch(features_TE, 1))
        self._kept.move_to_end(key)
        return self._kept[key][1]


def is_one_pass(system: VARestorer, steps: str | int) -> bool:
    """Whether all scales are predicted at once."""
    return steps == "one" and system.student_config.conditioning != "prefix"


def text_of(
    system: VARestorer, features_TE: Tensor | None, batch_size: int, steps: str | int, texts: PreparedTexts
) -> Text:
    """What a batch whose images have one prompt is restored with; several passes need the features themselves."""
    return texts.of(system, features_TE) if is_one_pass(system, steps) else system.text_batch(features_TE, batch_size)


def restore_squares(
    system: VARestorer,
    lq_B3HW: Tensor,
    noise: Noise | None,
    steps: str | int,
    text: Text | None,
) -> RestoredBatch:
    """Restore squares of side `system.tile`, see `VARestorer.restore_batch`."""
    if is_one_pass(system, steps):
        return _in_one_pass(system, lq_B3HW, noise, text)
    if text is not None and not isinstance(text, TextFeatures):
        raise TypeError(f"restoring in several steps wants TextFeatures, got {type(text).__name__}")
    if steps != "one" and system.student_config.merged:
        raise UserError(f"steps={steps} needs the teacher, and the adapters of this model are merged; use steps=one")
    return _in_several_steps(system, lq_B3HW, noise, steps, text or system.null_text(len(lq_B3HW)))


def _in_one_pass(system: VARestorer, lq_B3HW: Tensor, noise: Noise | None, text: Text | None) -> RestoredBatch:
    """The student alone; what the host has to do for it is done first, then the device is not interrupted."""
    if text is None and system.texts is not None:
        text = system.texts.of(system, None)
    if not isinstance(text, PreparedText):
        text = system.transformer.prepare(text or system.null_text(len(lq_B3HW)))
    uniforms = None if noise is None else _noise_of_scales(system, noise, len(lq_B3HW))
    if system.graphs is None:
        return predict_squares(system, text, lq_B3HW, uniforms)
    return system.graphs(partial(predict_squares, system), text, lq_B3HW, uniforms)


def predict_squares(
    system: VARestorer, text: PreparedText, lq_B3HW: Tensor, uniforms: list[Tensor] | None
) -> RestoredBatch:
    """One pass from degraded to restored squares, without a word between host and device.

    Args:
        system: with a student that sees the pyramid of the degraded image.
        text: of one prompt for all, or of B prompts.
        lq_B3HW: in [0, 1], of side `system.tile`.
        uniforms: noise of each scale, (B, l, Z, 2), or None for the likelier bits.
    """
    condition = system.condition(lq_B3HW)
    logits_BLZ2 = system.student_logits(condition, text)
    bits = select_maps(system, logits_BLZ2, uniforms)
    codes = system.tokenizer.quantizer.indices_to_codes(bits, system.schedule.latent_size)
    codes = spread_nan(codes, logits_BLZ2)
    images = from_network(system.student_image(codes, system.residual(condition)))
    return RestoredBatch(images, bits, logits_BLZ2)


def _noise_of_scales(system: VARestorer, noise: Noise, batch_size: int) -> list[Tensor]:
    """Uniform noise (B, l, Z, 2) of each scale."""
    num_bits = system.tokenizer.config.num_bits
    return [noise(k, (batch_size, count, num_bits, 2)) for k, count in enumerate(system.schedule.num_tokens_per_scale)]


def select_maps(system: VARestorer, logits_BLZ2: Tensor, uniforms: list[Tensor] | None) -> list[Tensor]:
    """The bits of each scale as maps (B, Z, h, w): the likelier ones, or samples."""
    bits = []
    for k, (tokens, scale) in enumerate(zip(system.schedule.slices, system.schedule.scales, strict=True)):
        uniform = None if uniforms is None else uniforms[k]
        bits.append(bits_to_map(select_bits(logits_BLZ2[:, tokens], uniform), scale))
    return bits


def _in_several_steps(
    system: VARestorer, lq_B3HW: Tensor, noise: Noise | None, steps: str | int, text: TextFeatures
) -> RestoredBatch:
    """Scale by scale: by the teacher after the student or after the degraded image, or by a prefixed network."""
    condition, logits_BLZ2, residual = system.condition(lq_B3HW), None, None
    if system.student_config.conditioning == "prefix":
        generation = generate_from_prefix(system, condition.pyramid, text, noise)
    elif steps == "multi":
        generation = _continue(system, _coarse_bits(system, condition.pyramid), text, noise)
    else:
        num_kept, residual = _num_kept(system, steps), system.residual(condition)
        logits_BLZ2 = system.student_logits(condition, text)
        uniforms = None if noise is None else _noise_of_scales(system, noise, len(lq_B3HW))
        generation = _continue(system, select_maps(system, logits_BLZ2, uniforms)[:num_kept], text, noise)
    codes = spread_nan(generation.codes, condition.pyramid.codes)
    images = from_network(system.student_image(codes, residual))
    return RestoredBatch(images, generation.bits, logits_BLZ2)


def _num_kept(system: VARestorer, steps: str | int) -> int:
    """Scales that stay as the student made them."""
    number = int(steps) if str(steps).isdecimal() else 0
    if not 1 <= number <= len(system.schedule):
        raise UserError(f"steps must be one, multi or 1 to {len(system.schedule)}, got {steps}")
    return len(system.schedule) - number + 1


def _coarse_bits(system: VARestorer, pyramid: TokenPyramid) -> list[Tensor]:
    limit = max(system.schedule.latent_size) / 4
    return [bits for bits in pyramid.indices if max(bits.shape[-2:]) <= limit]


def _continue(system: VARestorer, known_bits: Sequence[Tensor], text: TextFeatures, noise: Noise | None) -> Generation:
    """The teacher's scale-by-scale prediction of what follows the given scales."""
    with adapters_off(system.transformer):
        generator = MultiStepGenerator(system.transformer, system.tokenizer.quantizer, system.schedule)
        return generator(text, SamplingOptions(), noise=noise, known_bits=known_bits)


def uncertainty_maps(system: VARestorer, logits_BLZ2: Tensor) -> Tensor:
    """Where the student guesses, see `VARestorer.uncertainty`."""
    entropy_BL1 = bit_entropy(logits_BLZ2)[..., None]
    size = (system.tile, system.tile)
    maps = [F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in system.split_bits(entropy_BL1)]
    return torch.cat(maps, dim=1)
