"""One step beside scale-by-scale generation with the same network: what each computes, and how long it takes.

One step sends the tokens of all scales through the network once, behind them those of the degraded image (the long
input). Scale by scale sends as many, a scale at a time; guidance sends them twice; without a cache every scale sends
all coarser ones again. So a ratio of times has causes that are counted apart: tokens and operations, and passes.

Shapes: `B` batch, `L` tokens, `T` text tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from varestorer.evaluation.speed.operations import attention, linear, text_flops, transformer_flops
from varestorer.systems.acceleration import MOST_COMPILATIONS, BatchGraphs
from varestorer.systems.varestorer import VARestorer
from varestorer.tokenizer import ScaleSchedule
from varestorer.transformer import TransformerConfig
from varestorer.transformer.generation import Generation, MultiStepGenerator, Prefix, SamplingOptions
from varestorer.transformer.layout import BlockCausal, PositionRule, pyramid_layout
from varestorer.transformer.model import PreparedCondition
from varestorer.utils.errors import UsageError
from varestorer.utils.timing import Timing, in_turns

GUIDANCE = 4.0
"""Strength of guidance; any but 1 costs the same."""

WORDS = {
    "one": ("short", "compile", "graphs"),
    "multi": ("cfg", "prefix", "nocache", "compile", "graphs"),
}


@dataclass(frozen=True)
class Variant:
    """A way to generate.

    Attributes:
        name: its words joined by "+", see `parse`.
        words: without the first.
        is_one_step: whether all scales come at once.
    """

    name: str
    words: frozenset[str]
    is_one_step: bool

    @classmethod
    def parse(cls, name: str) -> Variant:
        """A variant by its name, such as `multi+cfg+graphs`.

        Args:
            name: "one", all scales at once, with "short": without the degraded image's tokens behind them; or "multi",
                scale by scale, with "cfg": guidance, a batch of two; "prefix": the degraded image's tokens in front;
                "nocache": every scale reads all coarser ones again. Both with "compile" or "graphs".

        Raises:
            UsageError: anything else.
        """
        first, *words = name.split("+")
        if first not in WORDS or not set(words) <= set(WORDS[first]):
            choices = "; ".join(f"{kind} with some of {', '.join(known)}" for kind, known in WORDS.items())
            raise UsageError(f"a variant of what=generate is {choices}, joined by +; got {name!r}")
        return cls(name, frozenset(words), first == "one")


@dataclass(frozen=True)
class Counts:
    """What generating costs, for a batch.

    Attributes:
        tokens: that pass the network, both halves of a guided batch together.
        passes: through the network, one after the other.
        flops: of the network and its text path, two for a multiplication with its addition.
    """

    tokens: int
    passes: int
    flops: int


def default_variants(device: torch.device, has_long_input: bool) -> list[str]:
    """Best against best, and the slower ways that others are compared with; one step comes first."""
    short = ["one+short"] if has_long_input else []
    best = ["one+graphs", "multi+graphs", "multi+cfg+graphs"] if device.type == "cuda" else []
    slow = ["multi", "multi+cfg", "multi+cfg+prefix", "multi+cfg+nocache", "multi+cfg+prefix+nocache"]
    return [*best, "one", *short, *slow]


def count(system: VARestorer, variant: Variant, batch_size: int, num_text: int) -> Counts:
    """Tokens, passes and operations of a variant, adapters merged.

    Args:
        system: whose sizes count.
        variant: what is counted.
        batch_size: images.
        num_text: T.
    """
    sizes, samples = system.transformer.config, batch_size * (2 if "cfg" in variant.words else 1)
    passes = _passes(system.schedule, variant, system.student_config.long_input)
    flops = text_flops(sizes, num_text) + sum(_pass_flops(sizes, one, num_text) for one in passes)
    return Counts(samples * sum(one.tokens for one in passes), len(passes), samples * flops)


@dataclass(frozen=True)
class _Pass:
    """A pass of one sample through the network.

    Attributes:
        tokens: that enter.
        outputs: that leave the last block.
        pairs: of a token and one that it is compared with, in a block.
        output_pairs: in the last block, where only outputs ask.
        has_start: whether the start token, which has no input, is among them.
        num_ready: tokens of a prefix, which were embedded before.
    """

    tokens: int
    outputs: int
    pairs: int
    output_pairs: int
    has_start: bool = True
    num_ready: int = 0


def _passes(schedule: ScaleSchedule, variant: Variant, has_long_input: bool) -> list[_Pass]:
    """The passes of a variant; one whose scales do not see later ones compares as `BlockCausal` does."""
    num_tokens, image = schedule.num_tokens, schedule.num_tokens_per_scale[-1]
    if variant.is_one_step:
        entering = num_tokens + (image if has_long_input and "short" not in variant.words else 0)
        return [_Pass(entering, num_tokens, entering**2, num_tokens * entering)]
    ends = [tokens.stop for tokens in schedule.slices]
    if "nocache" not in variant.words:
        ahead = image if "prefix" in variant.words else 0
        first = ends[0] + ahead
        passes = [_Pass(first, ends[0], first**2, ends[0] * first, num_ready=ahead)]
        for new, end in zip(schedule.num_tokens_per_scale[1:], ends[1:], strict=True):
            passes.append(_Pass(new, new, new * (end + ahead), new * (end + ahead), has_start=False))
        return passes
    pairs = zip(ends, schedule.num_tokens_per_scale, strict=True)
    if "prefix" in variant.words:
        return [_Pass(end + image, new, (end + image) ** 2, new * (end + image), num_ready=image) for end, new in pairs]
    layout = pyramid_layout(schedule, PositionRule("rope", 4), torch.device("cpu"))

    def num_pairs(asked: slice, end: int) -> int:
        calls = BlockCausal.of(layout[:end]).calls(asked, end)
        return sum((asking.stop - asking.start) * keys for asking, keys, _ in calls)

    return [_Pass(e, new, num_pairs(slice(e), e), num_pairs(slice(e - new, e), e)) for e, new in pairs]


def _pass_flops(sizes: TransformerConfig, one: _Pass, num_text: int) -> int:
    """Operations of one pass, the text prepared."""
    width = sizes.width
    alone = transformer_flops(sizes, one.tokens, num_text, one.outputs) - text_flops(sizes, num_text)
    alone -= linear(one.num_ready, sizes.latent_width, width)
    if not one.has_start:
        alone += linear(1, sizes.latent_width, width)
    blocks = (sizes.depth - 1) * attention(1, one.pairs - one.tokens**2, width)
    return alone + blocks + attention(1, one.output_pairs - one.outputs * one.tokens, width)


def runner(system: VARestorer, variant: Variant, lq_B3HW: Tensor) -> Callable[[], Tensor]:
    """The work of a variant: from the degraded image's tokens to the summed codes (B, Z, h, w), greedy.

    The text is the null text, prepared beforehand, as that of any fixed prompt can be.

    Args:
        system: adapters merged, or none: the same weights stand for student and teacher.
        variant: what to run.
        lq_B3HW: degraded images in [0, 1] of side `tile`.
    """
    network = _compiled(system) if "compile" in variant.words else system
    with torch.inference_mode():
        work = _one_step(network, variant, lq_B3HW) if variant.is_one_step else _multi_step(network, variant, lq_B3HW)
    if "compile" in variant.words:
        with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=MOST_COMPILATIONS):
            work()
    if "graphs" in variant.words:
        graphs, eager = BatchGraphs(), work
        return torch.inference_mode()(lambda: graphs(eager))
    return torch.inference_mode()(work)


def _one_step(system: VARestorer, variant: Variant, lq_B3HW: Tensor) -> Callable[[], Tensor]:
    condition = system.condition(lq_B3HW)
    tokens, layout = condition.tokens_BLZ, condition.layout
    if "short" in variant.words:
        tokens = condition.pyramid.inputs()
        layout = system.transformer.layout(system.schedule, tokens.device)
    text, asked = system.transformer.prepare(system.null_text(len(lq_B3HW))), slice(0, system.schedule.num_tokens)

    def work() -> Tensor:
        return system.codes(system.transformer.head.select(system.transformer(tokens, text, layout, asked=asked)))

    return work


def _multi_step(system: VARestorer, variant: Variant, lq_B3HW: Tensor) -> Callable[[], Tensor]:
    generator = MultiStepGenerator(system.transformer, system.tokenizer.quantizer, system.schedule)
    options = SamplingOptions(cfg=GUIDANCE if "cfg" in variant.words else 1.0)
    text = generator.prepare(system.null_text(len(lq_B3HW)), options.is_guided)
    prefix = system.prefix_of(system.condition(lq_B3HW).pyramid) if "prefix" in variant.words else None
    if "nocache" in variant.words:
        return lambda: generate_without_cache(generator, text, options, prefix).codes
    return lambda: generator(text, options, prefix=prefix).codes


def generate_without_cache(
    generator: MultiStepGenerator, text: PreparedCondition, options: SamplingOptions, prefix: Prefix | None = None
) -> Generation:
    """The generator's greedy result the slow way: every scale sends all coarser ones through the network again."""
    result = generator(text, options, prefix=prefix, num_scales=1)
    for number in range(2, len(generator.schedule) + 1):
        result = generator(text, options, known=result.indices, prefix=prefix, num_scales=number)
    return result


def _compiled(system: VARestorer) -> VARestorer:
    """A twin with compiled blocks on the same weights."""
    shared = {id(tensor): tensor for tensor in [*system.parameters(), *system.buffers()]}
    twin = copy.deepcopy(system, shared)
    for block in twin.transformer.blocks:
        block.compile(dynamic=False)
    return twin


def measure_generation(
    system: VARestorer, variants: Mapping[str, Variant], lq_B3HW: Tensor, repeats: int, warmup: int
) -> dict[str, Timing]:
    """Seconds of each variant for these images, in turns."""
    works = {name: runner(system, variant, lq_B3HW) for name, variant in variants.items()}
    return in_turns(works, repeats, warmup, lq_B3HW.device)
