"""What is imported when: libraries that are slow to import are there only where they are used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from varestorer.benchmark.startup import HEAVY
from varestorer.commands.options import OPTIONS
from varestorer.systems.varestorer import VARestorer

REPORT = "\nimport json, sys\nsys.stderr.write('\\nMODULES ' + json.dumps(list(sys.modules)))\n"
RUN = "import sys\nfrom varestorer.commands import main\nassert main(sys.argv[1:]) == 0"
RESTORE = """
import sys, torch
from varestorer import VARestorer
for folder in sys.argv[1:]:
    VARestorer.from_pretrained(folder, merge=True).restore(torch.rand(3, 10, 10))
"""


def imported(code: str, *words: str) -> set[str]:
    """Those of `HEAVY` that a program imports."""
    command = [sys.executable, "-c", code + REPORT, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(HEAVY) & set(json.loads(done.stderr.rpartition("MODULES ")[2]))


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"]])
def test_the_package_and_its_overview_import_nothing_heavy(words: list[str]) -> None:
    assert imported(RUN if words else "import varestorer", *words) == set()


@pytest.mark.parametrize("command", OPTIONS)
def test_the_help_of_a_command_needs_hydra_alone(command: str) -> None:
    assert imported(RUN, command, "--help") <= {"hydra"}


def test_restoring_imports_torch_and_what_reads_the_bundle(tiny_system: VARestorer, tmp_path: Path) -> None:
    tiny_system.save_pretrained(tmp_path / "apart")
    tiny_system.merge_adapters().save_pretrained(tmp_path / "merged")
    assert imported(RESTORE, str(tmp_path / "apart"), str(tmp_path / "merged")) == {"torch", "huggingface_hub"}
