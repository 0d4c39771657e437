"""`eval`: score a network, a method, or images that somebody else made, under a named protocol."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from varestorer.commands.entry import FAILED, OK, Command, say
from varestorer.data.folders import find_pairs
from varestorer.evaluation.evaluator import Evaluation, Evaluator, Pair
from varestorer.evaluation.protocols import Protocol, load_protocol
from varestorer.evaluation.records import write_records
from varestorer.evaluation.sources import BicubicSource, FolderSource, Source, SystemSource
from varestorer.utils.device import pick_device
from varestorer.utils.errors import UsageError, UserError

log = logging.getLogger(__name__)

SOURCES = ("ckpt", "predictions", "method")
METHODS = ("bicubic",)
SHOWN_FAILURES = 20

HELP = """
Score restored images against their references, per image and on average.

usage: python scripts/eval.py dataset=NAME data.root=FOLDER (ckpt=... | predictions=... | method=bicubic)

  ckpt=RUN_OR_FILE       restore the data set with this network (a run's folder, or a checkpoint) and score it
  predictions=FOLDER     score images that somebody else made, matched by file stem
  method=bicubic         score bicubic upsampling, the baseline below all others
  dataset=NAME           which data set it is: decides which published rows stand beside ours
  data.root=FOLDER       holds hr, hq, gt or test_HR beside lr, lq or test_LR
  protocol=NAME          which metrics, in which convention (default: varestorer); never compare across two
  metrics=[psnr,ssim]    a subset of the protocol's, or any other metric of pyiqa by name
  metric_weights=FOLDER  searched for weight files of metrics before torch's cache
  offline=true           never touch the network; missing weights are listed, the other metrics run
  limit=N                only the first N pairs
  scale=4 seed=0 device=auto
  out=FOLDER             default: outputs/eval/DATASET_TIME

Writes per_image.csv, summary.json and table.md to `out`, and restored images to its folder images/.
Exit status: 0 all well; 1 an image, or a metric asked for with metrics=, failed; 2 the command was wrong.
"""


def run_eval(cfg: DictConfig) -> int:
    """Evaluate as configured by `configs/eval.yaml`.

    Returns:
        Exit status: 1 when an image failed or a metric named in `metrics` could not run.
    Raises:
        UserError: nothing could be evaluated at all.
    """
    pairs = _pairs(cfg)
    source, method = _source(cfg)
    asked = _metrics(cfg)
    evaluator = Evaluator(
        _protocol(cfg),
        asked,
        device=pick_device(cfg.device),
        weights_folder=cfg.metric_weights,
        offline=cfg.offline,
        seed=cfg.seed,
    )
    out = Path(cfg.out).expanduser()
    keep = None if cfg.predictions else out / "images"
    evaluation = evaluator.evaluate(pairs, source, cfg.dataset.name, keep)
    files = write_records(evaluation, out, method, cfg.dataset.pairs)
    unmet = [name for name in asked or [] if name in evaluation.summary()["unavailable"]]
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
    try:
        pairs = find_pairs(cfg.data.root)
    except UserError as error:
        raise UsageError(str(error)) from error
    if cfg.limit is not None and cfg.limit < 1:
        raise UsageError(f"limit must be at least 1 pair, got {cfg.limit}")
    expected = cfg.dataset.pairs
    if expected is not None and len(pairs) != expected:
        log.warning("data.root=%s has %d pairs, %s %d", cfg.data.root, len(pairs), cfg.dataset.name, expected)
    return pairs[: cfg.limit]


def _source(cfg: DictConfig) -> tuple[Source, str]:
    """What gives the images, and its name in tables."""
    given = [key for key in SOURCES if cfg[key] is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise UsageError(f"give one of ckpt=, predictions= and method= to say what is scored, got {got}")
    if cfg.predictions is not None:
        return FolderSource(cfg.predictions), Path(cfg.predictions).name
    if cfg.method is not None:
        if cfg.method not in METHODS:
            raise UsageError(f"method must be one of {', '.join(METHODS)}, got {cfg.method!r}")
        return BicubicSource(cfg.scale), str(cfg.method)
    from varestorer.systems.varestorer import VARestorer

    system = VARestorer.from_pretrained(cfg.ckpt, device=pick_device(cfg.device), merge=True)
    return SystemSource(system, cfg.scale, cfg.seed), f"{type(system).__name__} (this run)"


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
