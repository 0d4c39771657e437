"""The one door: bundles and runs of every paper's system open as what they are."""

import ast
import json
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_sizes import HVAR_SIZES, VARSR_SIZES

from varestorer.systems import SYSTEMS, load, system_class
from varestorer.systems.hvar import HVAR
from varestorer.systems.varestorer import VARestorer
from varestorer.systems.varsr import VARSR
from varestorer.utils.errors import UserError

PACKAGE = Path(__file__).parents[3] / "varestorer"


@pytest.fixture(params=list(SYSTEMS))
def system(request: pytest.FixtureRequest, tiny_system: VARestorer) -> Any:
    made = {
        "varestorer": lambda: tiny_system,
        "varsr": lambda: VARSR(**VARSR_SIZES),
        "hvar": lambda: HVAR(**HVAR_SIZES),
    }
    return made[request.param]().eval()


def test_a_bundle_of_any_system_opens_as_what_it_is(system: Any, tmp_path: Path) -> None:
    system.save_pretrained(tmp_path)
    opened = load(tmp_path)
    assert type(opened) is type(system) is system_class(system.name)
    assert opened.config == system.config
    image = torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(opened.restore(image, 2).image, system.restore(image, 2).image)
    card = (tmp_path / "README.md").read_text()
    assert f"arXiv:{ {'varestorer': '2604.21450', 'varsr': '2501.18993', 'hvar': '2506.04990'}[system.name] }" in card


def test_a_bundle_of_another_system_is_refused(system: Any, tmp_path: Path) -> None:
    system.save_pretrained(tmp_path)
    other = next(name for name in SYSTEMS if name != system.name)
    with pytest.raises(UserError, match=f"holds a model of {system.name}, and {other} was asked for"):
        system_class(other).from_pretrained(tmp_path)


def test_entries_that_nobody_knows_are_named(system: Any, tmp_path: Path) -> None:
    system.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["tokenizer"]["later"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="entries this version does not know .tokenizer.later.; update varestorer"):
        load(tmp_path)


def test_an_unknown_system_is_refused() -> None:
    with pytest.raises(UserError, match="system must be one of varestorer, varsr, hvar, got swin"):
        system_class("swin")


def imports_of(path: Path, known: set[str]) -> set[str]:
    """Modules of the package that a file imports, inside functions and for types too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & known or {node.module} & known
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known
    return found


def test_no_imports_go_round_in_a_circle() -> None:
    """Not those inside functions either, nor those for types alone."""
    paths = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    graph = {name: imports_of(path, set(paths)) - {name} for name, path in paths.items()}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
