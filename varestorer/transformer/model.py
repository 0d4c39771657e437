"""The visual autoregressive transformer; teacher and student are this one network.

Infinity (section 3) with text, VAR (section 3) with classes; VARSR and H-VAR put a prefix of image tokens in front.

Shapes: `B` batch, `P` tokens of a prefix, `L` tokens of a sequence, `C` width, `Z` latent width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from varestorer.tokenizer.schedule import Scale, ScaleSchedule
from varestorer.transformer.adapters import adapters_off, switches
from varestorer.transformer.blocks import ALL, Block, BlockContext, LayerCache, ffn_width, modulate
from varestorer.transformer.conditions import (
    ClassCondition,
    ClassLabels,
    ConditionInput,
    Context,
    TextCondition,
    TextFeatures,
    distinct_rows,
)
from varestorer.transformer.heads import BitHead, CodeHead
from varestorer.transformer.layout import (
    GRID_REDUCTIONS,
    POSITIONS,
    BlockCausal,
    LearnedPositions,
    PositionRule,
    TokenLayout,
    pyramid_layout,
)
from varestorer.utils.watch import watch

# Called with (block number, tokens) after each block; returns the tokens that go on.
AfterBlock = Callable[[int, Tensor], Tensor]

# Parameters of more than one dimension that weight decay leaves alone (Infinity's and VARSR's lists).
UNDECAYED = re.compile(
    r"(^|\.)(condition\.(null_features|pool\.query)|start|positions\.table|level_embed\.weight|modulation|log_scale)$"
)


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a transformer; the defaults are Infinity-2B (2,204,564,032 parameters).

    Attributes:
        width: C.
        depth: number of blocks.
        num_heads: heads of self and cross attention.
        latent_width: Z, channels of the codes that come in, and bits per token where there is no vocabulary.
        vocabulary: V, entries of the codebook that are predicted; 0: bits.
        hidden_width: of the feed-forward; 0: four times the width, rounded to a multiple of 256.
        text_width: width of the text encoder's features.
        text_length: rows of the learned null text.
        num_classes: learned vectors of the condition; 0: the condition is text.
        num_levels: rows of the level embedding; at least one more than the scales of a schedule with a long input.
        positions: see `layout.PositionRule`.
        position_size: side of the constant or learned grid, or rows of the learned table.
        position_reduction: how a learned grid is reduced to a scale: "area" or "bilinear" (antialiased).
        start_rows: learned rows of the first tokens: 1 of the start token, or those of a prefix too.
        prefix_width: channels of latents that stand in front as a prefix, through a linear layer of their own (H-VAR);
            0: none.
        gamma_init: factor on the initial gates of the blocks (from scratch; Infinity's 5e-6 suits long runs).
    """

    width: int = 2048
    depth: int = 32
    num_heads: int = 16
    latent_width: int = 32
    vocabulary: int = 0
    hidden_width: int = 0
    text_width: int = 2048
    text_length: int = 512
    num_classes: int = 0
    num_levels: int = 15
    positions: str = "rope"
    position_size: int = 32
    position_reduction: str = "area"
    start_rows: int = 1
    prefix_width: int = 0
    gamma_init: float = 5e-6

    def __post_init__(self) -> None:
        if self.width % self.num_heads or (self.width // self.num_heads) % 4:
            raise ValueError(
                f"width / num_heads must be a multiple of 4 (2-D rotary pairs), got {self.width} / {self.num_heads}"
            )
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, got {self.positions}")
        if self.position_reduction not in GRID_REDUCTIONS:
            known = ", ".join(GRID_REDUCTIONS)
            raise ValueError(f"position_reduction must be one of {known}, got {self.position_reduction}")

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.width // self.num_heads

    @property
    def position_rule(self) -> PositionRule:
        """Where the tokens of this network stand."""
        return PositionRule(self.positions, self.head_dim, self.position_size)


@dataclass(frozen=True)
class PreparedCondition:
    """All that a transformer makes of a condition before it sees tokens: computed once, used for any number of passes.

    It belongs to the network as it was: with its adapters on or off, in its precision, with its weights. The network
    refuses it after the adapters are switched or merged or the precision changes; after other changes of the weights
    it has to be made again by the caller.

    Attributes:
        cond_BC: pooled text or class. Prepared for one prompt, it serves tokens of any batch.
        blocks: what each block needs.
        head_B1C: gain and shift of the head's norm.
        state: of the network, see `VARTransformer.state_of_now`.
    """

    cond_BC: Tensor
    blocks: tuple[BlockContext, ...]
    head_B1C: tuple[Tensor, Tensor]
    state: tuple[object, ...]

    def for_each(self, count: int) -> PreparedCondition:
        """The condition of a batch in which each row stands `count` times, one after the other."""

        def repeated(rows: Tensor) -> Tensor:
            return rows.repeat_interleave(count, dim=0)

        def both(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return repeated(pair[0]), repeated(pair[1])

        if any(block.memory is not None for block in self.blocks):
            raise ValueError("a text is prepared for its batch: cross attention's memory is not repeated")
        blocks = []
        for block in self.blocks:
            pairs = both(block.gammas_B1C), both(block.gains_B1C), both(block.shifts_B1C)
            blocks.append(BlockContext(*pairs, block.self_constants, None))
        return PreparedCondition(repeated(self.cond_BC), tuple(blocks), both(self.head_B1C), self.state)


class VARTransformer(nn.Module):
    """Predicts the bits or the entry of every token. The mask and the layout are arguments: scale-causal for the
    teacher, none for the student."""

    condition: Any  # what it has beside `forward` and `null` is its own

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.condition = (
            ClassCondition(config.num_classes, width)
            if config.num_classes
            else TextCondition(config.text_width, config.text_length, width)
        )
        self.start = nn.Parameter(torch.zeros(1, config.start_rows, width))
        self.word_embed = nn.Linear(config.latent_width, width)
        # drawing an embedding's weights on the meta device would import sympy and torch's compiler: seconds
        self.level_embed = nn.Embedding.from_pretrained(torch.zeros(config.num_levels, width), freeze=False)
        self.positions = None
        if config.positions in ("rows", "grid"):
            is_grid = config.positions == "grid"
            num_rows = config.position_size ** (2 if is_grid else 1)
            self.positions = LearnedPositions(num_rows, width, is_grid, config.position_reduction)
        self.prefix_embed = nn.Linear(config.prefix_width, width) if config.prefix_width else None
        hidden = config.hidden_width or ffn_width(width)
        block = (width, config.num_heads, hidden, not config.num_classes)
        self.blocks = nn.ModuleList(Block(*block) for _ in range(config.depth))
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = CodeHead(width, config.vocabulary) if config.vocabulary else BitHead(width, config.latent_width)
        self.checkpoint_activations = False
        self.branch_factors_BD3: Tensor | None = None

    def layout(self, schedule: ScaleSchedule, device: torch.device, prefix: Scale | None = None) -> TokenLayout:
        """Where the tokens of all scales stand, behind those of a prefix map; see `layout.pyramid_layout`."""
        return pyramid_layout(schedule, self.config.position_rule, device, prefix)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights for training from scratch (VAR, appendix; Infinity's released code)."""
        std = math.sqrt(1 / (3 * self.config.width))
        for name, parameter in self.named_parameters():
            if ".lora_" in name:
                continue
            if name.endswith((".q_bias", ".v_bias", ".bias")):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            elif name.endswith("log_scale"):
                nn.init.constant_(parameter, math.log(4.0))
            elif not name.endswith(".modulation"):
                nn.init.trunc_normal_(parameter, std=std, a=-2, b=2, generator=generator)
        for block in cast(Iterable[Block], self.blocks):
            layers = [block.self_attention.proj, block.ffn.fc2]
            if block.cross_attention is not None:
                layers.insert(1, block.cross_attention.proj)
            for layer in layers:
                layer.weight.div_(math.sqrt(2 * self.config.depth))
            self._init_modulation(block.modulation, generator)
        self.head.weight.mul_(0.02)
        self.head_modulation.weight.mul_(0.5 if self.config.num_classes else 1e-3)

    def _init_modulation(self, modulation: nn.Parameter | nn.Linear, generator: torch.Generator | None) -> None:
        """Almost closed gates; other parts small. A layer of its own starts larger (VAR) than a shared one's rest."""
        gates = 2 * self.config.width
        if isinstance(modulation, nn.Linear):
            modulation.weight[:gates].mul_(self.config.gamma_init)
            modulation.weight[gates:].mul_(0.5)
        else:
            modulation.normal_(std=self.config.width**-0.5, generator=generator)
            modulation[:, :, :2].mul_(self.config.gamma_init)
            modulation[:, :, 2:].mul_(1e-3)

    @watch("transformer")
    def context(self, condition: ConditionInput | Context) -> Context:
        """What the blocks and the head are told of texts or classes."""
        if isinstance(condition, Context):
            return condition
        wanted = ClassLabels if self.config.num_classes else TextFeatures
        if not isinstance(condition, wanted):
            raise TypeError(f"this transformer is conditioned on {wanted.__name__}, got {type(condition).__name__}")
        context: Context = self.condition(condition)
        return context

    @watch("transformer")
    def prepare(self, condition: ConditionInput | Context) -> PreparedCondition:
        """Do all that depends on condition and weights alone; for weights that rest (no gradients are kept back)."""
        context = self.context(condition)
        with self.precision(context.cond_BC.device):
            blocks = tuple(block.prepare(context) for block in cast(Iterable[Block], self.blocks))
        head = self._head_norm(context.cond_BC)
        return PreparedCondition(context.cond_BC, blocks, head, self.state_of_now())

    def state_of_now(self) -> tuple[object, ...]:
        """What, beside the weights' values, decides what a condition becomes: precision, device, adapters."""
        block = cast(Block, self.blocks[0])
        bias = block.self_attention.v_bias
        return bias.dtype, bias.device, *switches(block)

    def embed(
        self,
        tokens_BLZ: Tensor | None,
        context: Context | PreparedCondition,
        layout: TokenLayout,
        prefix_BPC: Tensor | None = None,
    ) -> Tensor:
        """The sequence that enters block 0.

        Args:
            tokens_BLZ: inputs of the tokens, or None for the start token alone.
            context: of the condition.
            layout: of the whole sequence. Where it has one token more than prefix and `tokens_BLZ`, the start token
                (the condition plus a learned row) comes first, behind the prefix.
            prefix_BPC: ready-made tokens that stand in front.
        """
        tokens = None if tokens_BLZ is None else self.word_embed(tokens_BLZ)
        sizes = [0 if x is None else x.shape[1] for x in (prefix_BPC, tokens)]
        given = [x for x in (prefix_BPC, tokens) if x is not None]
        parts = [tokens] if tokens is not None else []
        if len(layout) == sum(sizes) + 1:
            batch_size = (given[0] if given else context.cond_BC).shape[0]
            first = context.cond_BC[:, None].expand(batch_size, -1, -1)
            if prefix_BPC is not None:
                first = torch.cat([prefix_BPC, first], dim=1)
            unlearned = first.shape[1] - self.start.shape[1]  # rows of a prefix that has no learned ones
            start = F.pad(self.start, (0, 0, unlearned, 0)) if unlearned else self.start
            parts.insert(0, first + start)
        elif len(layout) != sum(sizes):
            raise ValueError(f"layout has {len(layout)} tokens, the inputs {sum(sizes)} (or one less, for the start)")
        x_BLC = torch.cat(parts, dim=1) + self.level_embed(layout.levels_L)
        return x_BLC if self.positions is None else x_BLC + self.positions(layout)

    def forward(
        self,
        tokens_BLZ: Tensor | None,
        condition: ConditionInput | Context | PreparedCondition,
        layout: TokenLayout,
        mask: Tensor | BlockCausal | None = None,
        cache: list[LayerCache] | None = None,
        after_block: AfterBlock | None = None,
        asked: slice = ALL,
        prefix_BPC: Tensor | None = None,
    ) -> Tensor:
        """Logits of every token of the layout: `predict` of `hidden`.

        Args:
            tokens_BLZ: next-scale inputs (`TokenPyramid.inputs`, or what `PyramidConditioner` makes), see `embed`.
            condition: texts or classes, the context made from them, or all that is made from them (`prepare`).
            layout: level and position of each token.
            mask: `BlockCausal`, or (L, L_keys) bool, True where attention is allowed; None lets all see all.
            cache: one entry per block; keys and values are added to it and looked up in it.
            after_block: may change the tokens after each block (guidance inside the network).
            asked: tokens whose logits are wanted, which see the others still. The last block leaves out what only the
                others need.
            prefix_BPC: see `embed`.
        Returns:
            logits float32 of the tokens asked: (B, L, Z, 2), the pair [bit is 0, bit is 1]; or (B, L, V).
        Raises:
            ValueError: the condition was prepared by this network in another state.
        """
        context = condition if isinstance(condition, PreparedCondition) else self.context(condition)
        x_BLC = self.hidden(tokens_BLZ, context, layout, mask, cache, after_block, asked, prefix_BPC)
        return self.predict(x_BLC, context)

    @watch("transformer")
    def hidden(
        self,
        tokens_BLZ: Tensor | None,
        context: Context | PreparedCondition,
        layout: TokenLayout,
        mask: Tensor | BlockCausal | None = None,
        cache: list[LayerCache] | None = None,
        after_block: AfterBlock | None = None,
        asked: slice = ALL,
        prefix_BPC: Tensor | None = None,
    ) -> Tensor:
        """What leaves the last block, (B, L, C) of the tokens asked; arguments as for `forward`."""
        if isinstance(context, PreparedCondition) and context.state != self.state_of_now():
            raise ValueError("this text was prepared before adapters or precision changed: call prepare(text) again")
        x_BLC = self.embed(tokens_BLZ, context, layout, prefix_BPC)
        last = len(self.blocks) - 1
        with self.precision(x_BLC.device):
            for number, block in enumerate(self.blocks):
                factors = None if self.branch_factors_BD3 is None else self.branch_factors_BD3[:, number]
                of_block = context.blocks[number] if isinstance(context, PreparedCondition) else context
                past, wanted = cache[number] if cache else None, asked if number == last else ALL
                x_BLC = self._run(block, x_BLC, of_block, layout, mask, past, factors, wanted)
                if after_block is not None:
                    x_BLC = after_block(number, x_BLC)
        return x_BLC

    @watch("transformer")
    def predict(self, x_BLC: Tensor, context: Context | PreparedCondition) -> Tensor:
        """The head, always in float32, on tokens that left the last block."""
        head = context.head_B1C if isinstance(context, PreparedCondition) else self._head_norm(context.cond_BC)
        with _no_autocast(x_BLC.device):
            return self.head.logits(modulate(x_BLC.float(), *head))

    def precision(self, device: torch.device) -> AbstractContextManager:
        """What the blocks compute in; other parts may go along.

        Blocks kept in bfloat16 compute their matrix products in it, as the released ones do.
        """
        if cast(Block, self.blocks[0]).self_attention.v_bias.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def _run(self, block: nn.Module, *args: object) -> Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            # the backward pass computes the block again when `adapters_off` may have ended long ago
            again = adapters_off(block) if any(switches(block)) else nullcontext()
            checkpoint = torch.utils.checkpoint.checkpoint
            return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again))
        return block(*args)

    def _head_norm(self, cond_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Gain and shift of the norm before the head, (B, 1, C) float32."""
        with _no_autocast(cond_BC.device):
            cond_BC = distinct_rows(cond_BC).float()
            scale, shift = self.head_modulation(F.silu(cond_BC))[:, None].chunk(2, dim=-1)
            return 1 + scale, shift


def _no_autocast(device: torch.device) -> AbstractContextManager:
    """Float32, whatever the caller chose; the meta device, on which costs are counted, knows no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def branch_factors(uniform_BD3: Tensor, rate: float) -> Tensor:
    """Factor of each branch, (B, D, 3): 0 where it is dropped, else 1 / (1 - p), so that its mean is 1.

    Args:
        uniform_BD3: uniform noise in [0, 1).
        rate: p of the last block, in [0, 1]; it grows linearly from 0 in the first (stochastic depth).
    """
    rates = torch.linspace(0, rate, uniform_BD3.shape[1], device=uniform_BD3.device)[:, None]
    return (uniform_BD3 >= rates) / (1 - rates).clamp(min=1e-6)


@contextmanager
def dropped_paths(transformer: VARTransformer, factors_BD3: Tensor | None) -> Iterator[None]:
    """Multiply the branches of the transformer's blocks by these factors inside the `with`; None for no change."""
    transformer.branch_factors_BD3 = factors_BD3
    try:
        yield
    finally:
        transformer.branch_factors_BD3 = None
