"""`eval`: score a network, a method, or images that somebody else made, under a named protocol."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from varestorer.commands.entry import FAILED, OK, Command, say
from varestorer.data.folders import find_images_or_pairs, find_pairs
from varestorer.evaluation.evaluator import Evaluator
from varestorer.evaluation.outputs import write_report
from varestorer.evaluation.processes import Processes
from varestorer.evaluation.progress import Progress
from varestorer.evaluation.protocols import Protocol, load_protocol
from varestorer.evaluation.records import write_records
from varestorer.evaluation.results import Evaluation, Pair
from varestorer.evaluation.sources import BicubicSource, FolderSource, KnownSource, SystemSource, weights_digest
from varestorer.evaluation.wandb_log import log_to_wandb
from varestorer.utils.errors import UsageError, UserError

log = logging.getLogger(__name__)

SOURCES = ("ckpt", "predictions", "method")
METHODS = ("bicubic", "spandrel")
SHOWN_FAILURES = 20
BATCH_ON_ACCELERATORS = 8

HELP = """
Score restored images against their references, per image and on average.

usage: python scripts/eval.py dataset=NAME data.root=FOLDER (ckpt=... | predictions=... | method=...)

what is scored
  ckpt=MODEL             restore the data set with this network and score it: a run's folder, a bundle's folder or
                         hub name, or the published varestorer.pth
  predictions=FOLDER     score images that somebody else made, matched by file stem
  method=bicubic         score bicubic upsampling, the baseline below all others
  method=spandrel model_path=FILE
                         score any super-resolution model that spandrel loads, in float32; large images in tiles

on what, by what
  dataset=NAME           which data set it is: decides which published rows stand beside ours
  data.root=FOLDER       holds hr, hq, gt or test_HR beside lr, lq or test_LR; for a set without references it may
                         hold images alone: then the metrics that need none are scored
  protocol=NAME          which metrics, in which convention (default: varestorer); never compare across two
  metrics=[psnr,ssim]    a subset of the protocol's, or any other metric of pyiqa by name
  metric_weights=FOLDER  searched for weight files of metrics before torch's cache
  offline=true           never touch the network; missing weights are listed, the other metrics run
  batch=N                images scored at once where sizes agree, by metrics that this does not change
  limit=N                only the first N images
  scale=4 seed=0 device=auto

where
  wandb=true             also log figures and pictures to Weights & Biases (offline without WANDB_API_KEY)
  out=FOLDER             default: outputs/eval/DATASET_TIME. Images made and rows scored are kept there as it goes;
                         the same command again does only what is missing. Other settings are refused the folder.

Writes per_image.csv, summary.json, tables and a page of pictures to `out`, restored images to its folder images/.
`accelerate launch scripts/eval.py ...` (or torchrun) shares the work among processes; the figures are the same.
Exit status: 0 all well; 1 an image, or a metric asked for with metrics=, failed; 2 the command was wrong.
"""


def run_eval(cfg: DictConfig) -> int:
    """Evaluate as configured by `configs/eval.yaml`.

    Returns:
        Exit status: 1 when an image failed or a metric named in `metrics` could not run.
    Raises:
        UserError: nothing could be evaluated at all.
    """
    processes = Processes.start(cfg.device)
    try:
        return _run(cfg, processes)
    finally:
        processes.end()


def _run(cfg: DictConfig, processes: Processes) -> int:
    pairs = _pairs(cfg)
    asked = _metrics(cfg)
    source = _source(cfg, processes)
    evaluator = _evaluator(cfg, asked, processes, has_references=any(hq for _, _, hq in pairs))
    # the default has the time in it, which each process reads for itself
    out = processes.of_main(Path(cfg.out).expanduser())
    progress = Progress(out, _settings(cfg, evaluator, source, processes))
    keep = None if cfg.predictions else progress.images
    evaluation = evaluator.evaluate(pairs, source, cfg.dataset.name, keep, progress=progress, processes=processes)
    unmet = [name for name in asked or [] if name in evaluation.summary()["unavailable"]]
    if processes.is_main:
        files = write_records(evaluation, out)
        files += write_report(evaluation, out, source.method, cfg.dataset.pairs, cfg.scale)
        if cfg.wandb:
            log_to_wandb(evaluation, out, source.method, cast(dict, OmegaConf.to_container(cfg, resolve=True)))
        say(summary_text(evaluation, unmet))
        say(f"wrote {', '.join(path.name for path in files)}{' and images/' if keep else ''} to {out}")
    return FAILED if evaluation.failures or unmet else OK


def summary_text(evaluation: Evaluation, unmet: list[str] | None = None) -> str:
    """The result for the terminal: means, what is unavailable and why, what failed.

    Args:
        evaluation: the scores.
        unmet: metrics that were asked for by name and did not run.
    """
    summary = evaluation.summary()
    lines = [f"{summary['dataset']}, protocol {summary['protocol']}: {summary['n']} images scored"]
    for name, m in summary["metrics"].items():
        spread = "" if m["std"] is None else f" +- {m['std']:.4f}"
        lines.append(f"  {name:8} {m['mean']:9.4f}{spread}  (n={m['n']}, {m['id']})")
    if evaluation.seconds_per_image is not None:
        lines.append(f"  {evaluation.seconds_per_image:.3f} s per image")
    for name, reason in summary["unavailable"].items():
        lines.append(f"  {name:8} {'FAILED' if name in (unmet or []) else 'unavailable'}: {reason}")
    failures = evaluation.failures
    if failures:
        lines.append(f"{len(failures)} failures:")
        lines += [f"  {line}" for line in failures[:SHOWN_FAILURES]]
        if len(failures) > SHOWN_FAILURES:
            lines.append(f"  and {len(failures) - SHOWN_FAILURES} more, see per_image.csv")
    return "\n".join(lines)


def _pairs(cfg: DictConfig) -> list[Pair]:
    """The data set; a wrong folder is a mistake in the command."""
    pairs: list[Pair]
    try:
        needs_pairs = cfg.dataset.get("reference", False)
        pairs = [*(find_pairs(cfg.data.root) if needs_pairs else find_images_or_pairs(cfg.data.root))]
    except UserError as error:
        raise UsageError(str(error)) from error
    if cfg.limit is not None and cfg.limit < 1:
        raise UsageError(f"limit must be at least 1 image, got {cfg.limit}")
    expected = cfg.dataset.pairs
    if expected is not None and len(pairs) != expected:
        log.warning("data.root=%s has %d images, %s %d", cfg.data.root, len(pairs), cfg.dataset.name, expected)
    return pairs[: cfg.limit]


def _source(cfg: DictConfig, processes: Processes) -> KnownSource:
    """What gives the images."""
    given = [key for key in SOURCES if cfg[key] is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise UsageError(f"give one of ckpt=, predictions= and method= to say what is scored, got {got}")
    if (cfg.method == "spandrel") != (cfg.model_path is not None):
        raise UsageError("method=spandrel and model_path=FILE go together: a method that reads a file, and the file")
    if cfg.predictions is not None:
        return FolderSource(cfg.predictions)
    if cfg.ckpt is not None:
        return _system(cfg, processes)
    if cfg.method == "spandrel":
        from varestorer.evaluation.spandrel import SpandrelSource

        return SpandrelSource(cfg.model_path, cfg.scale, processes.device)
    if cfg.method != "bicubic":
        raise UsageError(f"method must be one of {', '.join(METHODS)}, got {cfg.method!r}")
    return BicubicSource(cfg.scale)


def _system(cfg: DictConfig, processes: Processes) -> SystemSource:
    """The network, known by its weights as they are in the file: merged ones may differ from machine to machine."""
    from varestorer.systems.varestorer import VARestorer

    with processes.main_first():
        system = VARestorer.from_pretrained(cfg.ckpt)
    settings = {"ckpt": str(cfg.ckpt), "weights": weights_digest(system)}
    system.merge_adapters()
    return SystemSource(system.to(processes.device), cfg.scale, cfg.seed, settings)


def _evaluator(cfg: DictConfig, asked: list[str] | None, processes: Processes, has_references: bool) -> Evaluator:
    """The metrics that run in every process."""
    batch = 1 if processes.device.type == "cpu" else BATCH_ON_ACCELERATORS
    with processes.main_first():
        evaluator = Evaluator(
            _protocol(cfg),
            asked,
            device=processes.device,
            weights_folder=cfg.metric_weights,
            offline=cfg.offline,
            seed=cfg.seed,
            references=has_references,
            batch=batch if cfg.batch is None else cfg.batch,
        )
    evaluator.drop(dict(processes.gather(list(evaluator.unavailable.items()))))
    return evaluator


def _settings(cfg: DictConfig, evaluator: Evaluator, source: KnownSource, processes: Processes) -> dict[str, Any]:
    """What the figures depend on: an evaluation is taken up again only where all of it is the same."""
    weights = {name: metric.weights[:16] for name, metric in evaluator.metrics.items() if metric.weights}
    return {
        "dataset": cfg.dataset.name,
        "data.root": str(Path(cfg.data.root).expanduser().resolve()),
        "protocol": evaluator.protocol.name,
        "metrics": [evaluator.ids[name] for name in evaluator.columns],
        "metric weights": weights,
        "seed": cfg.seed,
        "device": processes.device.type,
        **source.settings,
    }


def _metrics(cfg: DictConfig) -> list[str] | None:
    """`metrics=` as a list; one bare name is meant as a list of one."""
    if cfg.metrics is None:
        return None
    return [cfg.metrics] if isinstance(cfg.metrics, str) else [str(name) for name in cfg.metrics]


def _protocol(cfg: DictConfig) -> Protocol:
    options = OmegaConf.to_container(cfg.protocol, resolve=True)
    if not isinstance(options, dict) or "name" not in options:
        raise UsageError(f"protocol must have a name, got {options!r}")
    return load_protocol(str(options["name"]), options.get("metrics"))


COMMAND = Command("eval", "eval", run_eval, HELP, groups=("dataset", "protocol"))
