"""Getting the images of a data set ready to be scored, the next ones while the present ones are scored."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from varestorer.evaluation.results import Pair, Row
from varestorer.evaluation.sources import Candidate, FolderSource, Source
from varestorer.utils.errors import UserError
from varestorer.utils.files import file_sha256, fitting_name
from varestorer.utils.finite import check_finite
from varestorer.utils.images import load_image, made_from, resize, save_image
from varestorer.utils.prefetch import prefetch
from varestorer.utils.tiling import scaled_size

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """An image (3, H, W) in [0, 1] with its reference, or the reason, in its row, why there is none."""

    row: Row  # scores are still to come
    image: Tensor | None = None
    reference: Tensor | None = None  # None also where the data set has none

    def failed(self, error: UserError) -> Sample:
        """The same without images, and with the reason."""
        log.warning("%s: %s", self.row.name, error)
        return Sample(replace(self.row, errors=(" ".join(str(error).split()),)))


class SampleReader:
    """Reads references, and reads or makes the images that are scored.

    Files are read while the chunk before is scored. Images are made then too if the source says that it works beside
    the scoring; otherwise at their turn: on a CPU both would share the same cores, and nothing would be won.
    """

    def __init__(self, source: Source, keep: Path | None, reuse: bool) -> None:
        self.source = source
        self.keep = keep  # folder for the images that the source makes, `<name>.png`; None: they are not kept
        self.reuse = reuse  # an image that is in `keep` already, if the one it was made from is still the same file

    def read(self, chunks: Sequence[Sequence[Pair]]) -> Iterator[list[Sample]]:
        """Samples of each chunk of pairs, in order."""
        if getattr(self.source, "runs_ahead", False):
            yield from prefetch(lambda chunk: [self._finish(self._begin(pair)) for pair in chunk], chunks)
        else:
            for begun in prefetch(lambda chunk: [self._begin(pair) for pair in chunk], chunks):
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
            # before they are read: if one changes now, the image is scored again next time
            digests = " ".join(file_sha256(file) for file in (lq, hq) if file is not None)
            sample = replace(sample, row=replace(sample.row, digests=digests))
            return sample if hq is None else replace(sample, reference=load_image(hq))
        except UserError as error:
            return sample.failed(error)

    def _finish(self, sample: Sample) -> Sample:
        """Read or make the image; write it if it was made."""
        if sample.row.errors or sample.row.lq is None:
            return sample
        name, lq, digests = sample.row.name, sample.row.lq, sample.row.digests
        lq_digest = digests.partition(" ")[0]
        kept = None if self.keep is None else self.keep / fitting_name(name, ".png")
        try:
            if kept is not None and self.reuse and made_from(kept) == lq_digest:
                candidate = Candidate(load_image(kept), path=kept)
            else:
                candidate = self.source(name, lq)
            check_finite(candidate.image, f"the result for {lq}")
            if candidate.path is None and kept is not None:
                save_image(kept, candidate.image, source=lq_digest)
            path = candidate.path or kept
            digests = f"{digests} {file_sha256(path)}" if path else digests
        except UserError as error:
            return sample.failed(error)
        row = replace(sample.row, seconds=candidate.seconds, image=path, digests=digests)
        made = replace(sample, row=row, image=candidate.image)
        try:
            check_sizes(candidate.image, sample.reference)
        except UserError as error:
            return made.failed(error)
        return made


def reduced_references(pairs: Sequence[Pair], factor: float, folder: Path) -> list[Pair]:
    """The pairs with their references reduced (area) by a factor of their sides, for results smaller than the whole.

    The folder gets them, `<name>.png`; those of the same files are there already.
    """
    found: list[Pair] = []
    for name, lq, hq in pairs:
        path = folder / fitting_name(name, ".png")
        try:
            if hq is not None and made_from(path) != (digest := file_sha256(hq)):
                image = load_image(hq)
                size = scaled_size(image.shape[-2], image.shape[-1], factor)
                save_image(path, resize(image, size, "area"), source=digest)
        except UserError:  # it is named where it is scored
            path = hq or path
        found.append((name, lq, None if hq is None else path))
    return found


def check_sizes(image_3HW: Tensor, reference_3HW: Tensor | None) -> None:
    """Raise UserError if an image has another size than its reference."""
    if reference_3HW is not None and image_3HW.shape != reference_3HW.shape:
        got, wanted = (f"{image.shape[-1]}x{image.shape[-2]}" for image in (image_3HW, reference_3HW))
        raise UserError(f"the image is {got} and its reference {wanted} pixels; scores need equal sizes")
