"""Multi-step generation, scale by scale, with a key-value cache and guidance (VAR, algorithm 2; Infinity).

Shapes: `B` batch, `P` tokens of a prefix, `l` tokens of a scale, `C` width, `Z` latent width, `h w` one scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varestorer.tokenizer.quantizer import MultiScaleQuantizer, Resize, RunningSum, to_map
from varestorer.tokenizer.schedule import Scale, ScaleSchedule
from varestorer.transformer.blocks import LayerCache
from varestorer.transformer.conditions import ConditionInput
from varestorer.transformer.heads import Noise
from varestorer.transformer.layout import BlockCausal, TokenLayout, prefix_causal_mask
from varestorer.transformer.model import PreparedCondition, VARTransformer
from varestorer.utils.finite import spread_nan


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn; lists have one entry per scale, a single number serves all scales.

    Attributes:
        cfg: guidance c: c * conditional + (1 - c) * unconditional; 1 is off. VARSR's strength t is c = 1 + t.
        tau: temperature.
        insertion_layers: where guidance mixes: 0 on the logits, -k on the output of block depth - k.
        top_k: likeliest symbols that are left, 1 is greedy, 0 off.
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
    """Ready-made tokens in front of all scales, which see them.

    Attributes:
        tokens_BPC: of the transformer's width.
        size: (h, w) of the map that they are.
        is_conditional: they are what guidance compares with and without: the unconditional half does not see them.
    """

    tokens_BPC: Tensor
    size: Scale
    is_conditional: bool = False


@dataclass(frozen=True)
class Generation:
    """Result of a `MultiStepGenerator`.

    Attributes:
        indices: of each scale that is known or was generated, as maps.
        codes: their sum, of all scales the decoder's input (B, Z, h_K, w_K); NaN where logits were not finite.
        targets: the sum after the last scale of each of the schedule's targets; the last one is `codes`.
        logits: of each generated scale as the network gave them (before temperature and guidance), keyed by scale
            number: (B or 2B, l, ...).
        hidden: what left the last block at the last scale, (B or 2B, l, C).
    """

    indices: list[Tensor]
    codes: Tensor
    targets: list[Tensor]
    logits: dict[int, Tensor]
    hidden: Tensor | None


@dataclass(frozen=True)
class MultiStepGenerator:
    """Predicts the tokens of all scales one after the other, each seeing all before it.

    Attributes:
        transformer: the network, adapters off for the teacher.
        quantizer: turns tokens into codes.
        schedule: the scales.
        shrink: how the sum so far becomes the next scale's input; None for the tokenizer's way. VARestorer's own copy
            of Infinity used `resize_area`.
        raw_last: leave phi out at the last scale (VARSR).
    """

    transformer: VARTransformer
    quantizer: MultiScaleQuantizer
    schedule: ScaleSchedule
    shrink: Resize | None = None
    raw_last: bool = False

    @torch.no_grad()
    def prepare(
        self, condition: ConditionInput, is_guided: bool, negative: ConditionInput | None = None
    ) -> PreparedCondition:
        """What the network needs of the condition, computed once: that of a fixed prompt serves many generations.

        Args:
            condition: of the samples: texts or classes.
            is_guided: whether an unconditional half follows.
            negative: condition of the unconditional half; None takes the learned null text or class.
        """
        if is_guided:
            other = negative or self.transformer.condition.null(condition)  # type: ignore[arg-type]
            condition = condition + other  # type: ignore[operator]
        return self.transformer.prepare(condition)

    @torch.no_grad()
    def __call__(
        self,
        condition: ConditionInput | PreparedCondition,
        options: SamplingOptions,
        *,
        noise: Noise | None = None,
        negative: ConditionInput | None = None,
        known: Sequence[Tensor] = (),
        prefix: Prefix | None = None,
        num_scales: int | None = None,
    ) -> Generation:
        """Generate; the host waits for the device nowhere.

        Args:
            condition: of the samples, or what `prepare` made of it for the same guidance.
            options: guidance, temperatures and filters.
            noise: uniform noise per scale; None is greedy.
            negative: see `prepare`; of no use where the condition is prepared.
            known: indices of the first scales, taken as they are; they are read in one pass.
            prefix: tokens seen by all scales.
            num_scales: scales in the end, the known ones included; None for all.
        """
        settings = options.per_scale(len(self.schedule))
        guided = options.is_guided
        prepared = condition
        if not isinstance(prepared, PreparedCondition):
            prepared = self.prepare(prepared, guided, negative)
        device, batch_size = prepared.cond_BC.device, len(prepared.cond_BC) // (2 if guided else 1)
        num_prefix = 0 if prefix is None else prefix.tokens_BPC.shape[1]
        layout = self.transformer.layout(self.schedule, device, None if prefix is None else prefix.size)
        dropped_B = None
        if prefix is not None and prefix.is_conditional and guided:
            dropped_B = torch.arange(2 * batch_size, device=device) >= batch_size
        cache = [LayerCache(len(layout)) for _ in self.transformer.blocks]
        head = self.transformer.head

        total = self.quantizer.running_sum(self.schedule, self.raw_last, self.shrink)
        inputs, targets = self._read(total, known)
        logits: dict[int, Tensor] = {}
        mixtures: list[Tensor] = []
        hidden, end = None, 0
        for k in range(len(known), num_scales or len(self.schedule)):
            cfg, tau = settings[k]
            is_first, start, end = end == 0, end, num_prefix + self.schedule.slices[k].stop
            new = layout[start:end]
            tokens = None if inputs is None else _for_both(inputs, guided)
            front = _for_both(prefix.tokens_BPC, guided) if prefix is not None and is_first else None
            mask = self._mask(new, num_prefix, dropped_B, is_first, end)
            first_scale = 0 if is_first else k
            spans = [(settings[0][0], num_prefix)] if is_first else []  # a prefix enters with the first scale
            spans += [(settings[j][0], self.schedule.num_tokens_per_scale[j]) for j in range(first_scale, k + 1)]
            mix = _mix_after_blocks(spans, options.insertion_layers, len(cache), batch_size)
            asked = slice(len(new) - self.schedule.num_tokens_per_scale[k], None)
            hidden = self.transformer.hidden(tokens, prepared, new, mask, cache, mix, asked, front)
            logits[k] = self.transformer.predict(hidden, prepared)
            mixed = _mix_logits(logits[k], cfg if 0 in options.insertion_layers else 1.0, batch_size) / tau
            mixtures.append(mixed)
            uniform = None if noise is None else noise(k, (*mixed.shape[:2], *head.draw_shape()))
            chosen = head.select(mixed, uniform, options.top_k, options.top_p)
            codes = total.add(to_map(chosen, self.schedule.scales[k]))
            inputs = total.next_input()
            if self.schedule.ends_target(k):
                targets.append(spread_nan(codes, *mixtures))
        return Generation(total.indices, spread_nan(total.codes, *mixtures), targets, logits, hidden)

    def _read(self, total: RunningSum, known: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        """Add the known scales; inputs of the scales up to the first unknown one (None: just the start)."""
        inputs, targets = [], []
        for k, indices in enumerate(known):
            codes = total.add(indices)
            if self.schedule.ends_target(k):
                targets.append(codes)
            if (following := total.next_input()) is not None:
                inputs.append(following)
        return torch.cat(inputs, dim=1) if inputs else None, targets

    def _mask(
        self, new: TokenLayout, num_prefix: int, dropped_B: Tensor | None, is_first: bool, num_keys: int
    ) -> Tensor | BlockCausal | None:
        """What the tokens of a pass see of each other and of those before them.

        Args:
            new: tokens of the pass.
            num_prefix: how many of the sequence's first tokens are a prefix.
            dropped_B: samples that must not see the prefix, or None.
            is_first: whether this is the first pass, which may hold the prefix and several scales.
            num_keys: tokens so far, those of the pass included.
        """
        if is_first and dropped_B is None:
            return BlockCausal.of(new)
        if dropped_B is None:
            return None
        is_prefix_L = torch.arange(num_keys, device=dropped_B.device) < num_prefix
        if is_first:
            return prefix_causal_mask(new.levels_L, is_prefix_L, dropped_B)
        return ~(dropped_B[:, None, None, None] & is_prefix_L)


def _for_both(x: Tensor, guided: bool) -> Tensor:
    """A batch for the conditional half, and for the other where there is one."""
    return x.repeat(2, 1, 1) if guided else x


def _mix_logits(raw: Tensor, cfg: float, batch_size: int) -> Tensor:
    """Guidance on logits: cfg * conditional + (1 - cfg) * unconditional."""
    conditional = raw[:batch_size]
    return conditional if cfg == 1 else cfg * conditional + (1 - cfg) * raw[batch_size:]


def _mix_after_blocks(
    spans: Sequence[tuple[float, int]], insertion_layers: tuple[int, ...], depth: int, batch_size: int
) -> Callable[[int, Tensor], Tensor] | None:
    """Guidance on the outputs of the blocks that negative insertion layers name, written to both halves of the batch.

    Spans are guidance and number of consecutive tokens: a pass may read several known scales, each with its own.
    """
    numbers = {depth + layer for layer in insertion_layers if layer < 0}
    if not numbers or all(cfg == 1 for cfg, _ in spans):
        return None

    def mixed(x_BLC: Tensor, cfg: float) -> Tensor:
        return x_BLC if cfg == 1 else (cfg * x_BLC[:batch_size] + (1 - cfg) * x_BLC[batch_size:]).repeat(2, 1, 1)

    def mix(number: int, x_BLC: Tensor) -> Tensor:
        if number not in numbers:
            return x_BLC
        if number == depth - 1:  # hands on the tokens of the last scale alone
            return mixed(x_BLC, spans[-1][0])
        parts = x_BLC.split([count for _, count in spans], dim=1)
        return torch.cat([mixed(part, cfg) for part, (cfg, _) in zip(parts, spans, strict=True)], dim=1)

    return mix
