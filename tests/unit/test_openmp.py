"""How OpenMP's threads wait is set before torch is loaded, whichever way a command is started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAME = "OMP_WAIT_POLICY"
# Python runs this at its start: it ends the process with the setting at the first sight of torch, else at its exit
WATCH = f"""
import atexit, os, sys

def tell():
    sys.stderr.write("\\nSETTING " + os.environ.get("{NAME}", "none"))
    sys.stderr.flush()

class Watch:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            tell()
            os._exit(0)

atexit.register(tell)
sys.meta_path.insert(0, Watch)
"""
COMMAND = "import sys; from varestorer.commands import main; sys.exit(main(['restore', '--help']))"
ENTRIES = {
    **{path.name: [str(path), "--help"] for path in sorted((ROOT / "scripts").glob("*.py"))},
    "python -m varestorer": ["-m", "varestorer", "train", "--help"],
    "varestorer": ["-c", COMMAND],
}


def setting(words: list[str], folder: Path, given: str | None) -> str:
    """The setting that torch meets in a program, or the program ends with."""
    (folder / "sitecustomize.py").write_text(WATCH)
    env = {key: value for key, value in os.environ.items() if key != NAME} | ({} if given is None else {NAME: given})
    env["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr.rpartition("SETTING ")[2]


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_lets_waiting_threads_sleep(entry: str, tmp_path: Path) -> None:
    assert len(ENTRIES) > 10  # the scripts were found
    assert setting(ENTRIES[entry], tmp_path, None) == "PASSIVE"
    assert setting(ENTRIES[entry], tmp_path, "ACTIVE") == "ACTIVE"


@pytest.mark.parametrize("code", ["import varestorer", "from varestorer import VARestorer"])
def test_the_library_leaves_the_environment_of_its_program_alone(code: str, tmp_path: Path) -> None:
    assert setting(["-c", code], tmp_path, None) == "none"
