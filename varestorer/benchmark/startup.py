"""`benchmark what=startup`: how long the program takes to start, beside `import torch`, and which libraries it loads.

Every measurement is a Python process of its own. The libraries are those that are slow to import; each should be there
only where it is used.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from varestorer.benchmark.measure import Measured, measure
from varestorer.benchmark.report import Report
from varestorer.evaluation.tables import Column, Table, TableRow
from varestorer.systems.varestorer import VARestorer
from varestorer.utils.errors import UserError

BASE = "import torch"
HEAVY = (
    *("torch", "torchvision", "transformers", "peft", "accelerate", "bitsandbytes", "pyiqa", "kornia", "spandrel"),
    *("wandb", "matplotlib", "huggingface_hub", "hydra", "scipy", "skimage", "sklearn", "sympy"),
    *("torch._dynamo", "torch._inductor"),
)
"""Libraries, and parts of them, that are slow to import."""


def run(report: Report, sizes: Mapping[str, Any], commands: Sequence[str], repeats: int, folder: Path) -> None:
    """Print and write seconds, ratios to `import torch`, and the heavy libraries of each program.

    The programs are the `--help` of `commands`, and a load of the small model of `sizes` (arguments of `VARestorer`).
    """
    with TemporaryDirectory() as temporary:
        system = VARestorer(**sizes)
        system.save_pretrained(Path(temporary) / "apart")
        system.merge_adapters().save_pretrained(Path(temporary) / "merged")
        chosen = programs(Path(temporary), commands)
        works = {name: partial(python, words) for name, words in chosen.items()}
        found = measure(works, repeats, 1, torch.device("cpu"))
        loaded = {name: heavy_modules(words) for name, words in chosen.items()}
    content = startup_content(found, loaded)
    columns = ("seconds", "spread", "ratio_to_import_torch")
    rows = [
        TableRow({"program": name, "loads": " ".join(entry["heavy_imports"]) or None} | {c: entry[c] for c in columns})
        for name, entry in content.items()
    ]
    texts = Column("program", is_text=True), Column("loads", is_text=True)
    report.show(Table((texts[0], *map(Column, columns), texts[1]), tuple(rows)))
    report.write(folder, [], None, {"programs": content})


def programs(bundles: Path, commands: Sequence[str]) -> dict[str, list[str]]:
    """What is timed: name -> arguments of Python. `bundles` holds a small model with its adapters merged and apart."""
    load = "from varestorer import VARestorer; VARestorer.from_pretrained({!r}{})"
    merged, apart = str(bundles / "merged"), str(bundles / "apart")
    return {
        BASE: ["-c", BASE],
        "import varestorer": ["-c", "import varestorer"],
        "from varestorer import VARestorer": ["-c", "from varestorer import VARestorer"],
        "varestorer --help": ["-m", "varestorer", "--help"],
        **{f"varestorer {name} --help": ["-m", "varestorer", name, "--help"] for name in commands},
        "load, adapters merged": ["-c", load.format(merged, "")],
        "load, merge=True": ["-c", load.format(apart, ", merge=True")],
        "load, adapters apart": ["-c", load.format(apart, "")],
    }


def python(words: Sequence[str]) -> str:
    """Run Python with these arguments; returns what it wrote on stderr. UserError if it failed."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"python {' '.join(words)} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stderr


def heavy_modules(words: Sequence[str]) -> list[str]:
    """Those of `HEAVY` that Python imports when it runs with these arguments."""
    imported = re.findall(r"^import time:.*\|\s*(\S+)$", python(["-X", "importtime", *words]), flags=re.MULTILINE)
    return [name for name in HEAVY if name in imported]


def startup_content(found: Mapping[str, Measured], loaded: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
    """What is kept of each program."""
    base = found[BASE].whole.median
    return {
        name: {
            "seconds": measured.whole.median,
            "spread": measured.whole.spread,
            "all_seconds": measured.whole.seconds,
            "ratio_to_import_torch": measured.whole.median / base,
            "heavy_imports": loaded[name],
        }
        for name, measured in found.items()
    }
