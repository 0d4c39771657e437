"""`benchmark what=generate`: one step beside scale-by-scale generation with the same network, in turns.

One step sends the tokens of all scales through the network once, behind them those of the degraded image (the long
input). Scale by scale sends as many, a scale at a time; guidance sends them twice; without a cache every scale sends
all coarser ones again. So a ratio of times has causes that are counted apart: tokens and operations, and passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varestorer.benchmark.counting import Count, as_on_cuda, count
from varestorer.benchmark.measure import Measured, Work
from varestorer.benchmark.networks import Source, sharing, words_of
from varestorer.benchmark.report import Report, Run
from varestorer.benchmark.roofline import Rates
from varestorer.systems.acceleration import BatchGraphs, compile_parts
from varestorer.systems.varestorer import VARestorer
from varestorer.transformer.generation import Generation, MultiStepGenerator, Prefix, SamplingOptions
from varestorer.transformer.model import PreparedCondition
from varestorer.utils.device import gains_from_bf16
from varestorer.utils.errors import UsageError
from varestorer.utils.seeds import torch_generator

GUIDANCE = 4.0  # any strength but 1 costs the same
CLAIMED = 10.0  # how many times as fast as generation scale by scale the paper calls one step


def run(report: Report, source: Source, device: torch.device, options: Any, folder: Path) -> bool:
    """Measure, print and write; see `restore.run`."""
    blank = source.blank(merged=True)
    if not isinstance(blank, VARestorer):
        raise UsageError(f"what=generate compares ways to use a network of VARestorer, and {source.name} is another")
    names = options.variants or default_variants(device, blank.student_config.long_input)
    chosen = {name: words_of("generate", name) for name in names}
    precision = "bf16" if gains_from_bf16(device) else "fp32"
    rates = Rates.of(device, [precision])
    report.show_rates(rates)
    system = source.system(device, merged=True, precision=precision)
    assert isinstance(system, VARestorer)
    blank.set_precision(precision)
    side = system.tile
    firsts: dict[int, Run] = {}

    def works_of(batch: int) -> dict[str, Work]:
        drawn = torch.rand(batch, 3, side, side, generator=torch_generator(0, "generate")).to(device)
        return {name: runner(system, words, drawn) for name, words in chosen.items()}

    def run_of(name: str, batch: int, measured: Measured) -> Run:
        counts, tokens, passes = counted(blank, chosen[name], batch)
        made = Run(name, batch, precision, measured, counts, {"tokens": tokens, "passes": passes})
        first = firsts.setdefault(batch, made)
        made.more.update({"x FLOP": made.flops / first.flops, "x ms": made.seconds / first.seconds})
        return made

    runs = report.compare(works_of, run_of, rates, device, options)
    for batch in firsts:
        report.say("\n".join(explanation([run for run in runs if run.batch == batch])))
    report.write(folder, runs, rates, {})
    return len(runs) == len(chosen) * len(options.batch)


def default_variants(device: torch.device, has_long_input: bool) -> list[str]:
    """Best against best, and the slower ways that others are compared with; one step comes first."""
    short = ["one+short"] if has_long_input else []
    best = ["one+graphs", "multi+graphs", "multi+cfg+graphs"] if device.type == "cuda" else []
    slow = ["multi", "multi+cfg", "multi+cfg+prefix", "multi+cfg+nocache", "multi+cfg+prefix+nocache"]
    return [*best, "one", *short, *slow]


def counted(blank: VARestorer, words: frozenset[str], batch: int) -> tuple[dict[str, Count], int, int]:
    """What a variant costs, on the meta device: its parts, the tokens that pass the network, and its passes."""
    entering: list[int] = []
    images_B3tt = torch.empty(batch, 3, blank.tile, blank.tile, device="meta")
    with as_on_cuda():
        work = runner(blank, words - {"compile", "graphs"}, images_B3tt)
        hook = blank.transformer.blocks[0].register_forward_pre_hook(
            lambda _, inputs: entering.append(inputs[0].shape[0] * inputs[0].shape[1])
        )
        counts = count(work)
        hook.remove()
    return counts, sum(entering), len(entering)


def runner(system: VARestorer, words: frozenset[str], lq_B3HW: Tensor) -> Callable[[], Tensor]:
    """The work of a variant: from the degraded image's tokens to the summed codes (B, Z, h, w), greedy.

    The text is the null text, prepared beforehand, as that of any fixed prompt can be.

    Args:
        system: adapters merged, or none: the same weights stand for student and teacher.
        words: of the variant. "one": all scales at once, with "short": without the degraded image's tokens behind them;
            or "multi": scale by scale, with "cfg": guidance, a batch of two; "prefix": the degraded image's tokens in
            front; "nocache": every scale reads all coarser ones again. Both with "compile" or "graphs".
        lq_B3HW: degraded images in [0, 1] of side `tile`.
    """
    if "compile" in words:
        system = sharing(system)  # type: ignore[assignment]
        compile_parts(*system.transformer.blocks)
    with torch.inference_mode():
        work = _one_step(system, words, lq_B3HW) if "one" in words else _multi_step(system, words, lq_B3HW)
    if "graphs" in words:
        graphs = BatchGraphs()
        return torch.inference_mode()(lambda: graphs(work))
    return torch.inference_mode()(work)


def _one_step(system: VARestorer, words: frozenset[str], lq_B3HW: Tensor) -> Callable[[], Tensor]:
    condition = system.condition(lq_B3HW)
    tokens, layout = condition.tokens_BLZ, condition.layout
    if "short" in words:
        tokens = condition.pyramid.inputs()
        layout = system.transformer.layout(system.schedule, tokens.device)
    text, asked = system.transformer.prepare(system.null_text(len(lq_B3HW))), slice(0, system.schedule.num_tokens)

    def work() -> Tensor:
        return system.codes(system.transformer.head.select(system.transformer(tokens, text, layout, asked=asked)))

    return work


def _multi_step(system: VARestorer, words: frozenset[str], lq_B3HW: Tensor) -> Callable[[], Tensor]:
    generator = MultiStepGenerator(system.transformer, system.tokenizer.quantizer, system.schedule)
    options = SamplingOptions(cfg=GUIDANCE if "cfg" in words else 1.0)
    text = generator.prepare(system.null_text(len(lq_B3HW)), options.is_guided)
    prefix = system.prefix_of(system.condition(lq_B3HW).pyramid) if "prefix" in words else None
    if "nocache" in words:
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


def explanation(runs: Sequence[Run]) -> list[str]:
    """Sentences on runs of one batch, the first being the one that all are compared with.

    Best against best by its causes, and which variant comes nearest to the paper's ratio.
    """
    first, others = runs[0], [run for run in runs if run.variant.startswith("multi")]
    if not others:
        return []
    best = min([run for run in others if "cfg" in run.variant] or others, key=lambda run: run.seconds)
    nearest = min(others, key=lambda run: abs(math.log(run.seconds / first.seconds / CLAIMED)))
    ratio, operations = best.seconds / first.seconds, best.flops / first.flops
    return [
        f"best scale by scale: {best.variant} takes {ratio:.2f} times as long as {first.variant}: {operations:.2f} "
        f"times the operations ({best.more['tokens']} tokens against {first.more['tokens']}), at "
        f"{ratio / operations:.2f} times the time for each, in {best.more['passes']} passes against "
        f"{first.more['passes']}",
        f"nearest to {CLAIMED:.0f} times: {nearest.variant}, {nearest.seconds / first.seconds:.1f} times as long, "
        f"{nearest.flops / first.flops:.1f} times the operations",
    ]
