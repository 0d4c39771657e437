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
from varestorer.transformer.layout import TokenLayout, pyramid_layout
from varestorer.transformer.masks import BlockCausal, prefix_causal_mask
from varestorer.transformer.model import PreparedText, VARTransformer
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

    @property
    def is_guided(self) -> bool:
        """Whether any scale asks for guidance, so that every sample needs an unconditional twin."""
        return any(cfg != 1 for cfg in ([self.cfg] if isinstance(self.cfg, int | float) else self.cfg))


@dataclass(frozen=True)
class Prefix:
    """Tokens that every scale sees and that see themselves alone; guidance compares with and without them.

    Attributes:
        tokens_BPZ: inputs of the transformer.
        layout: their level and position.
    """

    tokens_BPZ: Tensor
    layout: TokenLayout


@dataclass(frozen=True)
class Generation:
    """Result of a `MultiStepGenerator`.

    Attributes:
        bits: of each scale that is known or was generated, (B, Z, h, w) bool.
        codes: their sum, of all scales the decoder's input (B, Z, h_K, w_K).
        logits: of each generated scale as the network gave them (before temperature and guidance), keyed by scale
            number: (B or 2B, l, Z, 2).
    """

    bits: list[Tensor]
    codes: Tensor
    logits: dict[int, Tensor]


@dataclass(frozen=True)
class MultiStepGenerator:
    """Predicts the bits of all scales one after the other, each seeing all before it.

    Attributes:
        transformer: the network, adapters off for the teacher.
        quantizer: turns bits into codes.
        schedule: the scales.
        resize: how the sum so far becomes the next scale's input; VARestorer's own copy of Infinity used
            `resize_area`.
    """

    transformer: VARTransformer
    quantizer: MultiScaleQuantizer
    schedule: ScaleSchedule
    resize: Callable[[Tensor, Scale], Tensor] = resize_bilinear

    @torch.no_grad()
    def prepare(self, text: TextFeatures, is_guided: bool, negative: TextFeatures | None = None) -> PreparedText:
        """What the network needs of the text, computed once: that of a fixed prompt serves many generations.

        Args:
            text: of the prompts.
            is_guided: whether the unconditional half follows the prompts.
            negative: text of the unconditional half; None takes the learned null text.
        """
        if is_guided:
            other = negative or self.transformer.text.null(text.lengths)
            text = TextFeatures.from_list([*text.to_list(), *other.to_list()])
        return self.transformer.prepare(text)

    @torch.no_grad()
    def __call__(
        self,
        text: TextFeatures | PreparedText,
        options: SamplingOptions,
        *,
        noise: Noise | None = None,
        negative: TextFeatures | None = None,
        known_bits: Sequence[Tensor] = (),
        prefix: Prefix | None = None,
        num_scales: int | None = None,
    ) -> Generation:
        """Generate; the host waits for the device nowhere.

        Args:
            text: of the prompts, or what `prepare` made of it for the same guidance.
            options: guidance, temperatures and filters.
            noise: uniform noise per scale; None is greedy.
            negative: see `prepare`; of no use where the text is prepared.
            known_bits: bits of the first scales, taken as they are; they are read in one pass.
            prefix: tokens seen by all; the unconditional half does not see them.
            num_scales: scales in the end, the known ones included; None for all.
        """
        settings = options.per_scale(len(self.schedule))
        guided = options.is_guided
        context = self.prepare(text, guided, negative) if isinstance(text, TextFeatures) else text
        device, batch_size = context.cond_BC.device, len(context.cond_BC) // (2 if guided else 1)
        layout = pyramid_layout(self.schedule, self.transformer.config.head_dim, device)
        view = _View(prefix, torch.arange(2 * batch_size, device=device) >= batch_size if guided else None)
        num_keys = self.schedule.num_tokens + (0 if prefix is None else len(prefix.layout))
        cache = [LayerCache(num_keys) for _ in self.transformer.blocks]

        total, inputs = self._read(known_bits, batch_size, device)
        bits, logits, start = list(known_bits), {}, 0
        for k in range(len(bits), num_scales or len(self.schedule)):
            cfg, tau = settings[k]
            new, first = layout[start : self.schedule.slices[k].stop], 0 if start == 0 else k
            tokens, whole, mask = view.first(inputs, new) if start == 0 else (inputs, new, view.later(new))
            spans = [(settings[j][0], _moved(self.schedule.slices[j], -start)) for j in range(first, k + 1)]
            if len(whole) > len(new):
                spans.append((settings[0][0], slice(len(new), len(whole))))  # the prefix enters with the first scale
            start = self.schedule.slices[k].stop
            tokens = tokens.repeat(2, 1, 1) if guided and tokens is not None else tokens
            mix = _mix_after_blocks(spans, options.insertion_layers, len(cache), batch_size)
            raw = self.transformer(tokens, context, whole, mask, cache, mix, len(new))
            logits[k] = raw[:, len(new) - self.schedule.num_tokens_per_scale[k] :]
            mixed = _mix_logits(logits[k], cfg if 0 in options.insertion_layers else 1.0, batch_size) / tau
            uniform = None if noise is None else noise(k, tuple(mixed.shape))
            chosen = select_bits(mixed, uniform, options.top_k, options.top_p)
            bits.append(bits_to_map(chosen, self.schedule.scales[k]))
            total, inputs = self._add(total, bits[-1], k)
        return Generation(bits, total, logits)

    def _read(
        self, known_bits: Sequence[Tensor], batch_size: int, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Sum of the known scales, and the inputs of the scales up to the first unknown one (None: just the start)."""
        total = torch.zeros(batch_size, self.transformer.config.num_bits, *self.schedule.latent_size, device=device)
        inputs = []
        for k, bits in enumerate(known_bits):
            total, following = self._add(total, bits, k)
            if following is not None:
                inputs.append(following)
        return total, torch.cat(inputs, dim=1) if inputs else None

    def _add(self, total: Tensor, bits: Tensor, scale_number: int) -> tuple[Tensor, Tensor | None]:
        """The sum with one more scale, and from it the next scale's inputs (None after the last scale)."""
        total = total + resize_bilinear(self.quantizer.quantiser.codes(bits), self.schedule.latent_size)
        if scale_number + 1 == len(self.schedule):
            return total, None
        return total, to_tokens(self.resize(total, self.schedule.scales[scale_number + 1]))


class _View:
    """What the tokens of a pass see of each other and of those before them.

    Args:
        prefix: enters with the first pass, behind that pass's own tokens.
        dropped_B: samples that must not see the prefix, or None.
    """

    def __init__(self, prefix: Prefix | None, dropped_B: Tensor | None) -> None:
        self.prefix = prefix
        self.dropped_B = dropped_B
        self.is_prefix_L = torch.zeros(0, dtype=torch.bool)

    def first(
        self, inputs: Tensor | None, layout: TokenLayout
    ) -> tuple[Tensor | None, TokenLayout, Tensor | BlockCausal]:
        """Inputs, layout and mask of the first pass, which may hold several scales."""
        if self.prefix is None:
            return inputs, layout, BlockCausal.of(layout)
        tokens = self.prefix.tokens_BPZ if inputs is None else torch.cat([inputs, self.prefix.tokens_BPZ], dim=1)
        whole = layout + self.prefix.layout
        self.is_prefix_L = torch.arange(len(whole), device=whole.levels_L.device) >= len(layout)
        return tokens, whole, prefix_causal_mask(whole.levels_L, self.is_prefix_L, self.dropped_B)

    def later(self, layout: TokenLayout) -> Tensor | None:
        """Mask of a pass over one further scale, over all keys so far and its own."""
        if self.prefix is None or self.dropped_B is None:
            return None
        self.is_prefix_L = torch.cat([self.is_prefix_L, torch.zeros_like(layout.levels_L, dtype=torch.bool)])
        return ~(self.dropped_B[:, None, None, None] & self.is_prefix_L)


def _moved(tokens: slice, by: int) -> slice:
    return slice(tokens.start + by, tokens.stop + by)


def _mix_logits(raw: Tensor, cfg: float, batch_size: int) -> Tensor:
    """Guidance on logits: cfg * conditional + (1 - cfg) * unconditional."""
    conditional = raw[:batch_size]
    return conditional if cfg == 1 else cfg * conditional + (1 - cfg) * raw[batch_size:]


def _mix_after_blocks(
    spans: Sequence[tuple[float, slice]], insertion_layers: tuple[int, ...], depth: int, batch_size: int
) -> Callable[[int, Tensor], Tensor] | None:
    """Guidance on the outputs of the blocks that negative insertion layers name, written to both halves.

    Args:
        spans: guidance of consecutive tokens: a pass may read several known scales, each with its own.
        insertion_layers: see `SamplingOptions`.
        depth: number of blocks.
        batch_size: of one half.
    """
    numbers = {depth + layer for layer in insertion_layers if layer < 0}
    if not numbers or all(cfg == 1 for cfg, _ in spans):
        return None

    def mixed(x_BLC: Tensor, cfg: float) -> Tensor:
        return x_BLC if cfg == 1 else (cfg * x_BLC[:batch_size] + (1 - cfg) * x_BLC[batch_size:]).repeat(2, 1, 1)

    def mix(number: int, x_BLC: Tensor) -> Tensor:
        if number not in numbers:
            return x_BLC
        return torch.cat([mixed(x_BLC[:, tokens], cfg) for cfg, tokens in spans], dim=1)

    return mix
