"""`python scripts/benchmark.py --help` says what it does."""

import sys
from pathlib import Path

from varestorer.commands.benchmark import COMMAND

if __name__ == "__main__":
    sys.exit(COMMAND.main(configs=Path(__file__).parents[1] / "configs"))
