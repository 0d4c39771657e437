"""What one step and scale-by-scale generation cost, counted and by formula, and the sentences on it."""

import pytest
import torch
from formulas import generation_flops

from varestorer.benchmark.counting import Count
from varestorer.benchmark.generate import counted, default_variants, explanation, runner
from varestorer.benchmark.measure import Measured, Timing
from varestorer.benchmark.networks import GRAMMAR, without_weights, words_of
from varestorer.benchmark.report import Run
from varestorer.systems.varestorer import VARestorer
from varestorer.utils.errors import UsageError

CPU = torch.device("cpu")
ALL = [name for device in ("cpu", "cuda") for name in default_variants(torch.device(device), has_long_input=True)]


@pytest.mark.parametrize("name", sorted({name for name in ALL if "graphs" not in name}))
def test_the_counter_agrees_with_the_formulas(tiny_system: VARestorer, name: str) -> None:
    words = words_of("generate", name)
    counts, tokens, passes = counted(without_weights(tiny_system).merge_adapters(), words, 2)  # type: ignore[arg-type]
    flops = sum(cost.flops for cost in counts.values())
    assert (flops, tokens, passes) == generation_flops(tiny_system, words, 2)


def test_the_counts_of_the_paper_s_network() -> None:
    with torch.device("meta"):
        system = VARestorer({"size": "0.25M"}, {}, {}, {"lora_rank": 0})
    found = {
        name: generation_flops(system, words_of("generate", name), 1) for name in ("one", "one+short", "multi+cfg")
    }
    assert [sizes[1:] for sizes in found.values()] == [(3545, 1), (2521, 1), (2 * 2521, 10)]
    slow = generation_flops(system, words_of("generate", "multi+cfg+prefix+nocache"), 1)
    assert slow[1] == 2 * sum(end.stop + 1024 for end in system.schedule.slices)
    assert 1.2 < found["multi+cfg"][0] / found["one"][0] < 1.5
    assert 8 < slow[0] / found["one"][0] < 10


@pytest.mark.parametrize("what", GRAMMAR)
@pytest.mark.parametrize("name", ["two", "one+cfg", "multi+short", "eager+eager+fast", "bf16+", ""])
def test_an_unknown_variant_is_refused(what: str, name: str) -> None:
    with pytest.raises(UsageError, match=rf"a variant of what={what} joins words by \+: .*; got"):
        words_of(what, name)


def test_every_variant_of_the_default_runs(tiny_system: VARestorer) -> None:
    images = torch.rand(2, 3, tiny_system.tile, tiny_system.tile)
    system = tiny_system.merge_adapters()
    shapes = {runner(system, words_of("generate", name), images)().shape for name in default_variants(CPU, True)}
    assert shapes == {(2, 8, 4, 4)}


def test_the_sentences_name_the_causes_and_the_claim() -> None:
    def run(name: str, seconds: float, passes: int = 3) -> Run:
        counts = {"transformer": Count(int(10 * seconds), 0)}
        return Run(name, 1, "fp32", Measured(Timing([seconds])), counts, {"tokens": 21, "passes": passes})

    runs = [run("one", 1.0, 1), run("multi", 1.5), run("multi+cfg", 2.0), run("multi+nocache", 9.0)]
    text = "\n".join(explanation(runs))
    assert "multi+cfg takes 2.00 times as long as one: 2.00 times the operations" in text
    assert "in 3 passes against 1" in text
    assert "nearest to 10 times: multi+nocache, 9.0 times as long" in text
    assert explanation(runs[:1]) == []
