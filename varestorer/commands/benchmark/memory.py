"""`benchmark`: what training needs of memory, and how fast data come."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from varestorer.commands.entry import OK, Command, quote_value, say
from varestorer.commands.train import stage_config
from varestorer.utils.errors import UsageError
from varestorer.utils.files import atomic_write

if TYPE_CHECKING:
    from varestorer.training.memory import MemoryRow
    from varestorer.training.task import Task

LOG = logging.getLogger(__name__)
GIB = 2**30

HELP = """
varestorer benchmark: what training needs of memory, and how fast data come.

usage: varestorer benchmark what=memory [key=value ...]      (or: python scripts/benchmark.py ...)

  varestorer benchmark what=memory                            the paper's distillation, by calculation, no GPU needed
  varestorer benchmark what=memory train=teacher_512 'micro_batches=[1,2]'
  varestorer benchmark what=memory 'overrides=["model=125m","stages.student.task.checkpoint_activations=false"]'

  varestorer benchmark what=loader root=PHOTOS                 pairs a second and core, and how many cores a GPU wants

options of what=loader
  root=FOLDER               photographs; default: the embedded ones
  crop=512 pairs=32         side of the squares, pixels, and how many are made
  step_seconds=1.0          time of a training step that is to be fed

options of what=memory
  train=EXPERIMENT          of scripts/train.py; its last stage counts; default dmd_div2k
  'overrides=["KEY=VALUE"]' of the experiment's config
  micro_batches=[1,2,4]     images that go through the networks at once (trainer.batch_size over processes and
                            trainer.accumulate)
  device=auto|cpu|cuda      on a GPU the peak is measured too, with weights drawn at random
  out=FOLDER                also write memory.json there

The calculation follows every tensor of one step, as under bfloat16 autocast on CUDA. Not in it: what CUDA takes for
itself (about half a gigabyte), cuDNN's working memory, and gaps between tensors: leave a tenth.
"""


def benchmark(cfg: DictConfig) -> int:
    """Do what `cfg.what` names.

    Raises:
        UsageError: an unknown one.
    """
    if cfg.what not in WHAT:
        raise UsageError(f"what must be one of {', '.join(WHAT)}, got {cfg.what}")
    return WHAT[cfg.what](cfg)


def memory(cfg: DictConfig) -> int:
    """Print, and write if asked, a table of the memory of a training step at each micro-batch."""
    import torch
    from hydra.utils import instantiate

    from varestorer.training.memory import measured_peak, memory_report
    from varestorer.utils.device import pick_device

    stage = experiment_stage(str(cfg.train), list(cfg.overrides))
    factory = instantiate(stage.optimizer, _convert_="all")
    side, columns, peaks = int(stage.data.crop), {}, {}
    for micro_batch in cfg.micro_batches:
        columns[int(micro_batch)] = memory_report(task_without_weights(stage), factory, int(micro_batch), side)
        if pick_device(str(cfg.device)).type == "cuda":
            task = task_without_weights(stage).to_empty(device="cuda")
            peaks[int(micro_batch)] = measured_peak(task, factory, int(micro_batch), side)
            del task
            torch.cuda.empty_cache()
    say(table(columns, peaks))
    if cfg.out is not None:
        path = Path(cfg.out) / "memory.json"
        write_json(path, columns, peaks, str(cfg.train))
        say(f"written: {path}")
    return OK


def experiment_stage(experiment: str, overrides: list[str]) -> DictConfig:
    """The config of an experiment as its last stage sees it, without files of weights."""
    from hydra import compose

    files = ["++data.root=none", "model.weights.tokenizer=null", "model.weights.transformer=null"]
    cfg = compose("train", [f"+experiment={experiment}", *map(quote_value, [*files, *overrides])])
    if not cfg.stages:
        raise UsageError(f"the experiment {experiment} has no stages")
    name = list(cfg.stages)[-1]
    stage = stage_config(cfg, str(name), overrides)
    stage.stages = {name: stage.stages[name]}
    OmegaConf.resolve(stage)
    return stage


def task_without_weights(stage: DictConfig) -> Task:
    """The task of a stage on the meta device, its base as it is kept in training; a restorer has published sizes."""
    import torch
    from hydra.utils import instantiate

    from varestorer.evaluation.cost import add_published_restorer
    from varestorer.training.precision import keep_base_in
    from varestorer.utils.iqa import MetricUnavailableError

    restorer = stage.model.get("restorer")
    with torch.device("meta"):
        system = instantiate({**stage.model, "restorer": None}, _convert_="all")
    if restorer is not None:
        add_published_restorer(system)
    options = next(iter(stage.stages.values())).task
    if options.get("teacher") is not None:
        options = {**options, "teacher": "start"}  # of the same sizes as the file it names
    try:
        task = instantiate(options, _partial_=True, _convert_="all")(system=system)
    except MetricUnavailableError as error:
        LOG.warning("the perceptual loss is counted without its network: %s", error)
        task = instantiate({**options, "perceptual": "ms_ssim"}, _partial_=True, _convert_="all")(system=system)
    task.name = "memory"
    if stage.trainer.base_precision != "fp32":
        keep_base_in(task, torch.bfloat16)
    made: Task = task.to("meta").train()
    return made


def table(columns: dict[int, list[MemoryRow]], peaks: dict[int, int]) -> str:
    """The report in GiB, a column for each micro-batch."""
    names = list(dict.fromkeys((row.kind, row.part) for rows in columns.values() for row in rows if row.kind != "peak"))
    sizes = {size: {(row.kind, row.part): row.bytes for row in rows} for size, rows in columns.items()}
    lines = [f"{'GiB, at a micro-batch of':42}" + "".join(f"{size:9}" for size in columns)]
    for name in [*names, ("peak", "all")]:
        values = "".join(f"{found.get(name, 0) / GIB:9.2f}" for found in sizes.values())
        lines.append(f"{name[0]:14}{name[1]:28}{values}")
    if peaks:
        values = "".join(f"{peaks[size] / GIB:9.2f}" for size in columns)
        lines.append(f"{'measured':14}{'peak':28}{values}")
    return "\n".join(lines)


def write_json(path: Path, columns: dict[int, list[MemoryRow]], peaks: dict[int, int], experiment: str) -> None:
    """Write the report for programs: bytes."""
    content: dict[str, Any] = {"experiment": experiment, "micro_batches": {}}
    for size, rows in columns.items():
        measured = peaks.get(size)
        content["micro_batches"][str(size)] = {"rows": [asdict(row) for row in rows], "measured_peak": measured}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def loader(cfg: DictConfig) -> int:
    """Print pairs a second and core, and the cores that a step needs."""
    from varestorer.data.speed import loader_report
    from varestorer.utils.device import pick_device

    device = pick_device(str(cfg.device))
    say("\n".join(loader_report(cfg.root, cfg.crop, cfg.pairs, cfg.step_seconds, device)))
    return OK


WHAT: dict[str, Callable[[DictConfig], int]] = {"memory": memory, "loader": loader}
COMMAND = Command("benchmark", "benchmark", benchmark, HELP)
