"""The degraded image as tokens of all scales: what the one-step student sees (paper, pyramid conditioning).

Shapes: `B` batch, `H W` pixels, `L` tokens, `Z` latent width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varestorer.tokenizer import MultiScaleTokenizer, ScaleSchedule, TokenPyramid
from varestorer.tokenizer.quantizer import to_tokens
from varestorer.transformer.layout import PositionRule, TokenLayout, long_layout, pyramid_layout

INPUTS = ("next_scale", "own_scale")


@dataclass(frozen=True)
class Condition:
    """The student's input.

    Attributes:
        image_B3HW: the degraded image, cleaned, nominally in [-1, 1] (restorers do not clamp).
        pyramid: its tokens.
        tokens_BLZ: inputs of the transformer after its start token.
        layout: level and position of start token and inputs.
    """

    image_B3HW: Tensor
    pyramid: TokenPyramid
    tokens_BLZ: Tensor
    layout: TokenLayout


@dataclass(frozen=True)
class PyramidConditioner:
    """Turns a degraded image into the student's input tokens.

    Attributes:
        tokenizer: its encoder and quantizer; frozen.
        positions: of the transformer.
        long_input: append the complete codes at the last scale.
        long_positions: those of the appended tokens, see `layout.long_layout`.
        inputs: what the tokens of a scale start from, one of `INPUTS`; see `StudentConfig`.
        restorer: optional frozen network that cleans the image first, [0, 1] to [0, 1].
    """

    tokenizer: MultiScaleTokenizer
    positions: PositionRule
    long_input: bool = True
    long_positions: str = "next_scale"
    inputs: str = "next_scale"
    restorer: nn.Module | None = None

    @torch.no_grad()
    def __call__(self, lq_B3HW: Tensor, schedule: ScaleSchedule) -> Condition:
        """Tokens of a degraded image in [-1, 1], of the result's size: the last scale times the tokenizer's stride."""
        if self.restorer is not None:
            lq_B3HW = self.restorer((lq_B3HW + 1) / 2) * 2 - 1
        return self.from_pyramid(self.tokenizer.encode(lq_B3HW, schedule), schedule, lq_B3HW)

    def from_pyramid(self, pyramid: TokenPyramid, schedule: ScaleSchedule, image_B3HW: Tensor) -> Condition:
        """The student's input from an image, cleaned and in [-1, 1], whose tokens are there already."""
        device = pyramid.codes.device
        tokens = pyramid.inputs() if self.inputs == "next_scale" else pyramid.own_inputs()
        if self.long_input:
            layout = long_layout(schedule, self.positions, device, self.long_positions)
            return Condition(image_B3HW, pyramid, torch.cat([tokens, to_tokens(pyramid.codes)], dim=1), layout)
        return Condition(image_B3HW, pyramid, tokens, pyramid_layout(schedule, self.positions, device))
