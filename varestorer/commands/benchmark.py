"""`benchmark`: how fast the program is, part by part, and what it needs of memory."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from varestorer.benchmark import generate, memory, restore, startup, train_step
from varestorer.benchmark.networks import Source
from varestorer.benchmark.report import Report
from varestorer.commands.entry import FAILED, OK, Command, config_dir, say
from varestorer.commands.options import BenchmarkOptions
from varestorer.commands.train import stage_config
from varestorer.commands.words import Keys, quote_value
from varestorer.training.task import Task, keep_base_in
from varestorer.utils.device import pick_device
from varestorer.utils.errors import UsageError
from varestorer.utils.files import check_writable, expand_user
from varestorer.utils.iqa import MetricUnavailableError

LOG = logging.getLogger(__name__)
HELPED = ("restore", "train")  # commands whose --help is timed


def benchmark(options: BenchmarkOptions) -> int:
    """Measure what `what` names.

    UserError if the folder of the results cannot be written; UsageError for options that cannot be.
    """
    if not options.batch or min(options.batch) < 1:
        raise UsageError(f"batch must list numbers of images from 1 on, such as [1,16], got batch={options.batch}")
    folder = Path("outputs/benchmark") / f"{options.what}_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    folder = folder if options.out is None else expand_user(options.out)
    if options.out is not None or options.what not in ("memory", "loader"):
        check_writable(folder, "out")
    device = pick_device(options.device)
    name = str(HydraConfig.get().runtime.choices["model"]) if options.ckpt is None else Path(options.ckpt).name
    if options.what == "loader":
        rate = train_step.pairs_per_second(options.root, options.crop)
        say(train_step.loader_report(rate, options.crop, options.pairs, options.step_seconds))
        return OK
    if options.what == "startup":
        sizes: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / "model" / "tiny.yaml"))
        sizes = {part: sizes[part] for part in ("schedule", "tokenizer", "transformer", "student")}
        report = Report("startup", "a toy model", torch.device("cpu"), say)
        startup.run(report, sizes, HELPED, options.repeats, folder)
        return OK
    if options.what in ("restore", "generate"):
        source = Source(name, options.model, options.ckpt, options.restorer, options.seed)
        run = restore.run if options.what == "restore" else generate.run
        return OK if run(Report(options.what, name, device, say), source, device, options, folder) else FAILED
    return OK if _training(options, name, device, folder) else FAILED


def _training(options: BenchmarkOptions, name: str, device: torch.device, folder: Path) -> bool:
    """Steps of the last stage of the experiment `train`: their memory by calculation, or their time."""
    if options.what == "memory":
        stage = experiment_stage(options.train, options.overrides)
        optimizer, side = instantiate(stage.optimizer, _convert_="all"), int(stage.data.crop)
        target = None if options.out is None else folder

        def blank() -> Task:
            task = task_of(stage, _source(stage, options).blank(merged=False))
            if stage.trainer.base_precision != "fp32":
                keep_base_in(task, torch.bfloat16)
            return task.to("meta").train()

        report = Report("memory", f"{options.train}, GiB", device, say)
        memory.run(report, blank, optimizer, options.micro_batches, side, device, target)
        return True
    if options.ckpt is not None:
        raise UsageError("what=train_step measures random weights of the sizes of model=; leave out ckpt")
    stage = experiment_stage(options.train, [f"model={name}", *options.overrides])
    optimizer = instantiate(stage.optimizer, _convert_="all")

    def steps(batch: int) -> train_step.TrainStep:
        system = _source(stage, options).system(device)
        in_bf16 = str(stage.trainer.base_precision) != "fp32"
        return train_step.TrainStep(task_of(stage, system).to(device), optimizer, batch, system.tile, in_bf16)

    return train_step.run(Report("train_step", f"{name}, {options.train}", device, say), steps, device, options, folder)


def _source(stage: DictConfig, options: BenchmarkOptions) -> Source:
    sizes: Any = OmegaConf.to_container(stage.model, resolve=True)
    return Source(options.train, sizes, seed=options.seed)


def experiment_stage(experiment: str, overrides: list[str]) -> DictConfig:
    """The config of an experiment as its last stage sees it, without files of weights."""
    files = ["++data.root=none", "model.weights.tokenizer=null", "model.weights.transformer=null"]
    words = [f"+experiment={experiment}", *files, *overrides]
    keys = Keys("train", config_dir(), words=words)
    cfg = hydra.compose("train", [quote_value(word, keys) for word in words])
    if not cfg.stages:
        raise UsageError(f"the experiment {experiment} has no stages")
    name = list(cfg.stages)[-1]
    stage = stage_config(cfg, str(name), overrides)
    stage.stages = {name: stage.stages[name]}
    OmegaConf.resolve(stage)
    return stage


def task_of(stage: DictConfig, system: Any) -> Task:
    """The task of a stage on a system, without any file of weights: a separate teacher is of the sizes of its own."""
    name, chosen = next(iter(stage.stages.items()))
    options = {**chosen.task, "teacher": "start"} if chosen.task.get("teacher") is not None else chosen.task
    try:
        task: Task = instantiate(options, _partial_=True, _convert_="all")(system=system)
    except MetricUnavailableError as error:
        LOG.warning("ms_ssim stands for the perceptual loss, whose network is not there: %s", error)
        task = instantiate({**options, "perceptual": "ms_ssim"}, _partial_=True, _convert_="all")(system=system)
    task.name = str(name)
    return task


COMMAND = Command("benchmark", benchmark, BenchmarkOptions)
