"""`prepare_data`: where the test sets come from, whether a folder is one, making one; photographs to train on."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from textwrap import fill
from typing import cast

from hydra.utils import get_object, instantiate

from varestorer.commands.entry import FAILED, OK, Command, say
from varestorer.commands.options import PrepareDataOptions
from varestorer.data.degradation import Degradation
from varestorer.data.packing import pack
from varestorer.data.quality import SCORE_SETS, link_split, split_by_scores
from varestorer.data.testsets.checking import MANIFEST, Check, Manifest, check_test_set
from varestorer.data.testsets.known import BENCHMARKS, Benchmark
from varestorer.data.testsets.making import Recipe, make_test_set
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.files import expand_user
from varestorer.utils.locks import locked
from varestorer.utils.scanning import first_names

SHOWN_KINDS = 4
WIDTH = 110
MEGABYTE = 1_000_000


def prepare_data(options: PrepareDataOptions) -> int:
    """Run the command (`PrepareDataOptions`); exit status 1 if a check found something.

    UsageError for keys that do not go together, values that cannot be, no such folder; UserError if the set cannot be
    made.
    """
    check_options(options)
    writes = make if options.make else shard if options.shard else split if options.split else None
    if writes is not None:
        say("\n".join(writes(options)))
        return OK
    if not options.dataset:
        say(overview())
        return OK
    name = options.dataset.get("name")
    if name not in BENCHMARKS:
        raise UsageError(
            f"dataset must be one of {', '.join(BENCHMARKS)}, got {name!r}; for your own use folder or images"
        )
    if not options.data.root:
        say(card(BENCHMARKS[name]))
        return OK
    return check(BENCHMARKS[name], options)


def check_options(options: PrepareDataOptions) -> None:
    """Refuse what cannot be: a UsageError that names the key, what it was and what it may be."""
    check_writing_options(options)
    if options.data.root and not options.dataset:
        raise UsageError(f"data.root= needs dataset=, what the folder should be: {', '.join(BENCHMARKS)}")
    if options.manifest and not options.data.root:
        raise UsageError("manifest= needs data.root=, the folder whose pixels are compared with it")
    for key, folder in (("data.root", options.data.root), ("source", options.source)):
        if folder and not expand_user(folder).is_dir():
            raise UsageError(f"{key}={folder} is no folder; give one that exists")


def check_writing_options(options: PrepareDataOptions) -> None:
    """Refuse what cannot be asked of make=, shard= and split=: a UsageError that names the keys."""
    given = [key for key in ("make", "shard", "split") if getattr(options, key)]
    if len(given) > 1:
        raise UsageError(f"{given[0]}= and {given[1]}= are two commands: give one of them")
    out = bool(given)
    if out != bool(options.source):
        where = "make=FOLDER, shard=FOLDER or split=FOLDER (where the set goes)"
        raise UsageError(f"{where} and source=FOLDER (good photographs) go together: give both")
    if out and (options.dataset or options.data.root or options.manifest):
        others = "leave out dataset=, data.root= and manifest=, which check one"
        raise UsageError(f"make=, shard= and split= make a set of their own: {others}")
    if bool(options.split) != bool(options.scores):
        raise UsageError("split=FOLDER and scores=FILE.csv (the pictures' scores) go together: give both")
    if (options.set or options.column or options.share is not None) and not options.split:
        raise UsageError("set=, column= and share= go with split=FOLDER")
    if options.text and not options.shard:
        raise UsageError("text= goes with shard=: the folder of texts to pack beside the photographs")


def overview() -> str:
    """What sets there are, and what to type next."""
    width = max(map(len, BENCHMARKS))
    lines = [f"  {name:{width}}  {benchmark.title}" for name, benchmark in BENCHMARKS.items()]
    return "\n".join(
        [
            "test sets:",
            *lines,
            "",
            "next:",
            "  python scripts/prepare_data.py dataset=realsr                     where it comes from, what it holds",
            "  python scripts/prepare_data.py dataset=realsr data.root=FOLDER    check a folder",
            "  python scripts/prepare_data.py make=FOLDER source=PHOTOS_FOLDER   make a set like div2k",
            "  python scripts/prepare_data.py shard=FOLDER source=PHOTOS_FOLDER  pack photographs to train on",
        ]
    )


def card(benchmark: Benchmark) -> str:
    """What a set is, and what to type next."""
    root = benchmark.root
    steps = [*benchmark.fetch, f"python scripts/prepare_data.py dataset={benchmark.name} data.root={root}"]
    parts = {
        "for": benchmark.purpose,
        "from": benchmark.origin,
        "folder": benchmark.layout,
        "license": benchmark.license,
    }
    lines = [
        fill(text, WIDTH, initial_indent=f"  {name:9}", subsequent_indent=" " * 11, break_on_hyphens=False)
        for name, text in parts.items()
    ]
    title = f"{benchmark.name}: {benchmark.title}"
    return "\n".join([title, *lines, "", "next:", *(f"  {step}" for step in steps)])


def check(benchmark: Benchmark, options: PrepareDataOptions) -> int:
    """Check a folder and say what was found; returns the exit status."""
    root = expand_user(cast(str, options.data.root))
    path = expand_user(options.manifest) if options.manifest else root / MANIFEST
    manifest = Manifest.load(path) if options.manifest or path.is_file() else None
    found = check_test_set(root, benchmark, options.scale, manifest)
    say("\n".join([f"{benchmark.name}: {benchmark.title}", f"folder: {root}", *findings(found, benchmark)]))
    if manifest is not None:
        say(f"manifest: {path}, {'the same' if found.is_good else 'compared'}; made with {_listed(manifest.versions)}")
    if not found.is_good:
        counts = f"{len(found.problems)} of the folder, {len(found.offenders)} of files"
        say(f"verdict: NOT usable as {benchmark.name}; problems named above: {counts}")
        return FAILED
    say(
        f"verdict: good, usable as {benchmark.name}; next:\n"
        f"  python scripts/eval.py dataset={benchmark.name} data.root={quote(str(root))} ckpt=MODEL"
    )
    return OK


def findings(found: Check, benchmark: Benchmark) -> list[str]:
    """What there is, and everything wrong with it."""
    lines = []
    for side, folder in found.folders.items():
        kinds = found.kinds(side)
        shown = [f"{number} {kind}" for kind, number in kinds.most_common(SHOWN_KINDS)]
        rest = len(kinds) - len(shown)
        shown += [f"{rest} other kinds"] if rest > 0 else []
        lines.append(f"{side} ({folder.name}): {len(found.images[side])} images read: {'; '.join(shown) or 'none'}")
    lines += [f"pixels of {side}: sha256 {digest}" for side, digest in found.digests().items()]
    if benchmark.pixels and found.is_good:
        same = found.digests() == benchmark.pixels
        lines.append(f"  {'the same as' if same else 'NOT the same as'} in the copy that this evaluator is tested with")
    lines += [f"problem: {problem}" for problem in found.problems]
    lines += [f"{name}: {'; '.join(reasons)}" for name, reasons in found.offenders.items()]
    return lines


def make(options: PrepareDataOptions) -> list[str]:
    """Make a set; returns what to say of it.

    UsageError for a degradation of another kind, or a crop that is no multiple of the scale; UserError if the set
    cannot be made.
    """
    if get_object(options.degradation["_target_"]) is not Degradation:
        raise UsageError(
            "make= degrades in one second-order way: degradation=realesrgan, telephone or camera, with settings of "
            "your own"
        )
    if options.crop % options.scale:
        raise UsageError(f"crop must be a multiple of scale {options.scale}, got crop={options.crop}")
    root, source = _two_folders("make", options.make, options.source)
    options.degradation["scale"] = options.scale
    degradation = instantiate(options.degradation)
    noted = {key: getattr(options, key) for key in ("seed", "crop", "scale", "degradation")}
    recipe = Recipe(options.crop, options.seed, degradation)
    with locked(root):
        manifest = make_test_set(root, source, recipe, noted, options.count, options.workers)
    lines = [f"skipped: {reason}" for reason in manifest.skipped.values()]
    lines += [f"pixels of {side}: sha256 {digest}" for side, digest in manifest.digests().items()]
    return [
        *lines,
        f"computed with {_listed(manifest.versions)}",
        f"{len(manifest.pairs)} pairs in {root}, their hashes in {root / MANIFEST}; next:",
        f"  python scripts/eval.py dataset=folder data.root={quote(str(root))} ckpt=MODEL",
    ]


def shard(options: PrepareDataOptions) -> list[str]:
    """Pack photographs into tar files; returns what to say of them.

    UsageError if the folder lies in that of the photographs; UserError if they cannot be packed.
    """
    root, source = _two_folders("shard", options.shard, options.source)
    with locked(root):
        packing = pack(root, source, options.shard_mb * MEGABYTE, options.text)
    return [
        *(f"skipped: {reason}" for reason in packing.skipped),
        f"{packing.num_photographs} photographs in {len(packing.shards)} shards in {root}; next:",
        f"  python scripts/train.py +experiment=NAME data=shards data.root={quote(str(root))}",
    ]


def split(options: PrepareDataOptions) -> list[str]:
    """Tell good pictures from bad ones; returns what to say of them.

    UsageError for scores that nobody knows how to read, or no such file; UserError if no picture is good, or none bad.
    """
    root, source = _two_folders("split", options.split, options.source)
    scores = expand_user(options.scores or "")
    if not scores.is_file():
        raise UsageError(f"scores={scores} is no file; give the CSV of the pictures' scores")
    if options.set is not None and options.set not in SCORE_SETS:
        raise UsageError(f"set must be one of {', '.join(SCORE_SETS)}, got set={options.set}")
    known = SCORE_SETS.get(options.set or "")
    column = known[1] if options.column is None and known is not None else options.column
    share = known[0] if options.share is None and known is not None else options.share
    if column is None or share is None:
        raise UsageError("give column=NAME (of the scores) and share= (of the largest score), or set= that knows both")
    found = split_by_scores(source, scores, column, share)
    missing = f"{len(found.missing)} of {scores} are not in {source}: {first_names(found.missing)}"
    if not found.good or not found.bad:
        counts = f"{len(found.good)} good and {len(found.bad)} bad pictures"
        raise UserError(f"{counts} at a threshold of {found.threshold:g}: {missing if found.missing else 'see share='}")
    with locked(root):
        link_split(found, source, root)
    lines = [f"skipped: {missing}"] if found.missing else []
    if found.unscored:
        lines.append(f"skipped: {len(found.unscored)} without a number for a score: {first_names(found.unscored)}")
    good, bad = (quote(str(root / name)) for name in ("good", "bad"))
    return [
        *lines,
        f"{len(found.good)} good, {len(found.bad)} bad (score below {found.threshold:g}) in {root}; next:",
        f"  python scripts/train.py +experiment=varsr_isr data.root={good} data.bad={bad}",
    ]


def _two_folders(key: str, made: str | None, source: str | None) -> tuple[Path, Path]:
    """The folder to make, and that of the photographs, which must not hold it."""
    root, photographs = expand_user(made or ""), expand_user(source or "")
    if photographs.resolve() in (root.resolve(), *root.resolve().parents):
        raise UsageError(
            f"{key}={root} lies in the folder of photographs, source={photographs}; give a folder outside of it"
        )
    return root, photographs


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


COMMAND = Command("prepare_data", prepare_data, PrepareDataOptions)
