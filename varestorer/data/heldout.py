"""Pairs that no training sees: whole pictures, the same in every run."""

from torch import Tensor

from varestorer.data.datasets import Sample, center_box, cut, embedded_paths, fill_square, pair_factor
from varestorer.data.degradation import Degrade, round_to_8bit
from varestorer.data.folders import find_pairs, hq_images
from varestorer.data.store import ImageStore
from varestorer.utils.errors import UserError
from varestorer.utils.images import resize
from varestorer.utils.seeds import numpy_generator


def heldout_pairs(
    root: str | None,
    crop: int | None = None,
    degradation: Degrade | None = None,
    seed: int = 0,
    limit: int | None = None,
    scale: int = 4,
) -> list[Sample]:
    """Make validation pairs; picture i gets the same degradation for the same seed, whatever the limit.

    Args:
        root: a folder of images or of pairs, of which the test or validation side is taken; None: the held-out
            embedded photographs (china, coffee).
        crop: side of the central square to take; None: the whole picture, cut to multiples of `scale`.
        degradation: makes the bad pictures; None: `root` holds real pairs.
        seed: seed of the degradation.
        limit: at most so many pictures, evenly spread.
        scale: size of good over bad pictures.
    Returns:
        Samples; without `crop` they differ in size. `key` is the picture's number in the set.
    Raises:
        UserError: as `PhotoCrops` and `PairedCrops`.
    """
    if crop is not None and (crop < 1 or crop % scale):
        raise UserError(f"crop must be a positive multiple of scale {scale}, got {crop}")
    if degradation is not None:
        return _degraded_pairs(root, crop, degradation, seed, limit, scale)
    if root is None:
        raise UserError("the embedded photographs need a degradation; a folder of real pairs does without")
    return _real_pairs(root, crop, limit, scale)


def _degraded_pairs(
    root: str | None, crop: int | None, degradation: Degrade, seed: int, limit: int | None, scale: int
) -> list[Sample]:
    paths = embedded_paths("heldout") if root is None else hq_images(root, split="test")
    keys = _spread(len(paths), limit)
    store = ImageStore([(paths[key],) for key in keys], root or "the embedded photographs")
    samples: list[Sample] = []
    for index, (photo,) in store.read_all():
        key = keys[index]
        hq = _center(photo.float() / 255, crop, scale)
        lq = degradation(hq, numpy_generator(seed, "heldout", key))
        samples.append({"hq": hq, "lq": lq, "name": paths[key].stem, "key": key})
    return samples


def _real_pairs(root: str, crop: int | None, limit: int | None, scale: int) -> list[Sample]:
    pairs = find_pairs(root)
    keys = _spread(len(pairs), limit)
    store = ImageStore([pairs[key][1:] for key in keys], root)
    samples: list[Sample] = []
    for index, (low, high) in store.read_all():
        key = keys[index]
        pair_factor(low, high, scale, store.items[index])
        lq = round_to_8bit(resize(low.float() / 255, (high.shape[-2], high.shape[-1])))
        lq, hq = (_center(side, crop, scale) for side in (lq, high.float() / 255))
        samples.append({"hq": hq, "lq": lq, "name": pairs[key][0], "key": key})
    return samples


def _spread(count: int, limit: int | None) -> list[int]:
    """At most `limit` numbers below `count`, evenly spread."""
    taken = count if limit is None else min(count, limit)
    return [i * count // taken for i in range(taken)]


def _center(img_3HW: Tensor, crop: int | None, scale: int) -> Tensor:
    """The central square, or the whole cut to multiples of `scale`."""
    size: tuple[int, int] = (img_3HW.shape[-2], img_3HW.shape[-1])
    if crop is not None:
        return fill_square(cut(img_3HW, center_box(size, (crop, crop))), crop)
    whole = max(1, size[0] // scale) * scale, max(1, size[1] // scale) * scale
    return cut(img_3HW, center_box(size, whole))
