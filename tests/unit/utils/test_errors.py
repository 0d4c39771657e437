"""Errors: what other libraries' errors become in ours, one line that says something."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import varestorer
from varestorer.utils.errors import MAX_REASON, reason

PACKAGE = Path(varestorer.__file__).parent
OURS = {"UserError", "UsageError", "MetricUnavailableError"}  # their messages are lines of ours already


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (ValueError("wanted 3, got 4"), "wanted 3, got 4"),
        (RuntimeError("Error(s) in loading:\n\tsize mismatch\n"), "Error(s) in loading: size mismatch"),
        (RuntimeError(), "RuntimeError"),
        (OSError(" \n"), "OSError"),
        (KeyError("format"), "KeyError: 'format'"),
        (KeyError(), "KeyError"),
    ],
)
def test_a_reason_is_one_line_and_never_empty(error: Exception, wanted: str) -> None:
    assert reason(error) == wanted


def test_a_long_reason_is_cut() -> None:
    assert reason(ValueError("x" * MAX_REASON)) == "x" * MAX_REASON
    assert reason(ValueError("x" * (MAX_REASON + 1))) == "x" * MAX_REASON + "..."


def bare_uses(path: Path) -> Iterator[str]:
    """Where an f-string or a log line takes a caught foreign error as it is, whose message may be empty."""
    for handler in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(handler, ast.ExceptHandler) or handler.name is None or handler.type is None:
            continue
        kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        if {ast.unparse(kind) for kind in kinds} <= OURS:
            continue
        for node in ast.walk(handler):
            shown = [node.value] if isinstance(node, ast.FormattedValue) else []
            if isinstance(node, ast.Call) and ast.unparse(node.func).lower().startswith(("log.", "logger.")):
                shown = node.args
            if any(isinstance(value, ast.Name) and value.id == handler.name for value in shown):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}"


def test_no_message_takes_an_error_without_a_reason() -> None:
    assert [place for path in sorted(PACKAGE.rglob("*.py")) for place in bare_uses(path)] == []
