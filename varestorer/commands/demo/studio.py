"""Behind the page: models that stay loaded, visitors that take turns, and their pictures. Knows nothing of gradio."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock
from typing import Any
from zipfile import ZipFile

import numpy as np
from PIL import ExifTags
from torch import Tensor

from varestorer.commands.options import DemoOptions, RestoreOptions
from varestorer.commands.restore import LARGE, bind, check_fit, means
from varestorer.systems import load
from varestorer.systems.base import Request
from varestorer.systems.folder import Restored, restore_files
from varestorer.systems.plan import Job, Plan
from varestorer.systems.prompts import TextOptions, find_texts, reads_text
from varestorer.utils.device import limit_threads, pick_device
from varestorer.utils.errors import UserError
from varestorer.utils.files import fitting_name
from varestorer.utils.image_files import open_image
from varestorer.utils.images import Writing, heat_map, load_picture, resize, save_image
from varestorer.utils.schema import check
from varestorer.utils.tiling import num_tiles, scaled_size
from varestorer.weights import DEFAULT
from varestorer.weights.resolve import models_by_system

KEPT = 2  # models in memory
VIEW = 4096  # longest side of what the page shows, pixels
MAP_PIXELS = 2**24  # of a result: its map of uncertainty has as many channels as there are scales
STRETCH = (2.0, 98.0)  # percentiles of the uncertainty that get the ends of the color scale
TURNED = (5, 6, 7, 8)  # orientations of EXIF that swap width and height


class CancelledError(Exception):
    """The visitor has had enough."""


@dataclass
class Model:
    """A system ready to restore: its `ways` from before adapters were merged, and seconds that a square took last."""

    system: Any
    ways: list[str]
    reads_text: bool
    seconds: float | None = None


@dataclass(frozen=True)
class Result:
    """A restored picture: the PNG; what the page shows of it; what the ends of the overlay's colors mean (entropy);
    what the visitor should know of it."""

    name: str
    picture: Path
    before: Path
    after: Path
    overlay: Path | None
    span: tuple[float, float]
    size: str
    warnings: tuple[str, ...] = ()


class Studio:
    """Restores for all visitors, one picture at a time.

    Attributes:
        choices: name of a system -> checkpoints of it that can be chosen, `first` at first.
    Raises:
        UserError: the first checkpoint, or the device, cannot be used.
    """

    def __init__(self, options: DemoOptions, folder: Path) -> None:
        limit_threads()
        self.options, self.folder = options, folder
        self.device, self.first = pick_device(options.device), options.ckpt or DEFAULT
        self._models: OrderedDict[tuple[str, bool], Model] = OrderedDict()
        self._loading, self._turn = Lock(), Lock()
        self.model(self.first)
        self.choices = models_by_system(options.models, self.first, DEFAULT)

    def model(self, ckpt: str, steps: str = "one") -> Model:
        """A model, loaded if it is not; the one that was used longest ago makes room. One step merges its adapters."""
        key = ckpt, steps == "one"
        with self._loading:
            if key not in self._models:
                while len(self._models) >= KEPT:
                    self._models.popitem(last=False)
                system = load(ckpt)
                model = Model(system, system.ways, reads_text(system, self.options.text_encoder))
                system.to(self.device).accelerate(means(self._wishes(ckpt, {"steps": steps})))
                self._models[key] = model
            self._models.move_to_end(key)
            return self._models[key]

    def _wishes(self, ckpt: str, wishes: dict[str, Any]) -> RestoreOptions:
        batch = self.options.batch or (1 if self.device.type == "cpu" else None)
        fixed: dict[str, Any] = {"input": "", "output": "", "batch": batch, "precision": self.options.precision}
        return RestoreOptions(ckpt=ckpt, **fixed, **wishes)

    def preview(self, file: str, ckpt: str, scale: float, reduce: int = 1) -> str:
        """How large a file becomes, and about how long that takes; or what is wrong with it."""
        name = Path(file).name
        try:
            model = self.model(ckpt)
            height, width = size_of(file)
            least = RestoreOptions.trained_scale / reduce  # it is made at, and reduced
            larger, whole = (scaled_size(height, width, max(scale, one)) for one in (0, least))
            squares = num_tiles(whole, model.system.tile, model.system.tile // 4, model.system.step)
        except UserError as error:
            return str(error).replace(file, name)
        seconds = "" if model.seconds is None else f", about {model.seconds * squares:.0f} s"
        return f"{name}: {width} x {height} to {larger[1]} x {larger[0]} pixels, squares: {squares}{seconds}"

    def restore(
        self, files: Sequence[str], ckpt: str, wishes: dict[str, Any], stop: Event, tell: Callable[[float, str], None]
    ) -> Iterator[Result | str]:
        """Restore a visitor's files, in turn with those of others; yields a result, or a line about what failed.

        `tell` is called with the share that is done, 0 to 1, and a line; `stop` ends it after the square in work.

        Raises:
            UserError: what is wished for cannot be done.
            CancelledError: `stop` was set.
        """
        options = self._wishes(ckpt, wishes)
        check(options)
        for number, file in enumerate(files, 1):
            place = f"{Path(file).name} ({number} of {len(files)})" if len(files) > 1 else Path(file).name
            while not self._turn.acquire(timeout=0.2):
                tell(0, f"{place}: another visitor's picture comes first")
                if stop.is_set():
                    raise CancelledError
            try:
                done = self._restore_one(Path(file), options, stop, tell, place)
            finally:
                self._turn.release()
            yield done

    def _restore_one(
        self, file: Path, options: RestoreOptions, stop: Event, tell: Callable[[float, str], None], place: str
    ) -> Result | str:
        model = self.model(str(options.ckpt), options.steps)
        check_fit(model.system, options)
        job = Job(file, file.name, fitting_name(file.stem, f"_x{options.scale:g}.png"))
        wanted = TextOptions(options.prompt if model.reads_text else None, text_encoder=self.options.text_encoder)
        texts = find_texts(model.system, [job], wanted, self.device, options.scale)
        maps: list[Tensor | None] = []
        warnings: list[str] = []

        @contextmanager
        def squares(*_: Any) -> Iterator[Callable[[int, int], None]]:
            start = time.perf_counter()

            def show(done: int, total: int) -> None:
                if stop.is_set():
                    raise CancelledError
                model.seconds = (time.perf_counter() - start) / done if done else model.seconds
                left = "" if model.seconds is None else f", {model.seconds * (total - done):.0f} s left"
                tell(done / total, f"{place}: square {done} of {total}{left}")

            yield show

        def run(image_3HW: Tensor, job: Job, seed: int) -> Restored:
            height, width = scaled_size(image_3HW.shape[1], image_3HW.shape[2], options.scale)
            if height * width > self.options.max_megapixels * 1e6:
                most = f"above {self.options.max_megapixels:g} megapixels"
                raise UserError(f"the result would have {width} x {height} pixels, {most}; choose a smaller scale")
            has_map = options.uncertainty and height * width <= MAP_PIXELS
            try:
                model.system.accept(Request(steps=None if options.steps == "one" else options.steps), has_map)
            except UserError:  # not all ways of all systems know where they guessed
                has_map = False
            chosen = replace(options, uncertainty=has_map)
            restored = bind(model.system, chosen, texts, squares=squares)(image_3HW, job, seed)
            maps.append(restored.uncertainty)
            warnings.extend(restored.details.get("warnings", ()))
            return replace(restored, uncertainty=None)

        if stop.is_set():
            raise CancelledError
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        report = restore_files(Plan(folder, [job], has_report=False), run, options.seed)
        if report.failed:
            why = report.failed[job.name].replace(str(file), file.name)
            return why if file.name in why else f"{file.name}: {why}"
        return replace(views(job, folder, maps[0]), warnings=tuple(warnings))

    def forget(self, results: Sequence[Result]) -> None:
        """Remove a visitor's pictures."""
        for result in results:
            shutil.rmtree(result.picture.parent, ignore_errors=True)

    def download(self, results: Sequence[Result], ending: str, quality: int | None) -> Path:
        """One result in a format, or several as a zip file."""
        written = []
        for result in results:
            folder = result.picture.parent / f"{ending}{quality or ''}"
            job = Job(result.picture, result.name, fitting_name(result.picture.stem, f".{ending}"))
            if ending != "png":
                plan = Plan(folder, [job], has_report=False)
                report = restore_files(plan, lambda image, *_: Restored(image), writing=Writing(quality))
                if report.failed:
                    raise UserError(report.failed[job.name])
            written.append(result.picture if ending == "png" else folder / job.target)
        if len(written) == 1:
            return written[0]
        with ZipFile(written[0].parent / "restored.zip", "w") as file:  # pictures are compressed already
            for number, path in enumerate(written, 1):
                is_single = [one.name for one in written].count(path.name) == 1
                file.write(path, path.name if is_single else f"{number}_{path.name}")
        return written[0].parent / "restored.zip"


def size_of(file: str) -> tuple[int, int]:
    """Height and width of a picture as it is looked at; UserError: it is none."""
    with open_image(file) as picture:
        is_turned = picture.getexif().get(ExifTags.Base.Orientation) in TURNED
        height, width = picture.size if is_turned else picture.size[::-1]
        return height, width


def suggested(files: Sequence[str]) -> tuple[float, int] | None:
    """Times larger and times smaller first, for pictures one of which is large already; None: as the visitor likes."""
    for file in files:
        try:
            if math.prod(size_of(file)) > LARGE:
                return 1, 2
        except UserError:
            continue  # said where it is looked at
    return None


def views(job: Job, folder: Path, uncertainty_HW: Tensor | None) -> Result:
    """What the page shows of a result; the uncertainty's own range is stretched over the colors."""
    result, source = load_picture(folder / job.target), load_picture(job.source)
    height, width = result.image.shape[-2:]
    share = min(VIEW / max(height, width), 1)
    size = max(round(height * share), 1), max(round(width * share), 1)
    shown, span = {"before": resize(source.image, size), "after": resize(result.image, size)}, (0.0, 1.0)
    if uncertainty_HW is not None:
        values_HW = resize(uncertainty_HW[None].float().cpu(), size, "bilinear")[0]
        low, high = (float(value) for value in np.percentile(values_HW.numpy(), STRETCH))
        span = low, max(high, low + 0.01)
        colors = heat_map(((values_HW - low) / (span[1] - low)).clamp(0, 1))
        shown["overlay"] = 0.7 * colors + 0.3 * shown["after"].mean(dim=0)
    for name, image_3HW in shown.items():
        save_image(folder / f"{name}.jpg", image_3HW, icc_profile=result.icc_profile)
    overlay = folder / "overlay.jpg" if "overlay" in shown else None
    files = folder / job.target, folder / "before.jpg", folder / "after.jpg"
    return Result(job.name, *files, overlay, span, f"{width} x {height}")
