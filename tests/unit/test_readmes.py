"""The README files name what is there."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READMES = ["README.md", "configs/README.md", "varestorer/README.md", "varestorer/evaluation/README.md"]
READMES += ["varestorer/benchmark/README.md"]


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name: str) -> None:
    path = ROOT / name
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert link.startswith("http") or (path.parent / link).exists(), link


def test_every_experiment_is_listed() -> None:
    text = (ROOT / "configs/README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`([\w*.]+)`", text))
    for path in (ROOT / "configs/experiment").glob("*.yaml"):
        name = path.stem.removesuffix("_small")
        assert name.endswith("_base") or any(fnmatch(name, pattern) for pattern in listed), name


def test_the_map_of_the_papers_names_files_and_symbols_that_exist() -> None:
    text = (ROOT / "varestorer/README.md").read_text(encoding="utf-8")
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "varestorer").rglob("*.py"))
    column = [line.split("|")[2] for line in text.splitlines() if line.startswith("| ")]
    for word in re.findall(r"`([^`]+)`", " ".join(column)):
        if "/" in word:
            assert any((ROOT / top / word).exists() for top in (".", "varestorer")), word
        elif not word.startswith("compat="):
            assert re.search(rf"(class|def) {word.split('.')[-1]}\b", code), word


def test_the_front_page_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
