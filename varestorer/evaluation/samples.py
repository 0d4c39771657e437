"""Getting the images of a data set ready to be scored, the next ones while the present ones are scored."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from varestorer.evaluation.results import Pair, Row
from varestorer.evaluation.sources import Candidate, FolderSource, Source
from varestorer.utils.ahead import make_ahead
from varestorer.utils.errors import UserError
from varestorer.utils.files import fitting_name
from varestorer.utils.images import load_image, save_image

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """An image with its reference, or the reason why there is none.

    Attributes:
        row: its name and files; scores are still to come.
        image: (3, H, W) in [0, 1], to be scored; None if that failed.
        reference: (3, H, W) in [0, 1]; None if that failed, or where the data set has none.
    """

    row: Row
    image: Tensor | None = None
    reference: Tensor | None = None

    def failed(self, error: UserError) -> Sample:
        """The same without images, and with the reason."""
        log.warning("%s: %s", self.row.name, error)
        return Sample(replace(self.row, errors=(" ".join(str(error).split()),)))


class SampleReader:
    """Reads references, and reads or makes the images that are scored.

    Files are read while the chunk before is scored. Images are made then too if the source says that it works beside
    the scoring; otherwise at their turn: on a CPU both would share the same cores, and nothing would be won.

    Args:
        source: gives the image to be scored.
        keep: folder for the images that the source makes, `<name>.png`; None: they are not kept.
        reuse: take an image that is in `keep` already, if it is not older than the one it was made from.
    """

    def __init__(self, source: Source, keep: Path | None = None, reuse: bool = False) -> None:
        self.source = source
        self.keep = keep
        self.reuse = reuse

    def read(self, chunks: Sequence[Sequence[Pair]]) -> Iterator[list[Sample]]:
        """Samples of each chunk of pairs, in order."""
        if getattr(self.source, "runs_ahead", False):
            yield from make_ahead(lambda chunk: [self._finish(self._begin(pair)) for pair in chunk], chunks)
        else:
            for begun in make_ahead(lambda chunk: [self._begin(pair) for pair in chunk], chunks):
                yield [self._finish(sample) for sample in begun]

    def file(self, pair: Pair) -> Path | None:
        """Where the image that is scored lies, or will lie; None if nowhere."""
        name, lq, _ = pair
        if self.keep is not None:
            return self.keep / fitting_name(name, ".png")
        if not isinstance(self.source, FolderSource):
            return None
        try:
            return self.source.find(name, lq)
        except UserError:
            return None

    def _begin(self, pair: Pair) -> Sample:
        """Read the reference."""
        name, lq, hq = pair
        sample = Sample(Row(name, reference=hq, lq=lq))
        try:
            return sample if hq is None else replace(sample, reference=load_image(hq))
        except UserError as error:
            return sample.failed(error)

    def _finish(self, sample: Sample) -> Sample:
        """Read or make the image; write it if it was made."""
        if sample.row.errors or sample.row.lq is None:
            return sample
        name, lq = sample.row.name, sample.row.lq
        try:
            candidate = self._made_before(name, lq) or self.source(name, lq)
            path = self._write(candidate, name)
        except UserError as error:
            return sample.failed(error)
        made = replace(sample, row=replace(sample.row, seconds=candidate.seconds, image=path), image=candidate.image)
        try:
            check_sizes(candidate.image, sample.reference)
        except UserError as error:
            return made.failed(error)
        return made

    def _made_before(self, name: str, lq: Path) -> Candidate | None:
        if self.keep is None or not self.reuse:
            return None
        path = self.keep / fitting_name(name, ".png")
        if not path.is_file() or path.stat().st_mtime_ns < lq.stat().st_mtime_ns:
            return None
        return Candidate(load_image(path), path=path)

    def _write(self, candidate: Candidate, name: str) -> Path | None:
        """Write an image that was made here; return the file that holds the image, if any."""
        if candidate.path is not None or self.keep is None:
            return candidate.path
        path = self.keep / fitting_name(name, ".png")
        save_image(path, candidate.image)
        return path


def check_sizes(image_3HW: Tensor, reference_3HW: Tensor | None) -> None:
    """Raise UserError if an image has another size than its reference."""
    if reference_3HW is not None and image_3HW.shape != reference_3HW.shape:
        got, wanted = (f"{image.shape[-1]}x{image.shape[-2]}" for image in (image_3HW, reference_3HW))
        raise UserError(f"the image is {got} and its reference {wanted} pixels; scores need equal sizes")
