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
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from varestorer.commands.benchmark.shared import heading, out_folder, where, write_json
from varestorer.commands.entry import OK, config_dir, say
from varestorer.utils.errors import UserError

if TYPE_CHECKING:
    from varestorer.utils.timing import Timing

BASE = "import torch"
HEAVY = (
    *("torch", "torchvision", "transformers", "peft", "accelerate", "bitsandbytes", "pyiqa", "kornia", "spandrel"),
    *("wandb", "matplotlib", "huggingface_hub", "hydra", "scipy", "skimage", "sklearn", "sympy"),
    *("torch._dynamo", "torch._inductor"),
)
"""Libraries, and parts of them, that are slow to import."""


def programs(bundles: Path) -> dict[str, list[str]]:
    """What is timed: name -> arguments of Python. `bundles` holds a small model with its adapters merged and apart."""
    load = "from varestorer import VARestorer; VARestorer.from_pretrained({!r}{})"
    merged, apart = str(bundles / "merged"), str(bundles / "apart")
    return {
        BASE: ["-c", BASE],
        "import varestorer": ["-c", "import varestorer"],
        "from varestorer import VARestorer": ["-c", "from varestorer import VARestorer"],
        "varestorer --help": ["-m", "varestorer", "--help"],
        "varestorer restore --help": ["-m", "varestorer", "restore", "--help"],
        "load, adapters merged": ["-c", load.format(merged, "")],
        "load, merge=True": ["-c", load.format(apart, ", merge=True")],
        "load, adapters apart": ["-c", load.format(apart, "")],
    }


def run(cfg: DictConfig) -> int:
    """Print and write seconds, ratios to `import torch`, and the heavy libraries of each program."""
    import torch

    from varestorer.utils.timing import in_turns

    found = where(torch.device("cpu"))
    say(heading("startup", "a toy model", found))
    with TemporaryDirectory() as temporary:
        write_bundles(Path(temporary))
        chosen = programs(Path(temporary))
        works = {name: partial(python, words) for name, words in chosen.items()}
        timings = in_turns(works, int(cfg.repeats), 1, torch.device("cpu"))
        loaded = {name: heavy_modules(words) for name, words in chosen.items()}
    say(table(timings, loaded))
    folder = out_folder(cfg)
    write_json(folder, {"what": "startup", **found, "programs": content(timings, loaded)})
    say(f"written: {folder}")
    return OK


def write_bundles(folder: Path) -> None:
    """Save a toy model twice: with its adapters apart, and merged."""
    from varestorer.systems.varestorer import VARestorer

    sizes: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / "model" / "tiny.yaml"))
    system = VARestorer(**{name: sizes[name] for name in ("schedule", "tokenizer", "transformer", "student")})
    system.save_pretrained(folder / "apart")
    system.merge_adapters().save_pretrained(folder / "merged")


def python(words: Sequence[str]) -> str:
    """Run Python with these arguments; returns what it wrote on stderr.

    Raises:
        UserError: it failed.
    """
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"python {' '.join(words)} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stderr


def heavy_modules(words: Sequence[str]) -> list[str]:
    """Those of `HEAVY` that Python imports when it runs with these arguments."""
    imported = re.findall(r"^import time:.*\|\s*(\S+)$", python(["-X", "importtime", *words]), flags=re.MULTILINE)
    return [name for name in HEAVY if name in imported]


def table(timings: Mapping[str, Timing], loaded: Mapping[str, Sequence[str]]) -> str:
    """A line for each program."""
    width = max(map(len, timings)) + 2
    lines = [f"{'program':{width}}{'seconds':>9}{'spread':>8}{'ratio':>7}  heavy imports"]
    base = timings[BASE].median
    for name, timing in timings.items():
        figures = f"{timing.median:9.3f}{timing.spread:8.3f}{timing.median / base:7.2f}"
        lines.append(f"{name:{width}}{figures}  {' '.join(loaded[name]) or '-'}")
    return "\n".join(lines)


def content(timings: Mapping[str, Timing], loaded: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The same for programs."""
    base = timings[BASE].median
    return {
        name: {
            "seconds": timing.median,
            "spread": timing.spread,
            "all_seconds": timing.seconds,
            "ratio_to_import_torch": timing.median / base,
            "heavy_imports": list(loaded[name]),
        }
        for name, timing in timings.items()
    }
