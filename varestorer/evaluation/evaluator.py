"""The evaluator: scores of each image under a protocol, and what they add up to."""

from __future__ import annotations

import logging
import math
import tempfile
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from varestorer.evaluation.processes import ALONE, Processes
from varestorer.evaluation.progress import Progress
from varestorer.evaluation.protocols import Protocol
from varestorer.evaluation.results import Evaluation, Pair, Row, Scores
from varestorer.evaluation.samples import Sample, SampleReader, check_sizes
from varestorer.evaluation.sources import FolderSource, Source
from varestorer.utils.errors import UsageError, UserError, reason
from varestorer.utils.files import file_sha256
from varestorer.utils.finite import check_finite
from varestorer.utils.images import load_image, save_image, to_uint8
from varestorer.utils.iqa import (
    METRIC_ERRORS,
    Metric,
    MetricUnavailableError,
    create_metric,
    metric_config,
    metric_id,
    needs_reference,
    quiet,
    reads_plainly,
)

log = logging.getLogger(__name__)

NEEDS_REFERENCES = "needs references, and the data set has none"


class Evaluator:
    """Scores images under a protocol.

    Images go through an 8-bit round trip first and are never resized. Metrics that cannot run on this machine
    are found out here, at once, and listed in `unavailable`; the others run.

    Args:
        protocol: which metrics, with which options.
        metrics: a subset of the protocol's columns, or other metrics of pyiqa by name; default: all columns.
        device: where the metrics run; on MPS, which lacks float64, they run on the CPU.
        weights_folder: searched for weight files before torch's hub folder.
        offline: never touch the network; default: when HF_HUB_OFFLINE is set.
        seed: of metrics that draw random patches.
        references: whether the data set has any; without them metrics that compare are not even built.
        batch: images scored at once where sizes agree, by the metrics whose scores do not depend on it.
    Raises:
        UsageError: a metric that pyiqa does not know.
    """

    def __init__(
        self,
        protocol: Protocol,
        metrics: Sequence[str] | None = None,
        *,
        device: torch.device | str = "cpu",
        weights_folder: str | Path | None = None,
        offline: bool | None = None,
        seed: int = 0,
        references: bool = True,
        batch: int = 1,
    ) -> None:
        self.protocol = protocol
        self.device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        self.batch = batch
        self.metrics: dict[str, Metric] = {}
        self.unavailable: dict[str, str] = {}
        self.columns: dict[str, bool] = {}
        self.ids: dict[str, str] = {}
        for spec in protocol.select(metrics):
            try:
                if not references and needs_reference(spec.pyiqa_name):
                    raise MetricUnavailableError(NEEDS_REFERENCES)
                self.metrics[spec.name] = create_metric(
                    spec.pyiqa_name,
                    spec.options,
                    device=self.device,
                    weights_folder=weights_folder,
                    offline=offline,
                    seed=seed,
                )
            except MetricUnavailableError as error:
                self.unavailable[spec.name] = str(error)
            self.ids[spec.name] = metric_id(spec.pyiqa_name, spec.options)
            self.columns[spec.name] = bool(metric_config(spec.pyiqa_name).get("lower_better", False))

    @property
    def image_metrics(self) -> dict[str, Metric]:
        """The metrics that score one image, by column."""
        return {name: metric for name, metric in self.metrics.items() if not metric.is_of_folders}

    def drop(self, unavailable: Mapping[str, str]) -> None:
        """Do without these metrics: they cannot run in another process of this evaluation, for the reason given."""
        for name, why in unavailable.items():
            self.metrics.pop(name, None)
            self.unavailable.setdefault(name, why)

    def score(self, image_3HW: Tensor, reference_3HW: Tensor | None = None) -> Scores:
        """Score one image, as `score_batch` does; UserError if its reference has another size."""
        check_sizes(image_3HW, reference_3HW)
        return self.score_batch([image_3HW], [reference_3HW])[0]

    def score_batch(
        self, images: Sequence[Tensor], references: Sequence[Tensor | None], only: Collection[str] | None = None
    ) -> list[Scores]:
        """Score images (3, H, W) of one size, RGB in [0, 1], rounded to 8 bit first, as the references are.

        All have a reference, or none, which leaves metrics that need none; else ValueError. `only` names the columns
        that are asked for.
        """
        image_B3HW = _round_trip(images, self.device)
        given = [reference for reference in references if reference is not None]
        if len(given) not in (0, len(images)):
            raise ValueError(f"{len(images)} images need as many references, or none, got {len(given)}")
        reference_B3HW = _round_trip(given, self.device) if given else None
        found = [Scores() for _ in images]
        for name, metric in self.image_metrics.items():
            is_asked = only is None or name in only
            if is_asked and (not metric.needs_reference or reference_B3HW is not None):
                _score(name, metric, image_B3HW, reference_B3HW, found)
        return found

    def evaluate(
        self,
        pairs: Sequence[Pair],
        source: Source,
        dataset: str = "folder",
        keep: Path | None = None,
        *,
        progress: Progress | None = None,
        processes: Processes = ALONE,
    ) -> Evaluation:
        """Score the images that a source gives; one that fails is recorded, and the rest goes on.

        The same pairs are scored together however many processes there are and wherever an earlier run stopped, so
        the figures are the same. UsageError: no pairs, or `progress` holds scores of others.

        Args:
            pairs: name, low-quality file, high-quality file or None.
            source: gives the image to be scored.
            dataset: its name, for the records.
            keep: folder for the images that the source makes, `<name>.png`.
            progress: what an earlier run did is not done again, and what this one does is noted.
            processes: that share the work; all get all rows, and the first scores of whole folders (FID).
        """
        if not pairs:
            raise UsageError(f"data set {dataset!r} has no images to score")
        if isinstance(source, FolderSource) and not source.pairs:
            source.match(pairs)
        reader = SampleReader(source, keep, reuse=progress is not None)
        rows = self._kept(pairs, reader, progress) if progress else {}
        # all have read what there is before the first writes
        if all(processes.gather([True])) and progress and processes.is_main:
            progress.begin(list(self.image_metrics), rows.values())
        parts = (pairs[start : start + self.batch] for start in range(0, len(pairs), self.batch))
        chunks = [left for part in parts if (left := [pair for pair in part if pair[0] not in rows])]
        rounds = math.ceil(len(chunks) / processes.size)
        bar = tqdm(total=len(pairs), initial=len(rows), desc=f"evaluate {dataset}", unit="image", disable=None)
        with quiet(), bar:
            mine = (self._rows(samples) for samples in reader.read(processes.share(chunks)))
            for _, scored in zip(range(rounds), chain(mine, repeat(())), strict=False):
                new = processes.gather(list(scored))
                if progress and processes.is_main:
                    progress.append(new)
                rows |= {row.name: row for row in new}
                bar.update(len(new))
        ordered = tuple(rows[name] for name, _, _ in pairs)
        dataset_scores, refused = self._dataset_scores(ordered) if processes.is_main else ({}, {})
        return Evaluation(
            dataset=dataset,
            protocol=self.protocol.name,
            columns=self.columns,
            metrics=self.metrics,
            rows=ordered,
            dataset_scores=dataset_scores,
            unavailable={**self.unavailable, **refused},
        )

    def _kept(self, pairs: Sequence[Pair], reader: SampleReader, progress: Progress) -> dict[str, Row]:
        """Rows of an earlier run whose files are there and are the same as then.

        UsageError: it has scored images that are not asked for now, and going on would drop their scores.
        """
        done = progress.kept(list(self.image_metrics))
        others = len(done.keys() - {name for name, _, _ in pairs})
        if others:
            raise UsageError(
                f"out={progress.folder} holds scores of {others} more images; raise limit=, or give another out="
            )
        rows = {}
        for name, lq, hq in pairs:
            image = reader.file((name, lq, hq))
            if name in done and done[name].digests and done[name].digests == _digests(lq, hq, image):
                rows[name] = replace(done[name], image=image, reference=hq, lq=lq)
        return rows

    def _rows(self, samples: Sequence[Sample]) -> list[Row]:
        """Score the samples of a chunk, those of one size, with or without references, at once."""
        rows, groups = {sample.row.name: sample.row for sample in samples}, defaultdict[Any, list[Sample]](list)
        for sample in samples:
            if sample.image is not None:
                groups[sample.image.shape, sample.reference is None].append(sample)
        for group in groups.values():
            images, references = [s.image for s in group if s.image is not None], [s.reference for s in group]
            for sample, found in zip(group, self.score_batch(images, references), strict=True):
                errors = tuple(f"{metric}: {why}" for metric, why in found.errors.items())
                rows[sample.row.name] = replace(sample.row, scores=found.values, errors=sample.row.errors + errors)
        return list(rows.values())

    def _dataset_scores(self, rows: Sequence[Row]) -> tuple[dict[str, float], dict[str, str]]:
        """Scores of metrics that compare whole folders, and why those that failed did."""
        scores: dict[str, float] = {}
        refused: dict[str, str] = {}
        metrics = {name: metric for name, metric in self.metrics.items() if metric.is_of_folders}
        pairs = [(row.image, row.reference or row.image) for row in rows if row.image and not row.errors]
        for name, metric in metrics.items():
            try:
                with tempfile.TemporaryDirectory(prefix="varestorer-eval-") as folder:
                    images, references = _link_pairs(pairs, Path(folder))
                    scores[name] = _finite(metric.score_folders(images, references))
            except (UserError, *METRIC_ERRORS) as error:
                refused[name] = f"{name} of {len(pairs)} saved images failed: {reason(error)}"
        return scores, refused


def _score(
    name: str, metric: Metric, image_B3HW: Tensor, reference_B3HW: Tensor | None, found: Sequence[Scores]
) -> None:
    """Add a metric's scores, or the reason why it refused an image, to what was found of each image."""
    try:
        if metric.takes_batches and len(found) > 1:
            values = [_finite(value) for value in metric(image_B3HW, reference_B3HW).tolist()]
            for scores, value in zip(found, values, strict=True):
                scores.values[name] = value
            return
    except METRIC_ERRORS as error:
        log.debug("%s one by one, because a batch failed: %s", name, reason(error))
    for i, scores in enumerate(found):
        one = slice(i, i + 1)
        try:
            reference = None if reference_B3HW is None else reference_B3HW[one]
            scores.values[name] = _finite(metric(image_B3HW[one], reference).item())
        except METRIC_ERRORS as error:
            scores.errors[name] = reason(error)


def _digests(*files: Path | None) -> str | None:
    """As a row holds them; None if one cannot be read."""
    try:
        return " ".join(file_sha256(file) for file in files if file is not None)
    except UserError:
        return None


def _link_pairs(pairs: Sequence[tuple[Path, Path]], folder: Path) -> tuple[Path, Path]:
    """Two folders with just these images, and just their references, as the other metrics see them.

    Metrics of folders read files by themselves, and make something else of all but plain 8-bit RGB. A file that they
    read right is linked, any other is written as such a PNG.
    """
    folders = folder / "images", folder / "references"
    for side, subfolder in enumerate(folders):
        subfolder.mkdir()
        for number, pair in enumerate(pairs):
            path, image_3HW = subfolder / f"{number:06d}.png", load_image(pair[side])
            if reads_plainly(pair[side], to_uint8(image_3HW)):
                path.symlink_to(pair[side].resolve())
            else:
                save_image(path, image_3HW)
    return folders


def _round_trip(images: Sequence[Tensor], device: torch.device) -> Tensor:
    """(B, 3, H, W) float32 in [0, 1] as it would be read back from 8-bit PNGs; UserError where it is not finite."""
    image_B3HW = torch.stack(list(images))
    check_finite(image_B3HW, "an image to be scored")
    return (to_uint8(image_B3HW).to(torch.float32) / 255).to(device)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"the score is {value}")
    return float(value)
