"""What one step and scale-by-scale generation cost, counted, and the report on it."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from varestorer.evaluation.speed.generation import (
    Variant,
    count,
    default_variants,
    measure_generation,
    runner,
)
from varestorer.evaluation.speed.generation_report import (
    Measured,
    generation_content,
    generation_text,
    write_generation_bars,
)
from varestorer.evaluation.speed.operations import text_flops
from varestorer.systems.varestorer import VARestorer
from varestorer.utils.errors import UsageError
from varestorer.utils.timing import Timing

ALL = [name for device in ("cpu", "cuda") for name in default_variants(torch.device(device), has_long_input=True)]
EAGER = sorted({name for name in ALL if "graphs" not in name})


def images(system: VARestorer) -> torch.Tensor:
    return torch.rand(2, 3, system.tile, system.tile, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", EAGER)
def test_formulas_count_what_torch_counts(tiny_system: VARestorer, name: str) -> None:
    system, variant = tiny_system.merge_adapters().to("meta"), Variant.parse(name)
    work = runner(system, variant, images(system).to("meta"))
    with FlopCounterMode(display=False) as counter:
        work()
    num_text = len(system.transformer.condition.null_features)
    samples = 4 if "cfg" in variant.words else 2
    expected = count(system, variant, 2, num_text).flops - samples * text_flops(system.transformer.config, num_text)
    assert counter.get_total_flops() == expected


def test_the_counts_of_the_paper_s_network() -> None:
    with torch.device("meta"):
        system = VARestorer({"size": "0.25M"}, {}, {}, {"lora_rank": 0})
    counts = {name: count(system, Variant.parse(name), 1, 512) for name in ("one", "one+short", "multi+cfg")}
    assert [(found.tokens, found.passes) for found in counts.values()] == [(3545, 1), (2521, 1), (2 * 2521, 10)]
    slow = count(system, Variant.parse("multi+cfg+prefix+nocache"), 1, 512)
    assert slow.tokens == 2 * sum(end.stop + 1024 for end in system.schedule.slices)
    assert 1.2 < counts["multi+cfg"].flops / counts["one"].flops < 1.5
    assert 8 < slow.flops / counts["one"].flops < 10


@pytest.mark.parametrize("name", ["two", "one+cfg", "multi+short", "multi+fast", ""])
def test_an_unknown_variant_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="what=generate is one with some of short"):
        Variant.parse(name)


def test_every_variant_of_the_default_runs_and_is_reported(tiny_system: VARestorer, tmp_path: Path) -> None:
    system = tiny_system.merge_adapters()
    variants = {name: Variant.parse(name) for name in default_variants(torch.device("cpu"), has_long_input=True)}
    timings = measure_generation(system, variants, images(system), repeats=2, warmup=0)
    rows = [Measured(v, 2, count(system, v, 2, 3), timings[name]) for name, v in variants.items()]
    text = generation_text(rows, matrix_rate=1e9)
    assert all(name in text for name in variants)
    assert {run["variant"] for run in generation_content(rows, 1e9)["runs"]} == set(variants)
    json.dumps(generation_content(rows, 1e9))
    write_generation_bars(tmp_path / "bars.png", rows, "toy")
    assert (tmp_path / "bars.png").stat().st_size > 1000


def test_the_report_names_the_causes_and_the_claim(tiny_system: VARestorer) -> None:
    def measured(name: str, seconds: float) -> Measured:
        variant = Variant.parse(name)
        return Measured(variant, 1, count(tiny_system, variant, 1, 3), Timing([seconds]))

    rows = [measured("one", 1.0), measured("multi", 1.5), measured("multi+cfg", 2.0), measured("multi+nocache", 9.0)]
    text = generation_text(rows, 1e9)
    assert "multi+cfg takes 2.00 times as long as one" in text
    assert "in 3 passes against 1" in text
    assert "nearest to 10 times: multi+nocache, 9.0 times as long" in text
