"""`benchmark what=memory`: what a training step needs of memory, by calculation and on a GPU by measurement."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from varestorer.commands.entry import OK, config_dir, say
from varestorer.commands.quoting import Keys, quote_value
from varestorer.commands.train import stage_config
from varestorer.utils import files
from varestorer.utils.errors import UsageError

if TYPE_CHECKING:
    from varestorer.systems.varestorer import VARestorer
    from varestorer.training.memory import MemoryRow
    from varestorer.training.task import Task

LOG = logging.getLogger(__name__)
GIB = 2**30


def run(cfg: DictConfig) -> int:
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
        path = files.expand_user(cfg.out) / "memory.json"
        write_json(path, columns, peaks, str(cfg.train))
        say(f"written: {path}")
    return OK


def experiment_stage(experiment: str, overrides: list[str]) -> DictConfig:
    """The config of an experiment as its last stage sees it, without files of weights."""
    from hydra import compose

    files = ["++data.root=none", "model.weights.tokenizer=null", "model.weights.transformer=null"]
    words = [f"+experiment={experiment}", *files, *overrides]
    keys = Keys("train", config_dir(), words=words)
    cfg = compose("train", [quote_value(word, keys) for word in words])
    if not cfg.stages:
        raise UsageError(f"the experiment {experiment} has no stages")
    name = list(cfg.stages)[-1]
    stage = stage_config(cfg, str(name), overrides)
    stage.stages = {name: stage.stages[name]}
    OmegaConf.resolve(stage)
    return stage


def task_without_weights(stage: DictConfig) -> Task:
    """The task of a stage on the meta device, its base as it is kept in training."""
    import torch
    from hydra.utils import instantiate

    from varestorer.evaluation.cost import add_restorer
    from varestorer.training.precision import keep_base_in

    model: dict[str, Any] = OmegaConf.to_container(stage.model)  # type: ignore[assignment]
    restorer = model.pop("restorer", None)
    with torch.device("meta"):
        system = instantiate(model, _convert_="all")
    add_restorer(system, restorer)
    task = task_of(stage, system)
    if stage.trainer.base_precision != "fp32":
        keep_base_in(task, torch.bfloat16)
    made: Task = task.to("meta").train()
    return made


def task_of(stage: DictConfig, system: VARestorer) -> Task:
    """The task of a stage on a system, without any file of weights: a separate teacher is of the sizes of its own."""
    from hydra.utils import instantiate

    from varestorer.utils.iqa import MetricUnavailableError

    name, chosen = next(iter(stage.stages.items()))
    options = {**chosen.task, "teacher": "start"} if chosen.task.get("teacher") is not None else chosen.task
    try:
        task: Task = instantiate(options, _partial_=True, _convert_="all")(system=system)
    except MetricUnavailableError as error:
        LOG.warning("ms_ssim stands for the perceptual loss, whose network is not there: %s", error)
        task = instantiate({**options, "perceptual": "ms_ssim"}, _partial_=True, _convert_="all")(system=system)
    task.name = str(name)
    return task


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
    files.write_json(path, content, indent=2)
