"""The training command as a process of a fork server: in a module that a child can import by its name."""

import gc
import multiprocessing
import os
import sys
from pathlib import Path

import torch

from varestorer.commands.train import COMMAND as TRAIN


def run_command(words: list[str], output: Path) -> None:
    """What a process of the fork server does: the command, as a session of its own, its output in a file."""
    gc.freeze()  # accelerate collects garbage after each stage: not over all that is imported
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of the data workers, as in any command on Linux
    torch.set_num_threads(1)
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(TRAIN.main(words))
