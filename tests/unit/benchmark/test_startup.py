"""How long programs take to start, and what they import."""

import pytest

from varestorer.benchmark.measure import Measured, Timing
from varestorer.benchmark.startup import BASE, heavy_modules, startup_table
from varestorer.evaluation.tables import to_text
from varestorer.utils.errors import UserError


def test_heavy_imports_are_seen() -> None:
    assert heavy_modules(["-c", "import matplotlib"]) == ["matplotlib"]
    assert heavy_modules(["-c", "import varestorer"]) == []
    with pytest.raises(UserError, match="failed: .*no_such_module"):
        heavy_modules(["-c", "import no_such_module"])


def test_the_report_holds_ratios_and_imports() -> None:
    found = {BASE: Measured(Timing([2.0, 2.2, 1.8])), "import varestorer": Measured(Timing([0.1]))}
    lines = to_text(startup_table(found, {BASE: ["torch"], "import varestorer": []})).splitlines()
    assert lines[1].split() == ["import", "torch", "2.000", "0.2000", "1.000", "torch"]
    assert lines[2].split() == ["import", "varestorer", "0.1000", "0.0000", "0.0500", "–"]
