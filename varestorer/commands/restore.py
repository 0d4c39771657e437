"""`varestorer restore`: one picture or a folder of them, any size."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from varestorer.commands.entry import FAILED, OK, Command, say
from varestorer.commands.options import RestoreOptions
from varestorer.systems import load
from varestorer.systems.acceleration import Acceleration
from varestorer.systems.base import whole_number
from varestorer.systems.budget import Budget, gigabytes, measure
from varestorer.systems.folder import FolderReport, Restored, RestoreImage, restore_files
from varestorer.systems.plan import REPORT_NAME, Job, Plan, plan_restoration
from varestorer.systems.prompts import TextOptions, Texts, find_texts
from varestorer.systems.varestorer import VARestorer
from varestorer.utils.device import limit_threads, parse_memory, pick_device
from varestorer.utils.errors import UsageError, UserError, reason
from varestorer.utils.files import check_writable
from varestorer.utils.images import Writing, resize, to_uint8
from varestorer.utils.tiling import scaled_size
from varestorer.weights import DEFAULT

LOG = logging.getLogger(__name__)
TARGETS = ("width", "height", "megapixels")  # in place of scale
Squares = Callable[[str, tuple[int, int], float], AbstractContextManager[Callable[[int, int], None]]]
MOST_SQUARES = 8  # at once, where max_memory chooses
LARGE = 3e6  # pixels of a photograph that is wanted cleaner sooner than four times as large
LARGE_HINT = "large photographs: scale=1 reduce=2 keeps their size, cleans them, and takes a quarter of the time"
FACES = "faces"  # entry of `System.weak`
FACE_SIDE = 480  # pixels of the longer side, at which faces are looked for
FACE_VOTES = {"min_neighbor_number": 6, "intersection_score_threshold": 0.5}
BAR = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt}{unit} [{elapsed}, {remaining} left]"


def restore(options: RestoreOptions) -> int:
    """Texts first, then the images, so that only the networks in use take memory; exit status 1 if a file failed.

    UsageError for an option that cannot be, no such input; UserError if the checkpoint, the text encoder, the captioner
    or the output folder cannot be used.
    """
    check_options(options)
    device = pick_device(options.device)
    limit_threads()
    sizes = sorted(set(options.sizes or ()))
    labels = tuple(size_label(size) for size in sizes[:-1])
    plan = plan_restoration(options.input, options.output, labels, options.format and f".{options.format}")
    check_quality(plan, options.quality)
    check_writable(plan.output, "output")

    # on the CPU its files are only mapped: weights take no memory before they are used
    merge = options.steps == "one" and options.compat is None
    system = load(options.ckpt, device="cpu", merge=merge)
    check_fit(system, options)
    for weakness, why in system.weak.items():
        key, _, value = weakness.partition("=")
        if str(getattr(options, key, None)) == value:
            LOG.warning("this model is poor at %s: %s", weakness, why)
    pending = plan.pending(options.overwrite)
    wanted = TextOptions(options.prompt, options.caption == "auto", options.text_encoder, options.captioner)
    texts = find_texts(system, pending, wanted, device, options.scale, options.max_pixels)
    budget = None
    if options.max_memory is not None:
        system, options, budget = fit(system, options, texts, device, plan)
    else:
        system.to(device)
        if options.compat is None:
            system.accelerate(means(options))
    run = bind(system, options, texts, budget)
    settings = settings_of(options, system.acceleration)
    writing = Writing(quality=options.quality, gps=options.gps)
    check = None if budget is None else partial(batch_of, budget, options)
    report = restore_files(plan, run, options.seed, settings, options.overwrite, options.max_pixels, writing, check)
    say(summary(report))
    return FAILED if report.failed else OK


def check_options(options: RestoreOptions) -> None:
    """Refuse what cannot be before anything is loaded: a UsageError that names the key and what it may be."""
    if not re.fullmatch(r"one|multi|[1-9]\d*", options.steps):
        raise UsageError(f"steps must be one, multi or a number from 1, got steps={options.steps}")
    targets = [key for key in TARGETS if getattr(options, key) is not None]
    if targets and (options.scale != RestoreOptions.scale or options.sizes or options.compat):
        raise UsageError(f"{targets[0]} says the size of the result, and so do scale, sizes and compat: leave them out")
    if len(targets) > 1 and "megapixels" in targets:
        raise UsageError(f"megapixels and {targets[0]} contradict each other: leave one of them out")
    if options.prompt and options.caption == "auto":
        raise UsageError("prompt and caption=auto contradict each other: give the text, or have images described")
    if (options.uncertainty or options.fidelity) and options.steps == "multi":
        raise UsageError(
            "uncertainty= and fidelity= are about the student, which steps=multi does not ask: use steps=one or K"
        )
    if options.sizes and (options.fidelity or options.reduce != 1):
        raise UsageError("fidelity= and reduce= are for one size: leave sizes= out")
    if options.linears != "none" and options.steps != "one":
        raise UsageError(f"linears={options.linears} is for one step, got steps={options.steps}; leave one of them out")
    check_memory(options)
    own = (
        *("max_memory", "sizes", "reduce", "select", "steps", "color", "overlap", "batch", "uncertainty", "fidelity"),
        *("precision", "compile", "graphs", "linears"),
    )
    changed = [f"{key}={getattr(options, key)}" for key in own if getattr(options, key) != getattr(RestoreOptions, key)]
    if options.compat and changed:
        raise UsageError(f"compat=official does everything the released way: leave out {' '.join(changed)}")


def check_memory(options: RestoreOptions) -> None:
    """Refuse a limit of memory that is none, or that cannot be kept to."""
    if options.max_memory is not None:
        try:
            parse_memory(options.max_memory)
        except ValueError as error:
            raise UsageError(f"max_memory: {reason(error)}") from error
        if options.compile or options.graphs:
            raise UsageError("max_memory needs batches of any size, compile and graphs one: leave one of them out")


def check_quality(plan: Plan, quality: int | None) -> None:
    """Refuse a quality where nothing is lost: a UsageError that names the formats that have one."""
    ending = Path(plan.jobs[0].target).suffix.lower() if plan.jobs else ""
    if quality is not None and ending not in (".jpg", ".jpeg", ".webp", ".avif"):
        raise UsageError(f"quality={quality} is for jpg, webp and avif, and results are {ending[1:]}: add format=jpg")


def check_fit(system: VARestorer, options: RestoreOptions) -> None:
    """Refuse what this model cannot do (UsageError), before it costs more than reading the sizes of its files."""
    num_scales, tile = len(system.schedule), options.tile or system.tile
    tiles = (system.tile,) if options.compat else system.tiles
    if tile not in tiles:
        how = "compat=official with this model" if options.compat else "this model"
        raise UsageError(f"tile must be {' or '.join(map(str, tiles))} pixels for {how}, got tile={tile}")
    if options.overlap is not None and options.overlap >= tile:
        raise UsageError(f"overlap must be below the tile's {tile} pixels, got overlap={options.overlap}")
    if options.sizes is not None:
        try:
            system.sides_of(options.sizes, options.scale)
        except UserError as error:
            raise UsageError(str(error)) from error
    student = getattr(system, "student_config", None)  # of systems that have one
    if student is not None and options.steps != "one" and student.merged:
        raise UsageError(
            f"steps must be one for a model whose adapters are merged (no teacher is left), got steps={options.steps}"
        )
    if options.steps != "multi":
        system.check_source()
    if options.compat:
        system.check_official()
    if options.steps.isdecimal() and int(options.steps) > num_scales:
        raise UsageError(f"steps must be one, multi or 1 to {num_scales} for this model, got steps={options.steps}")


def means(options: RestoreOptions) -> Acceleration:
    """How restoring is made fast; the adapters stay apart where the teacher is needed."""
    merge = options.steps == "one"
    return Acceleration(merge, options.precision, options.compile, options.graphs, options.linears)


def settings_of(options: RestoreOptions, acceleration: Acceleration | None) -> dict[str, Any]:
    """What decides how a result looks, besides image and seed: the entries of `restore.json` hold it."""
    keys = ("select", "steps", "color", "tile", "overlap", "compat")
    ckpt = DEFAULT if options.ckpt is None else options.ckpt
    size = {key: wish for key in TARGETS if (wish := getattr(options, key)) is not None}
    size = size or {"scale": whole_number(options.scale)}
    settings = {**size, "ckpt": ckpt, **{key: getattr(options, key) for key in keys}}
    for key in ("trained_scale", "reduce"):
        if getattr(options, key) != getattr(RestoreOptions, key):
            settings[key] = getattr(options, key)
    if acceleration is not None:
        settings |= {"precision": acceleration.precision, "linears": acceleration.linears}
    if options.fidelity:
        settings["fidelity"] = options.fidelity
    if options.sizes is not None:
        settings["sizes"] = [whole_number(size) for size in options.sizes]
    return settings if options.caption == "auto" else settings | {"prompt": options.prompt}


def scale_of(options: RestoreOptions, height: int, width: int) -> float:
    """The enlargement of an image of this size (pixels) that is asked for."""
    if options.megapixels is not None:
        return math.sqrt(options.megapixels * 1e6 / (height * width))
    factors = [wish / side for wish, side in ((options.width, width), (options.height, height)) if wish is not None]
    return min(factors, default=whole_number(options.scale))


def size_label(size: float) -> str:
    """What the file of a smaller size is called by: x1, x0.75."""
    return f"x{size:g}"


def fit(
    system: VARestorer, options: RestoreOptions, texts: Texts, device: torch.device, plan: Plan
) -> tuple[VARestorer, RestoreOptions, Budget]:
    """Choose precision, tile and batch so that restoring keeps to `max_memory`, and say what that leaves.

    Half the bits change a result less than smaller squares do, so they come first. UserError: not even these fit.

    Returns:
        the system, accelerated; the options with the tile and the precision; what pictures have room for.
    """
    limit = parse_memory(str(options.max_memory))
    own = means(options).on(device).precision
    ways = [(options.precision, options.tile)]
    if options.precision == "auto" and own != "bf16" and options.linears == "none":
        ways.append(("bf16", options.tile))
    if options.tile is None:
        ways += [(ways[-1][0], side) for side in sorted(system.tiles, reverse=True) if side < system.tile]
    features = max(texts.features.values(), key=len, default=None)
    maps = len(system.schedule)
    channels = 2 * maps + 21 if options.fidelity else 3 + maps * options.uncertainty + (1 if options.sizes else 0)
    budget = Budget(limit, 0, 0, 0, 0, 0, channels, options.batch or MOST_SQUARES)
    writing = Writing(quality=options.quality)
    target = plan.jobs[0].target if plan.jobs else "none.png"
    for precision, tile in ways:
        chosen = replace(options, precision=precision, tile=tile)
        acceleration = means(chosen).on(device)
        if system.acceleration not in (None, acceleration):  # it cannot be undone
            system.to("meta")  # whoever holds it
            system = load(options.ckpt, device="cpu", merge=options.steps == "one")
        system.to(device)
        system.accelerate(acceleration)
        side = tile or system.tile
        way = wishes(chosen) | {
            "trained_scale": 1,
            "overlap": 0,
            "tile": tile,
            "sizes": None,
            "reduce": 1,
            "prompt": features,
        }

        def probe(number: int, system: VARestorer = system, side: int = side, way: dict[str, Any] = way) -> None:
            """Restore so many squares at once."""
            system.restore(torch.rand(3, side, number * side), 1, **way | {"batch": number})

        found = measure(limit, device, probe, target, writing, budget)
        if found is not None:
            break
    else:
        raise UserError(f"max_memory={options.max_memory} is too little for one square of {side} pixels: raise it")
    if device.type == "cuda":  # torch gives back what it keeps, and raises, before it takes more
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0), device)
    scale = RestoreOptions.scale if any(getattr(options, key) for key in TARGETS) else options.scale
    LOG.info(
        "max_memory=%s: %s are held already; squares of %d pixels in %s, up to %d at once, need %s; results of up to "
        "%.1f megapixels fit",
        options.max_memory,
        gigabytes(found.held),
        side,
        acceleration.precision,
        most := max(1, min(int((found.free - found.batch_base) // found.square), found.most)),
        gigabytes(found.batch_base + most * found.square),
        found.largest(scale, options.trained_scale / options.reduce) / 1e6,
    )
    return system, chosen, found


def batch_of(budget: Budget, options: RestoreOptions, height: int, width: int) -> int:
    """Squares at once for a picture of this size, see `Budget.batch_for`."""
    scale = scale_of(options, height, width)
    least = scale if options.sizes else max(scale, options.trained_scale / options.reduce)
    made, wanted = (math.prod(scaled_size(height, width, factor)) for factor in (least, scale))
    return budget.batch_for(height * width, made, wanted)


def wishes(options: RestoreOptions) -> dict[str, Any]:
    """What `System.restore` is asked for; the rest it chooses itself."""
    keys = (
        "select",
        "steps",
        "color",
        "tile",
        "overlap",
        "batch",
        "uncertainty",
        "fidelity",
        "sizes",
        "trained_scale",
        "reduce",
    )
    values = {key: getattr(options, key) for key in keys}
    values["steps"] = None if options.steps == "one" else options.steps  # the way of the system
    return {key: value for key, value in values.items() if value is not None}


def bind(
    system: VARestorer,
    options: RestoreOptions,
    texts: Texts,
    budget: Budget | None = None,
    squares: Squares | None = None,
) -> RestoreImage:
    """Bind the options, so that only an image, its job and its seed are missing; `squares` shows progress."""
    chosen = wishes(options)
    is_hinted = options.reduce > 1 or options.compat is not None or bool(options.sizes)

    def run(image_3HW: Tensor, job: Job, seed: int) -> Restored:
        nonlocal is_hinted
        prompt = texts.prompts.get(job.name)
        height, width = image_3HW.shape[-2:]
        if height * width > LARGE and not is_hinted:
            LOG.info(LARGE_HINT)
            is_hinted = True
        scale = scale_of(options, height, width)
        text = None if prompt is None else texts.features.get(prompt)
        details: dict[str, Any] = {"prompt": prompt}
        if prompt is not None and text is None:
            details["prompt_used"] = False
        if options.compat:
            is_tiled = options.tile is not None
            official = system.restore_official(image_3HW, scale, prompt=text, tiled=is_tiled, seed=seed)
            return Restored(official, details=details)
        batch = {} if budget is None else {"batch": batch_of(budget, options, height, width)}
        warnings = []
        if FACES in system.weak and shows_face(image_3HW):
            warnings.append(f"it seems to show a face, which this model is poor at: {system.weak[FACES]}")
            LOG.warning("%s: %s", job.name, warnings[0])
        with (squares or show_squares)(job.name, (height, width), scale) as progress:
            ways = chosen | batch | {"progress": progress}
            result = system.restore(image_3HW, scale, prompt=text, seed=seed, **ways)
        warnings += result.warnings
        details |= {"warnings": warnings} if warnings else {}
        maps_KHW = result.uncertainty_KHW
        smaller = {size_label(size): image for size, image in result.smaller.items()} if options.sizes else {}
        return Restored(result.image, None if maps_KHW is None else maps_KHW.mean(dim=0), details, smaller)

    return run


def shows_face(image_3HW: Tensor) -> bool:
    """Whether a picture, in [0, 1], seems to show a face from the front, of an eighth of its longer side or more.

    By the cascade that scikit-image carries: of local binary patterns.
    """
    from skimage.data import lbp_frontal_face_cascade_filename
    from skimage.feature import Cascade

    share = FACE_SIDE / max(image_3HW.shape[-2:])
    size = [max(round(side * share), 1) for side in image_3HW.shape[-2:]]
    seen_3hw = resize(image_3HW.float().cpu(), (size[0], size[1]), "area" if share < 1 else "bicubic")
    sides = {"min_size": (FACE_SIDE // 8,) * 2, "max_size": (FACE_SIDE,) * 2}
    cascade = Cascade(lbp_frontal_face_cascade_filename())
    found = cascade.detect_multi_scale(to_uint8(seen_3hw).permute(1, 2, 0).numpy(), 1.2, 1, **sides, **FACE_VOTES)
    return bool(found)


@contextmanager
def show_squares(name: str, size: tuple[int, int], scale: float) -> Iterator[Callable[[int, int], None]]:
    """Show how many squares of an image of `size` are done, and the time left; what is ahead is said first."""
    height, width = scaled_size(*size, scale)
    with ExitStack() as stack:
        bar: tqdm | None = None

        def show(done: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                LOG.info("%s: %d x %d -> %d x %d pixels, squares: %d", name, *size[::-1], width, height, total)
                bar = stack.enter_context(tqdm(desc=name, total=total, unit=" squares", leave=False, bar_format=BAR))
            bar.update(done - bar.n)
            bar.refresh()

        yield show


def summary(report: FolderReport) -> str:
    """What was done, what failed and why, and where it all is."""
    lines = [f"failed: {name}: {reason}" for name, reason in report.failed.items()]
    counts = [f"{report.num_restored} restored"]
    if report.num_skipped:
        others = f", {report.num_differing} of them of other settings" if report.num_differing else ""
        counts.append(f"{report.num_skipped} had a result already{others} (overwrite=true restores them again)")
    if report.failed:
        counts.append(f"{len(report.failed)} failed")
    is_report = report.path.name == REPORT_NAME
    places = f"results in {report.path.parent}, details in {report.path}" if is_report else f"see {report.path}"
    return "\n".join([*lines, f"{', '.join(counts)}; {places}"])


COMMAND = Command("restore", restore, RestoreOptions)
