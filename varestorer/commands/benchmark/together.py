"""`benchmark what=all`: the benchmarks of speed one after another into one folder, and the targets they are held to.

Each part is a process of its own: what it leaves in a GPU's memory, or breaks there, is gone before the next begins.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from varestorer.commands.benchmark.shared import (
    FILE,
    heading,
    is_paper_model,
    model_name,
    out_folder,
    where,
    write_json,
)
from varestorer.commands.entry import FAILED, OK, say
from varestorer.utils.errors import UsageError

PARTS = ("restore", "generate", "train_step", "startup")
ON_GPU = {"restore": "batch=[1,16]"}
"""What is measured beyond the defaults on a GPU, where the command does not say."""


def run(cfg: DictConfig) -> int:
    """Run the parts, then write what they found, and the targets, to one benchmark.json.

    Returns:
        exit status: 1 if a part failed.
    Raises:
        UsageError: `variants` is given, whose names differ from part to part.
    """
    from hydra.core.hydra_config import HydraConfig

    from varestorer.utils.device import pick_device

    if cfg.variants is not None:
        raise UsageError("variants= has other names in each benchmark; leave it out, or give it with what=restore, ...")
    device, folder = pick_device(str(cfg.device)), out_folder(cfg)
    given = list(HydraConfig.get().overrides.task)
    statuses = {}
    for part in PARTS:
        say(f"\n=== {part} ===")
        (folder / part / FILE).unlink(missing_ok=True)  # of an earlier run
        statuses[part] = run_part(words_of(part, given, folder, device.type == "cuda"))
    found = {part: read(folder / part) for part in PARTS}
    place, name = where(device), model_name(cfg)
    content = {"what": "all", "model": name, **place, "statuses": statuses, "parts": found}
    say(f"\n{heading('all', name, place)}")
    if is_paper_model(cfg):
        content["targets"] = report_targets(found, place["device"])
    write_json(folder, content)
    failed = [part for part, status in statuses.items() if status != OK]
    say(f"written: {FILE} to {folder}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return FAILED if failed else OK


def words_of(part: str, given: list[str], folder: Path, is_gpu: bool) -> list[str]:
    """The words after `varestorer benchmark` of one part.

    Args:
        part: its name.
        given: the words of the whole command.
        folder: of the whole.
        is_gpu: whether a GPU is measured.
    """
    kept = [word for word in given if not re.match(r"\+{0,2}(what|out)=", word)]
    named = any(re.match(r"\+{0,2}batch=", word) for word in kept)
    more = [ON_GPU[part]] if is_gpu and part in ON_GPU and not named else []
    return [f"what={part}", f"out={folder / part}", *kept, *more]


def run_part(words: list[str]) -> int:
    """Run one benchmark in a process of its own; what it prints is seen at once.

    Returns:
        its exit status.
    """
    sys.stdout.flush()
    return subprocess.run([sys.executable, "-m", "varestorer", "benchmark", *words], check=False).returncode


def read(folder: Path) -> dict[str, Any]:
    """What a part wrote; empty if it did not come so far."""
    file = folder / FILE
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def report_targets(found: Mapping[str, Mapping[str, Any]], device: str) -> list[dict[str, Any]]:
    """Print the targets and return them for programs; none on another device than they are meant for."""
    from varestorer.evaluation.speed.targets import DEVICE, all_targets, targets_content, targets_text

    if DEVICE not in device:
        return []
    targets = all_targets(found["restore"], found["generate"])
    say(targets_text(targets))
    return targets_content(targets)
