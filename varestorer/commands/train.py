"""`train`: the stages of an experiment, one after the other, in one folder."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from varestorer.commands.entry import OK, Command, say
from varestorer.data.loader import collate
from varestorer.training.checkpoint import save_initial
from varestorer.training.checks import check_resumable, check_stages
from varestorer.training.config import TrainConfig, TrainerConfig
from varestorer.training.fit import fit, make_accelerator
from varestorer.training.parallel import in_cluster_job, join_cluster_job
from varestorer.training.run import Run, choose_run_dir, environment
from varestorer.training.scores import ImageScores
from varestorer.training.stopping import StoppedError
from varestorer.training.task import Batch
from varestorer.utils.errors import UsageError, UserError, reason
from varestorer.utils.locks import locked
from varestorer.utils.loggers import open_loggers
from varestorer.utils.schema import check, typed
from varestorer.utils.seeds import seed_everything
from varestorer.weights.load import load_into
from varestorer.weights.runs import CONFIG, load_initial

LOG = logging.getLogger(__name__)
SECTIONS = ("trainer", "optimizer", "data")  # of the config, which a stage may change for itself
HELDOUT_BATCH = 4


def train(cfg: DictConfig) -> int:
    """Train every stage of `cfg` (`TrainConfig`) in order, each starting from the averaged weights of those before.

    UserError: see `fit`; UsageError if the config asks for nothing, or for something impossible.
    """
    stages = stage_configs(cfg, command_line())
    join_cluster_job()
    accelerator = make_accelerator(str(cfg.device))
    check_stages(stages, accelerator.num_processes, accelerator.device)
    validates = any(typed(TrainerConfig, stage.trainer).validate_every for stage in stages.values())
    with accelerator.main_process_first():  # it fetches the weights of the metrics
        scores = ImageScores(cfg.scores if validates else (), accelerator.device, accelerator.is_main_process)
    with ExitStack() as kept:
        run = open_run(cfg, stages, accelerator, kept)
        kept.enter_context(run.stop.listening())
        try:
            system = build_system(cfg, run)
            for name, stage in stages.items():
                train_stage(name, stage, system, run, scores)
            written = write_report(cfg, system, run)
            run.mark_finished()
        except StoppedError as error:  # the process ends: a sweep must not go on with its next job
            if run.is_main:
                say(f"{reason(error)}\ngo on with the same command and run_dir={run.run_dir} resume=auto")
            run.stop.pass_on()
            raise SystemExit(run.stop.exit_status) from None
        finally:
            run.logger.finish()
    if run.is_main:
        say(summary(run.run_dir, written))
    return OK


def open_run(cfg: DictConfig, stages: Mapping[str, DictConfig], accelerator: Accelerator, kept: ExitStack) -> Run:
    """Choose the folder (in the first process, for all), write the config and start the logger.

    The folder is kept for this run until `kept` is closed. UsageError if its run was started with another model or
    other data; UserError if another command writes to it, or it cannot be written.
    """
    folder, is_new = [""], False
    if accelerator.is_main_process:
        job_dir = cluster_job_dir()
        resume = cfg.resume == "auto" or job_dir is not None
        folder = [str(choose_run_dir(experiment_name(cfg), cfg.run_dir or job_dir, resume))]
        is_new = not any(Path(folder[0]).glob("*"))  # one with the time in its name was just made
        kept.enter_context(locked(Path(folder[0])))
    broadcast_object_list(folder)
    run = Run(Path(folder[0]), accelerator, cfg.seed)
    if is_new:
        kept.callback(run.discard_if_unbegun)
    run.stages, run.accept_other_data = list(stages), cfg.resume_other_data
    if run.is_main:
        config = {**whole_config(cfg, stages), "run_dir": folder[0], "environment": environment()}
        check_resumable(run.run_dir / CONFIG, config)
        run.write_config(config)
        run.logger = open_loggers(instantiate(cfg.logger, _convert_="all"), run.run_dir, config)
        LOG.info("run folder: %s", run.run_dir)
    return run


def build_system(cfg: DictConfig, run: Run) -> nn.Module:
    """Build the system with the weights the run starts from.

    What is drawn at random is saved at the start and loaded in a resume. A system whose weights come from
    files says so by an `initial_state()` that leaves them out (or is empty).
    """
    seed_everything(cfg.seed, "model")
    system: nn.Module = instantiate(cfg.model, _convert_="all")
    initial = load_initial(run.run_dir)
    run.accelerator.wait_for_everyone()  # the other processes have looked before the first one writes
    if initial is not None:
        load_into(system, initial, f"the run {run.run_dir}")
    elif run.is_main and (state := getattr(system, "initial_state", system.state_dict)()):
        save_initial(run.run_dir, state)
    return system


def train_stage(name: str, cfg: DictConfig, system: nn.Module, run: Run, scores: ImageScores) -> None:
    """Train one stage; a stage that is finished already only gives its weights to the system."""
    seed_everything(run.seed, "task", name)  # a task may draw weights of its own, in a resume the same ones
    task = instantiate(cfg.stages[name].task, _partial_=True, _convert_="all")(system=system)
    task.name = name
    dataset = instantiate(cfg.data, _convert_="all")
    optimizer = instantiate(cfg.optimizer, _convert_="all")
    trainer = typed(TrainerConfig, cfg.trainer)
    preview, *others = heldout_batches(cfg, dataset, trainer)
    validation = [preview, *others] if trainer.validate_every else []
    fit(task, dataset, trainer, optimizer, run, preview=preview, validation=validation, scores=scores)


def heldout_batches(cfg: DictConfig, dataset: Any, trainer: TrainerConfig) -> list[Batch]:
    """Batches of `heldout`: the first for pictures, all of them for validation.

    Without a held-out set the pictures show training data.
    """
    source = dataset if cfg.heldout is None else instantiate(cfg.heldout, _convert_="all")
    count = len(source) if trainer.validate_every else min(HELDOUT_BATCH, len(source))
    batches: list[Batch] = []
    for start in range(0, count, HELDOUT_BATCH):
        batch = collate([source[number] for number in range(start, min(start + HELDOUT_BATCH, count))])
        if isinstance(batch, UserError):  # collate's way of handing one on
            raise batch
        batches.append(dict(batch))
    return batches


def write_report(cfg: DictConfig, system: nn.Module, run: Run) -> Path | None:
    """Call the experiment's `report` (`run_dir, system, config, device` -> path), in the first process."""
    if cfg.report is None or not run.is_main:
        return None
    write = instantiate(cfg.report, _partial_=True, _convert_="all")
    written = write(run_dir=run.run_dir, system=system, config=resolve(cfg), device=run.accelerator.device)
    return None if written is None else Path(written)


def stage_configs(cfg: DictConfig, words: Sequence[str]) -> dict[str, DictConfig]:
    """The whole config as each stage sees it, all checked before anything starts.

    A stage's own `trainer`, `optimizer` and `data` go over the run's; what was given on the command line
    (`trainer.max_steps=2`) goes over both, unless the command line names the stage too. UsageError: no stages, or a
    value no run could mean.
    """
    if not cfg.stages:
        raise UsageError("nothing to train: the config has no stages; add +experiment=quickstart, see --help")
    check(cfg, TrainConfig)
    configs = {name: stage_config(cfg, name, words) for name in cfg.stages}
    for config in configs.values():
        trainer = typed(TrainerConfig, config.trainer)
        if trainer.sharding == "fsdp2" and (len(configs) > 1 or cfg.report is not None):
            raise UsageError(
                "trainer.sharding=fsdp2 trains one stage per run and writes no report (report=null); start the next "
                "stage from this run with model.weights.transformer=RUN"
            )
    return configs


def stage_config(cfg: DictConfig, stage: str, words: Sequence[str]) -> DictConfig:
    """The config as one stage sees it; `words` are the overrides of the command line."""
    merged = copy.deepcopy(cfg)
    keys = [word.lstrip("+").split("=", 1)[0] for word in words]
    for section in SECTIONS:
        if cfg[section] is None:
            raise UsageError(f"the config has no {section}; choose one, such as {section}=NAME, see --help")
        OmegaConf.set_struct(merged[section], section != "data")  # a dataset may take keys of its own
        merged[section] = OmegaConf.merge(merged[section], cfg.stages[stage][section])
        for key in keys:
            inner = key.removeprefix(f"{section}.")
            if inner != key and f"stages.{stage}.{key}" not in keys:
                OmegaConf.update(merged, key, OmegaConf.select(cfg, key), force_add=True)
    return merged


def command_line() -> list[str]:
    """The overrides Hydra was called with; none when the config was composed by other means."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def cluster_job_dir() -> Path | None:
    """Folder of a job that a launcher put in a cluster's queue, the same each time it is put there again."""
    if not (in_cluster_job() and HydraConfig.initialized()):
        return None
    settings = HydraConfig.get()
    return Path(settings.sweep.dir) / str(settings.job.num)


def experiment_name(cfg: DictConfig) -> str:
    """`experiment_name`, else the choice `+experiment=`, else `train`."""
    chosen = HydraConfig.get().runtime.choices.get("experiment") if HydraConfig.initialized() else None
    return str(cfg.experiment_name or chosen or "train")


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain values, all references and the experiment's name filled in."""
    resolved: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    return {**resolved, "experiment_name": experiment_name(cfg)}


def whole_config(cfg: DictConfig, stages: Mapping[str, DictConfig]) -> dict[str, Any]:
    """The resolved config, each stage with the whole `trainer`, `optimizer` and `data` that it is trained with."""
    config = resolve(cfg)
    for name, stage in stages.items():
        own = resolve(stage)
        config["stages"][name] |= {section: own[section] for section in SECTIONS}
    return config


def summary(run_dir: Path, report: Path | None) -> str:
    """What the command says at the end."""
    lines = [
        f"run:         {run_dir}",
        f"metrics:     {run_dir / 'metrics.jsonl'}",
        f"pictures:    {run_dir / 'samples'}",
        f"checkpoints: {run_dir / 'checkpoints'}   (use them with ckpt={run_dir})",
    ]
    return "\n".join(lines if report is None else [*lines, f"report:      {report}"])


COMMAND = Command("train", train)
