"""Good and bad pictures to learn both qualities from (VARSR, section 3.4, image-based guidance)."""

from __future__ import annotations

from collections.abc import Sequence

from varestorer.data.datasets import PhotoCrops
from varestorer.data.degradation import Degrade
from varestorer.data.mixture import Mixture

GOOD, BAD = 0, 1


def quality_crops(
    root: str | None,
    bad: str | None,
    crop: int,
    degradation: Degrade | None,
    seed: int,
    share: float = 0.25,
    downscale: Sequence[float] | None = None,
    use_flip: bool = True,
) -> Mixture:
    """Pairs of good pictures (label 0), and of bad ones that are restored to themselves (label 1).

    Args:
        root: folder of good pictures; None: the embedded photographs.
        bad: folder of bad pictures, such as those with low scores of a quality data set; None: good ones, degraded.
        crop: side of the squares, pixels.
        degradation: makes the degraded pictures of both.
        seed: of everything that is drawn.
        share: of the bad ones.
        downscale: of the good ones, see `PhotoCrops`.
        use_flip: see `PhotoCrops`.
    """
    options = {"crop": crop, "degradation": degradation, "seed": seed, "use_flip": use_flip}
    good = PhotoCrops(root, downscale=downscale, label=GOOD, **options)  # type: ignore[arg-type]
    spoil = degradation if bad is None else None
    others = PhotoCrops(bad or root, label=BAD, spoil=spoil, **options)  # type: ignore[arg-type]
    return Mixture({"good": good, "bad": others}, {"good": 1 - share, "bad": share}, crop, seed)
