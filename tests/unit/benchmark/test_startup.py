"""How long programs take to start, and what they import."""

import pytest

from varestorer.benchmark.measure import Measured, Timing
from varestorer.benchmark.startup import BASE, heavy_modules, startup_content
from varestorer.utils.errors import UserError


def test_heavy_imports_are_seen() -> None:
    assert heavy_modules(["-c", "import matplotlib"]) == ["matplotlib"]
    assert heavy_modules(["-c", "import varestorer"]) == []
    with pytest.raises(UserError, match="failed: .*no_such_module"):
        heavy_modules(["-c", "import no_such_module"])


def test_the_report_holds_ratios_and_imports() -> None:
    found = {BASE: Measured(Timing([2.0, 2.2, 1.8])), "import varestorer": Measured(Timing([0.1]))}
    content = startup_content(found, {BASE: ["torch"], "import varestorer": []})
    assert content["import varestorer"]["ratio_to_import_torch"] == pytest.approx(0.05)
    assert content[BASE]["spread"] == pytest.approx(0.2) and content[BASE]["heavy_imports"] == ["torch"]
