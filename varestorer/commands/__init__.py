"""The commands: `varestorer train|eval|restore|...`; most are `scripts/<name>.py` too.

A command is imported only when it is asked for, so that the list of commands appears at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from varestorer import __version__

COMMANDS = {
    "train": "train a network, such as the one-step student of the paper",
    "eval": "score a network, or anybody's pictures, on a dataset",
    "restore": "restore one picture or a folder of them",
    "demo": "a page in the browser to drop photographs into",
    "convert": "convert, merge, check and share weights",
    "prepare_data": "explain, check and make test sets; pack photographs",
    "precompute_text": "make captions and text features of training photographs, once",
    "benchmark": "how fast every stage is, and what it needs of memory",
    "tables": "assemble a table of the paper, with our rows beside the published",
    "parity": "compare the networks with recorded tensors",
    "doctor": "check an installation, and say what it lacks",
    "models": "list, fetch and share models and published weights",
}
USAGE_ERROR = 2

# Threads that wait for each other sleep: on a busy machine spinning takes the cores from those that are waited for.
# OpenMP (GNU's, LLVM's and Intel's) reads this once, when torch is loaded. Every command passes here before that, and
# what it starts inherits it. What the user has set wins: here and, as KMP_BLOCKTIME or GOMP_SPINCOUNT, inside OpenMP.
# A program that only imports the package is left alone: its environment is not ours, and it may have loaded torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `varestorer <command> key=value ...` (None: the process's own words).

    Returns the exit status: 0 all well, 1 something asked for failed, 2 the command itself was wrong.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview())
        return 0 if words else USAGE_ERROR
    name, *rest = words
    if name == "--version":
        sys.stdout.write(f"varestorer {__version__}\n")
        return 0
    if name not in COMMANDS:
        sys.stderr.write(f"error: no command {name!r}; there are {', '.join(COMMANDS)}\n")
        return USAGE_ERROR
    return run(name, rest)


def run(name: str, words: Sequence[str], configs: Path | None = None) -> int:
    """Run a command of the table with the words after it; `configs` is a folder of configs, None the package's."""
    if "--help" in words or "-h" in words:  # without the command's module, which may need torch
        entry = import_module("varestorer.commands.entry")
        entry.say(entry.explain(name, configs or entry.config_dir()))
        return 0
    module = import_module(f"varestorer.commands.{name}")
    return int(module.COMMAND.main(words, configs))


def overview() -> str:
    """The text of `varestorer --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "varestorer: image super-resolution in one step with a visual autoregressive model",
            "",
            "usage: varestorer COMMAND [key=value ...]",
            "",
            *lines,
            "",
            "`varestorer COMMAND --help` explains a command, `varestorer --version` names the version.",
            "",
        ]
    )
