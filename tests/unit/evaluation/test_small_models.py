"""Small models beside each other."""

from pathlib import Path

import pytest

from varestorer.evaluation.paper_tables import EvaluationRecord
from varestorer.evaluation.small_models import open_models, table_small
from varestorer.systems.varestorer import VARestorer
from varestorer.utils.errors import UsageError


def record(label: str, *scores: float, dataset: str = "folder") -> EvaluationRecord:
    mean = sum(scores) / len(scores)
    entry = {"id": "lpips", "mean": mean, "ci95": [min(scores), max(scores)]}
    summary = {"dataset": dataset, "protocol": "varestorer", "n": len(scores), "metrics": {"lpips": entry}}
    named = {str(n): score for n, score in enumerate(scores)}
    return EvaluationRecord(label, Path(label), summary | {"unavailable": {}}, {"lpips": named})


def test_scores_and_costs_stand_in_one_row(tiny_system: VARestorer, tmp_path: Path) -> None:
    tiny_system.save_pretrained(tmp_path / "tiny")
    card = tmp_path / "tiny" / "README.md"
    card.write_text("---\nlicense: apache-2.0\n---\n")
    models = open_models({"tiny": str(tmp_path / "tiny"), "resized": "bicubic"}, {"resized": "MIT"})
    seconds = {"tiny": 2.0, "resized": 0.5}
    table, pairs = table_small([record("tiny", 0.2, 0.3), record("resized", 0.5, 0.4)], models, seconds)
    tiny, resized = (row.cells for row in table.rows)
    assert tiny["lpips"] == 0.25 and tiny["lpips, 95 %"] == "0.2000 to 0.3000" and tiny["license"] == "apache-2.0"
    files = sum(file.stat().st_size for file in (tmp_path / "tiny").glob("*.safetensors"))
    assert tiny["seconds"] == 2 and resized["seconds"] == 0.5
    assert tiny["MB"] == files / 1e6 and tiny["parameters (M)"] > 0.05  # type: ignore[operator]
    assert resized["MB"] is None and resized["license"] == "MIT" and "dists" not in resized
    assert pairs.rows[0].cells["difference"] == "-0.2000"


def test_what_has_no_model_or_no_scores_has_dashes() -> None:
    (table,) = table_small([record("a", 0.2, 0.3)], open_models({"b": "bicubic"}, {}), {})
    assert [row.cells["model"] for row in table.rows] == ["a", "b"] and table.rows[1].cells["seconds"] is None


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="licenses= names x, and models= does not"):
        open_models({}, {"x": "MIT"})
    with pytest.raises(UsageError, match="one data set, got runs= on folder, realsr"):
        table_small([record("a", 0.2), record("a", 0.2, dataset="realsr")], {}, {})
