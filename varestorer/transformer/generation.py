"""Multi-step generation, scale by scale, with a key-value cache and guidance (Infinity; spec D).

Shapes: `B` batch, `l` tokens of a scale, `Z` bits per token, `h w` one scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varestorer.tokenizer.residual import MultiScaleQuantizer, resize_bilinear, to_tokens
from varestorer.tokenizer.schedule import Scale, ScaleSchedule
from varestorer.transformer.attention import LayerCache
from varestorer.transformer.layout import pyramid_layout
from varestorer.transformer.masks import block_causal_mask
from varestorer.transformer.model import VARTransformer
from varestorer.transformer.sampling import Noise, bits_to_map, select_bits
from varestorer.transformer.text import TextFeatures


@dataclass(frozen=True)
class SamplingOptions:
    """How bits are drawn; lists have one entry per scale, a single number serves all scales.

    Attributes:
        cfg: guidance c: c * conditional + (1 - c) * unconditional; 1 is off.
        tau: temperature.
        insertion_layers: where guidance mixes: 0 on the logits, -k on the output of block depth - k.
        top_k: 1 is greedy.
        top_p: nucleus threshold, 0 off.
    """

    cfg: Sequence[float] | float = 1.0
    tau: Sequence[float] | float = 1.0
    insertion_layers: tuple[int, ...] = (0,)
    top_k: int = 0
    top_p: float = 0.0

    def per_scale(self, num_scales: int) -> list[tuple[float, float]]:
        """(cfg, tau) of every scale."""
        cfg, tau = (
            [float(v)] * num_scales if isinstance(v, int | float) else [float(x) for x in v]
            for v in (self.cfg, self.tau)
        )
        if len(cfg) != num_scales or len(tau) != num_scales:
            raise ValueError(f"cfg and tau need one entry per scale ({num_scales}), got {len(cfg)} and {len(tau)}")
        return list(zip(cfg, tau, strict=True))


@dataclass(frozen=True)
class Generation:
    """Result of `generate`.

    Attributes:
        bits: of each scale, (B, Z, h, w) bool.
        codes: their sum, the decoder's input (B, Z, h_K, w_K).
        logits: of each generated scale as the network gave them (before temperature and guidance), keyed by scale
            number: (B or 2B, l, Z, 2).
    """

    bits: list[Tensor]
    codes: Tensor
    logits: dict[int, Tensor]


@torch.no_grad()
def generate(
    transformer: VARTransformer,
    quantizer: MultiScaleQuantizer,
    schedule: ScaleSchedule,
    text: TextFeatures,
    options: SamplingOptions,
    *,
    noise: Noise | None = None,
    negative: TextFeatures | None = None,
    known_bits: Sequence[Tensor] = (),
    resize: Callable[[Tensor, Scale], Tensor] = resize_bilinear,
) -> Generation:
    """Predict the bits of all scales one after the other, each seeing all before it.

    Args:
        transformer: the network, adapters off for the teacher.
        quantizer: turns bits into codes.
        schedule: the scales.
        text: of the prompts.
        options: guidance, temperatures and filters.
        noise: uniform noise per scale; None is greedy.
        negative: text of the unconditional half; None takes the learned null text.
        known_bits: bits of the first scales, taken as they are; they are read in one pass.
        resize: how the sum so far becomes the next scale's input; VARestorer's own copy of Infinity used
            `resize_area`.
    """
    settings = options.per_scale(len(schedule))
    guided = any(cfg != 1 for cfg, _ in settings)
    if guided:
        other = negative or transformer.text.null(text.lengths)
        text = TextFeatures.from_list([*text.to_list(), *other.to_list()])
    context = transformer.text(text)
    batch_size = len(text.lengths) // (2 if guided else 1)
    device = context.cond_BC.device
    layout = pyramid_layout(schedule, transformer.config.head_dim, device)
    cache = [LayerCache(schedule.num_tokens) for _ in transformer.blocks]

    bits, logits = list(known_bits), {}
    total = torch.zeros(batch_size, transformer.config.num_bits, *schedule.latent_size, device=device)
    inputs: list[Tensor] = []
    for k, known in enumerate(bits):
        total = total + resize_bilinear(quantizer.quantiser.codes(known), schedule.latent_size)
        if k + 1 < len(schedule):
            inputs.append(to_tokens(resize(total, schedule.scales[k + 1])))

    start = 0
    for k in range(len(bits), len(schedule)):
        cfg, tau = settings[k]
        span = slice(start, schedule.slices[k].stop)
        mask = block_causal_mask(layout[span].levels_L) if start == 0 and k > 0 else None
        tokens = torch.cat(inputs, dim=1) if inputs else None
        if guided and tokens is not None:
            tokens = tokens.repeat(2, 1, 1)
        mix = _mix_after_blocks(cfg, options.insertion_layers, len(transformer.blocks), batch_size)
        raw = transformer(tokens, context, layout[span], mask, cache, mix)[:, -schedule.num_tokens_per_scale[k] :]
        logits[k] = raw
        mixed = raw[:batch_size]
        if cfg != 1 and 0 in options.insertion_layers:
            mixed = cfg * mixed + (1 - cfg) * raw[batch_size:]
        uniform = None if noise is None else noise(k, tuple(mixed.shape))
        chosen = select_bits(mixed / tau, uniform, options.top_k, options.top_p)
        bits.append(bits_to_map(chosen, schedule.scales[k]))
        total = total + resize_bilinear(quantizer.quantiser.codes(bits[-1]), schedule.latent_size)
        start = span.stop
        if k + 1 < len(schedule):
            inputs = [to_tokens(resize(total, schedule.scales[k + 1]))]
    return Generation(bits, total, logits)


def _mix_after_blocks(
    cfg: float, insertion_layers: tuple[int, ...], depth: int, batch_size: int
) -> Callable[[int, Tensor], Tensor] | None:
    """Guidance on the outputs of the blocks that negative insertion layers name, written to both halves."""
    numbers = {depth + layer for layer in insertion_layers if layer < 0}
    if cfg == 1 or not numbers:
        return None

    def mix(number: int, x_BLC: Tensor) -> Tensor:
        if number not in numbers:
            return x_BLC
        mixed = cfg * x_BLC[:batch_size] + (1 - cfg) * x_BLC[batch_size:]
        return mixed.repeat(2, 1, 1)

    return mix
