"""`eval`: score a network, a method, or images that somebody else made, under a named protocol."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from varestorer.commands.entry import FAILED, OK, Command, as_list, say
from varestorer.commands.options import EvalOptions
from varestorer.data.folders import find_images_or_pairs, find_pairs
from varestorer.data.testsets.checking import known_set
from varestorer.data.testsets.known import BENCHMARKS
from varestorer.evaluation.detective import explain, read_figures, report
from varestorer.evaluation.doubt import check_doubt, measure_doubt, write_doubt
from varestorer.evaluation.evaluator import Evaluator
from varestorer.evaluation.outputs import log_evaluation, write_report
from varestorer.evaluation.pairwise import write_pairwise
from varestorer.evaluation.paper_tables import split_label
from varestorer.evaluation.processes import Processes
from varestorer.evaluation.progress import Progress, write_records
from varestorer.evaluation.protocols import listed_protocols, load_protocol
from varestorer.evaluation.results import Evaluation, Pair
from varestorer.evaluation.samples import check_sizes, reduced_references
from varestorer.evaluation.sources import (
    BicubicSource,
    Candidate,
    FolderSource,
    KnownSource,
    ReconstructionSource,
    Source,
    SpandrelSource,
    SystemSource,
    source_keys,
    weights_digest,
)
from varestorer.systems import load
from varestorer.systems.acceleration import Acceleration
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.files import expand_user
from varestorer.utils.images import load_image
from varestorer.utils.loggers import open_loggers
from varestorer.weights import DEFAULT

log = logging.getLogger(__name__)

SOURCES = ("ckpt", "predictions", "method")
PUBLISHED_SETS = ("div2k", "drealsr", "realsr", "reallr200")
SHOWN_FAILURES = 20
BATCH_ON_ACCELERATORS = 8


def run_eval(options: EvalOptions) -> int:
    """Evaluate (`EvalOptions`); exit status 1 when an image failed, or a metric named in `metrics` could not run.

    UsageError for a value that cannot be; UserError if nothing could be evaluated at all.
    """
    if options.protocol.get("name") == "list":
        say(listed_protocols())
        return OK
    check_options(options)
    processes = Processes.start(options.device)
    try:
        if options.image is not None:
            return _two_files(options, processes)
        whole = _pairs(options)
        if options.compare is not None:
            return _compare(options, whole, processes)
        _check_source(options)
        if options.explain is not None:
            return _explain(options, whole[: options.limit], _source(options, whole, processes))
        # the default has the time in it, which each process reads for itself
        out = processes.of_main(expand_user(options.out))
        with processes.keeping(out):
            return _evaluate(options, whole, out, processes)[1]
    finally:
        processes.end()


def check_options(options: EvalOptions) -> None:
    """Refuse what cannot be: a UsageError that names the key, what it was and what it may be."""
    if options.size is not None and options.size > options.scale:
        raise UsageError(f"size must be at most scale={options.scale}, got size={options.size:g}")
    if options.size is not None and options.method is not None:
        raise UsageError("size= goes with ckpt= or predictions=: other methods give one size")
    if options.image is not None or options.reference is not None:
        check_two_files(options)
        return
    if options.pairwise and len(options.compare or []) < 2:
        raise UsageError("pairwise=true goes with compare=[...] of two methods or more")
    if options.dataset is None:
        raise UsageError(f"dataset= is missing: which data set it is, one of {', '.join(BENCHMARKS)}")
    if options.data.root is None:
        raise UsageError("no value for data.root: add data.root=FOLDER, where the data set is")
    for key in ("dataset", "protocol"):
        value = getattr(options, key)
        if not isinstance(value, dict) or "name" not in value:
            raise UsageError(f"{key} must be a config with a name, got {key}={value!r}")


def check_two_files(options: EvalOptions) -> None:
    """Refuse what does not go with image= and reference=: a UsageError that names the key."""
    if options.image is None or options.reference is None:
        raise UsageError("image= and reference= go together: give both files")
    given = [key for key in ("dataset", "compare", *SOURCES) if getattr(options, key) is not None]
    if given:
        raise UsageError(f"image= and reference= compare two files: leave out {given[0]}=")


def _two_files(options: EvalOptions, processes: Processes) -> int:
    """Score one image against another and say so, writing nothing; UserError if they cannot be read or compared."""
    files = expand_user(str(options.image)), expand_user(str(options.reference))
    image, reference = map(load_image, files)
    if options.explain is not None:
        return _explain(options, [(files[0].name, *files)], lambda name, path: Candidate(load_image(path)))
    check_sizes(image, reference)
    evaluator = _evaluator(options, processes, has_references=True)
    scores = evaluator.score(image, reference)
    unavailable = (
        evaluator.unavailable
        | {name: "compares folders" for name in evaluator.metrics if name not in {**scores.values, **scores.errors}}
        | scores.errors
    )
    lines = [f"{options.image} against {options.reference}, protocol {evaluator.protocol.name}:"]
    lines += [f"  {name:8} {value:9.4f}  ({evaluator.ids[name]})" for name, value in scores.values.items()]
    lines += [f"  {name:8} unavailable: {why}" for name, why in unavailable.items()]
    say("\n".join(lines))
    return FAILED if any(name in unavailable for name in as_list(options.metrics)) else OK


def _explain(options: EvalOptions, pairs: Sequence[Pair], source: Source) -> int:
    """Say which conventions give the figures that were asked about."""
    figures = read_figures(str(options.explain))
    answers, count = explain(pairs, source, figures, options.scale)
    say(report(figures, answers, count))
    return OK if count == len(pairs) else FAILED


def _compare(options: EvalOptions, whole: list[Pair], processes: Processes) -> int:
    """Evaluate several methods, each in a folder of its own, and set them side by side."""
    chosen = _chosen(options)
    for label, one in chosen.items():
        if set(label) & set("/\\") or label.startswith(".") or label in ("LQ", "HQ", "gallery"):
            raise UsageError(f"compare: a method cannot be called {label!r}; give NAME=WHAT")
        _check_source(one)
    out = processes.of_main(expand_user(options.out))
    with processes.keeping(out):
        done = {label: _evaluate(one, whole, out / label, processes, label) for label, one in chosen.items()}
        evaluations = {label: evaluation for label, (evaluation, _) in done.items()}
        if processes.is_main:
            files = write_report(evaluations, out, options.dataset.get("pairs"), options.scale)
            files += write_pairwise(evaluations, out, options.scale) if options.pairwise else []
            say(f"wrote {', '.join(path.name for path in files)} to {out}")
    return max(status for _, status in done.values())


def _chosen(options: EvalOptions) -> dict[str, EvalOptions]:
    """The methods of compare=, each as options of its own evaluation; UsageError for a name twice, or other keys."""
    given = [key for key in (*SOURCES, "model_path", "size", "explain") if getattr(options, key) is not None]
    if given:
        raise UsageError(f"compare= says itself what is scored: leave out {given[0]}=")
    if not options.compare:
        raise UsageError("compare= must name at least one method, as NAME=WHAT, got []")
    chosen: dict[str, EvalOptions] = {}
    for text in options.compare:
        label, what = split_label(text)
        label = label or Path(text).stem
        if label in chosen:
            raise UsageError(f"compare: two methods are called {label}; give each a name, NAME=WHAT")
        keys: dict[str, Any] = {"compare": None, **source_keys(what)}
        if "ckpt" not in keys:
            keys |= {"precision": None, "steps": "one", "doubt": None}  # of networks
        chosen[label] = replace(options, **keys)
    return chosen


def _evaluate(
    options: EvalOptions, whole: list[Pair], out: Path, processes: Processes, label: str | None = None
) -> tuple[Evaluation, int]:
    """Score one method, write what it gives, and say so; with the exit status."""
    dataset, size = options.dataset["name"], options.size or options.scale
    if size != options.scale:
        dataset += f"_x{size:g}"
        with processes.main_first():
            whole = reduced_references(whole, size / options.scale, out / "references")
    pairs = whole[: options.limit]
    source = _source(options, whole, processes)
    evaluator = _evaluator(options, processes, has_references=any(hq for _, _, hq in pairs))
    if evaluator.unavailable and processes.is_main:
        log.warning("left out, for they cannot run here: %s", ", ".join(evaluator.unavailable))
    judged = source.system if options.doubt is not None and isinstance(source, SystemSource) else None
    if judged is not None:
        check_doubt(judged, pairs, evaluator, str(options.doubt))
    progress = Progress(out, _settings(options, evaluator, source, processes))
    keep = None if options.predictions else progress.images
    evaluation = evaluator.evaluate(pairs, source, dataset, keep, progress=progress, processes=processes)
    unmet = [name for name in as_list(options.metrics) if name in evaluation.summary()["unavailable"]]
    if processes.is_main:
        method = label or source.method
        files = write_records(evaluation, out, method)
        files += write_report({method: evaluation}, out, options.dataset.get("pairs"), size)
        factories = instantiate(options.logger, _convert_="all")
        log_evaluation(evaluation, method, open_loggers(factories, out, {**asdict(options), "method": method}))
        say(f"{method} on {summary_text(evaluation, unmet)}")
    has_failed = bool(evaluation.failures or unmet)
    if judged is not None:
        scored = [pair for pair, row in zip(pairs, evaluation.rows, strict=True) if not row.errors]
        fallback = str(options.doubt)
        doubt = measure_doubt(judged, scored, evaluator, fallback, options.scale, options.seed, processes)
        has_failed |= bool(doubt.failures)
        if processes.is_main:
            files += write_doubt(doubt, out, f"{method}, {dataset}")
            for name, why in doubt.failures.items():
                say(f"doubt of {name}: {why}")
    if processes.is_main:
        say(f"wrote {', '.join(path.name for path in files)}{' and images/' if keep else ''} to {out}")
    return evaluation, FAILED if has_failed else OK


def summary_text(evaluation: Evaluation, unmet: Sequence[str] = ()) -> str:
    """The result for the terminal: means, what is unavailable and why, what failed; `unmet` metrics were asked for."""
    summary = evaluation.summary()
    lines = [f"{summary['dataset']}, protocol {summary['protocol']}: {summary['n']} images scored"]
    for name, m in summary["metrics"].items():
        spread = "" if m["ci95"] is None else ", 95 %: {:.4f} to {:.4f}".format(*m["ci95"])
        lines.append(f"  {name:8} {m['mean']:9.4f}{spread}  (n={m['n']}, {m['id']})")
    if evaluation.seconds_per_image is not None:
        lines.append(f"  {evaluation.seconds_per_image:.3f} s per image")
    lines += [f"  {name:8} FAILED: {summary['unavailable'][name]}" for name in unmet]
    if others := [name for name in summary["unavailable"] if name not in unmet]:
        lines.append(f"  unavailable: {', '.join(others)} (summary.json says why)")
    failures = evaluation.failures
    if failures:
        lines.append(f"{len(failures)} failures:")
        lines += [f"  {line}" for line in failures[:SHOWN_FAILURES]]
        if len(failures) > SHOWN_FAILURES:
            lines.append(f"  and {len(failures) - SHOWN_FAILURES} more, see per_image.csv")
    return "\n".join(lines)


def _pairs(options: EvalOptions) -> list[Pair]:
    """The data set; a wrong folder is a mistake in the command."""
    pairs: list[Pair]
    try:
        needs_pairs = options.dataset.get("reference", False)
        pairs = [*(find_pairs(str(options.data.root)) if needs_pairs else find_images_or_pairs(str(options.data.root)))]
    except UserError as error:
        raise UsageError(str(error)) from error
    known = known_set({name: lq for name, lq, _ in pairs}) if options.dataset["name"] in PUBLISHED_SETS else None
    if known is not None and known.name != options.dataset["name"]:
        raise UsageError(
            f"data.root={options.data.root} holds the pixels of {known.name}, not of {options.dataset['name']}, whose "
            f"published figures would stand beside them: give dataset={known.name}"
        )
    if options.method == "tokenizer":
        pairs = [(name, hq, hq) for name, _, hq in pairs if hq is not None]
    expected = options.dataset.get("pairs")
    if expected is not None and len(pairs) != expected:
        log.warning(
            "data.root=%s has %d images, %s %d", options.data.root, len(pairs), options.dataset["name"], expected
        )
    return pairs


def _source(options: EvalOptions, pairs: list[Pair], processes: Processes) -> KnownSource:
    """What gives the images of the whole data set."""
    if options.predictions is not None:
        return FolderSource(options.predictions, pairs)
    if options.method == "bicubic":
        return BicubicSource(options.scale)
    if options.method == "spandrel":
        return SpandrelSource(str(options.model_path), options.scale, processes.device)
    return _system(options, processes)


def _check_source(options: EvalOptions) -> None:
    """Refuse keys that do not go together: a UsageError that says which."""
    given = [key for key in SOURCES if getattr(options, key) is not None]
    if len(given) > 1:
        raise UsageError(
            f"give one of ckpt=, predictions= and method= to say what is scored, got {' and '.join(given)}"
        )
    if options.method == "spandrel" and options.model_path is None:
        raise UsageError("method=spandrel needs model_path=FILE, the model that is to be scored")
    if options.model_path is not None and options.method not in ("spandrel", "tokenizer"):
        raise UsageError("model_path= is for method=spandrel and method=tokenizer")
    is_other = options.predictions or options.method
    for key, usual in (("precision", None), ("steps", "one")):
        if is_other and getattr(options, key) != usual:
            raise UsageError(f"{key}= is for ckpt=MODEL, or the shipped model")
    if options.doubt and (is_other or options.steps != "one" or options.size):
        raise UsageError("doubt= is for ckpt=MODEL, or the shipped model, in its own steps and size")


def _system(options: EvalOptions, processes: Processes) -> KnownSource:
    """The network, known by its weights as they are in the file: merged ones may differ from machine to machine."""
    model = options.model_path if options.method == "tokenizer" else options.ckpt
    with processes.main_first():
        system = load(model)
    settings: dict[str, Any] = {"ckpt": DEFAULT if model is None else model, "weights": weights_digest(system)}
    system.to(processes.device)
    if options.method == "tokenizer":
        return ReconstructionSource(system, settings)
    system.check_source()
    settings |= system.traits  # of the same weights, other traits make other images
    is_one_step = options.steps == "one"
    if options.precision is not None:
        acceleration = Acceleration(is_one_step, options.precision).on(processes.device)
        settings["precision"] = acceleration.precision
        system.accelerate(acceleration)
    elif is_one_step:
        system.merge_adapters()
    if options.size is not None:
        try:
            system.sides_of([options.size], options.scale)
        except UserError as error:
            raise UsageError(str(error)) from error
    return SystemSource(system, options.scale, options.seed, settings, options.steps, options.size)


def _evaluator(options: EvalOptions, processes: Processes, has_references: bool) -> Evaluator:
    """The metrics that run in every process."""
    batch = 1 if processes.device.type == "cpu" else BATCH_ON_ACCELERATORS
    with processes.main_first():
        evaluator = Evaluator(
            load_protocol(str(options.protocol["name"]), options.protocol.get("metrics")),
            None if options.metrics is None else as_list(options.metrics),
            device=processes.device,
            weights_folder=options.metric_weights,
            offline=options.offline,
            seed=options.seed,
            references=has_references,
            batch=batch if options.batch is None else options.batch,
        )
    evaluator.drop(dict(processes.gather(list(evaluator.unavailable.items()))))
    return evaluator


def _settings(options: EvalOptions, evaluator: Evaluator, source: KnownSource, processes: Processes) -> dict[str, Any]:
    """What the figures depend on: an evaluation is taken up again only where all of it is the same."""
    weights = {name: metric.weights[:16] for name, metric in evaluator.metrics.items() if metric.weights}
    return {
        "dataset": options.dataset["name"],
        "data.root": str(expand_user(str(options.data.root)).resolve()),
        "protocol": evaluator.protocol.name,
        "metrics": [evaluator.ids[name] for name in evaluator.columns],
        "metric weights": weights,
        "seed": options.seed,
        **({} if options.size is None else {"size": options.size}),
        "device": processes.device.type,
        **source.settings,
    }


COMMAND = Command("eval", run_eval, EvalOptions)
