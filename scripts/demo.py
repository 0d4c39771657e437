"""`python scripts/demo.py --help` says what it does."""

import sys
from pathlib import Path

from varestorer.commands import run

if __name__ == "__main__":
    sys.exit(run("demo", sys.argv[1:], Path(__file__).parents[1] / "configs"))
