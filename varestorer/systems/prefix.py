"""The model without distillation (paper, table 3): multi-step VAR that sees the degraded image as a prefix.

The degraded image's summed codes at the last scale stand as tokens before all scales and are seen by all of them; among
themselves the scales stay causal. Trained with the bits of photographs (`training.prefix`), sampled scale by scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from varestorer.tokenizer import TokenPyramid
from varestorer.tokenizer.residual import to_tokens
from varestorer.transformer import TextContext, TextFeatures
from varestorer.transformer.generation import Generation, MultiStepGenerator, Prefix, SamplingOptions
from varestorer.transformer.layout import long_layout
from varestorer.transformer.masks import prefix_causal_mask
from varestorer.transformer.sampling import Noise

if TYPE_CHECKING:
    from varestorer.systems.varestorer import VARestorer


def prefix_of(system: VARestorer, lq_pyramid: TokenPyramid) -> Prefix:
    """The degraded image as one more level behind the last, at the last scale's own positions."""
    layout = long_layout(system.schedule, system.transformer.config.head_dim, lq_pyramid.codes.device, "own")
    return Prefix(to_tokens(lq_pyramid.codes), layout[system.schedule.num_tokens :])


def prefix_logits(
    system: VARestorer,
    pyramid: TokenPyramid,
    lq_pyramid: TokenPyramid,
    text: TextFeatures | TextContext,
    dropped_B: Tensor | None = None,
) -> Tensor:
    """Logits (B, L, Z, 2) of every scale, given the true coarser ones and the degraded image.

    Args:
        system: adapters on.
        pyramid: tokens of the photograph.
        lq_pyramid: tokens of the degraded image.
        text: of the prompts.
        dropped_B: samples whose prefix nobody sees.
    """
    prefix = prefix_of(system, lq_pyramid)
    num_tokens = system.schedule.num_tokens
    layout = long_layout(system.schedule, system.transformer.config.head_dim, pyramid.codes.device, "own")
    is_prefix_L = torch.arange(len(layout), device=pyramid.codes.device) >= num_tokens
    mask = prefix_causal_mask(layout.levels_L, is_prefix_L, dropped_B)
    tokens = torch.cat([pyramid.inputs(), prefix.tokens_BPZ], dim=1)
    return system.transformer(tokens, text, layout, mask)[:, :num_tokens]


def generate_from_prefix(
    system: VARestorer, lq_pyramid: TokenPyramid, text: TextFeatures, noise: Noise | None
) -> Generation:
    """Restore scale by scale; guidance compares with the same network without the prefix."""
    generator = MultiStepGenerator(system.transformer, system.tokenizer.quantizer, system.schedule)
    options = SamplingOptions(cfg=system.student_config.guidance)
    return generator(text, options, noise=noise, negative=text, prefix=prefix_of(system, lq_pyramid))
