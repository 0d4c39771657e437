"""An option is declared once: help, schema, checks and the README's tables say the same."""

from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from varestorer.commands import COMMANDS, run
from varestorer.commands.options import (
    OPTIONS,
    EvalOptions,
    PrepareDataOptions,
    RestoreOptions,
    markdown,
)
from varestorer.utils.errors import UsageError
from varestorer.utils.schema import check, help_text, listed, typed

README = Path(__file__).parents[3] / "configs" / "README.md"
HEADING = "## Options of the commands\n"


def test_readme_has_the_tables() -> None:
    tail = README.read_text(encoding="utf-8").partition(HEADING)[2]
    assert tail.strip().endswith(markdown().strip()), (
        "configs/README.md is not what the options say; put there what this prints: "
        'python -c "from varestorer.commands.options import markdown; print(markdown())"'
    )


def test_every_command_has_its_options() -> None:
    assert OPTIONS.keys() == COMMANDS.keys()


@pytest.mark.parametrize("name", OPTIONS)
def test_help_and_schema_name_every_option(name: str) -> None:
    options = OPTIONS[name]
    text, keys = help_text(options), [key for key, _ in listed(options)]
    assert len(keys) >= len([item for item in fields(options) if item.name != "defaults"])  # type: ignore[arg-type]
    for key, item in listed(options):
        assert f"  {key}=" in text and item.metadata["text"], key
    assert max(map(len, text.splitlines())) <= 120


def test_values_outside_are_refused_by_name() -> None:
    good = {"protocol": {"name": "varestorer"}, "dataset": {"name": "folder"}, "out": "x"}
    options = typed(EvalOptions, OmegaConf.create(good | {"limit": 3}))
    assert options.limit == 3 and options.data.root is None
    for values, message in [
        ({"limit": 0}, "limit must be at least 1, got limit=0"),
        ({"size": 0.0}, "size must be above 0, got size=0"),
        ({"method": "lanczos"}, "method must be one of bicubic, spandrel, tokenizer, got method=lanczos"),
    ]:
        with pytest.raises(UsageError, match=message):
            typed(EvalOptions, OmegaConf.create(good | values))
    check(RestoreOptions(input="a", output="b", sizes=[1, 2.5], quality=100))
    for values, message in [
        ({"quality": 101}, "quality must be at least 1 and at most 100, got quality=101"),
        ({"sizes": [1.0, 0.0]}, r"sizes must be above 0, got sizes=\[1.0, 0.0\]"),
        ({"scale": float("nan")}, "scale must be a finite number, got scale=nan"),
    ]:
        with pytest.raises(UsageError, match=message):
            check(RestoreOptions(**values))
    check(PrepareDataOptions(workers=0))
    with pytest.raises(UsageError, match="workers must be at least 0"):
        check(PrepareDataOptions(workers=-1))


def test_unknown_key_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("eval", ["dataste=div2k"]) == 2
    assert "no key 'dataste'; did you mean dataset" in capsys.readouterr().err
