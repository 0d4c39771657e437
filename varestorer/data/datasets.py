"""Endless training pairs as functions of one number, and held-out pairs: whole pictures that no training sees.

Sample n = 0, 1, 2, ... of a run is image `order(epoch)[n % images]` of epoch `n // images`; its crop, flip
and degradation come from generators keyed by (seed, n). So the pairs do not depend on the number of workers
or processes, and the position of the data in a run is one integer.

Without a folder they are of the photographs inside the wheels of scikit-image and scikit-learn: seven natural color
scenes, looked at one by one (their other pictures are drawings, textures, microscopy, gray or of the sky). The split is
fixed; both views of the motorcycle are on the training side.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from varestorer.data.degradation import Degrade, round_to_8bit
from varestorer.data.folders import find_pairs, hq_images
from varestorer.data.shards import Packed, packed_photographs
from varestorer.data.store import Contents, ImageStore, contents_of, file_contents
from varestorer.data.text import PhotoTexts, open_texts
from varestorer.utils.errors import UserError
from varestorer.utils.files import expand_user
from varestorer.utils.images import load_image, pad_reflect, resize
from varestorer.utils.seeds import numpy_generator

INSIDE = "shards"
Box = tuple[int, int, int, int]  # top, left, height, width
Split = Literal["train", "heldout"]
# (package, its pip name, file inside the package)
_SKIMAGE, _SKLEARN = ("skimage", "scikit-image", "data"), ("sklearn", "scikit-learn", "datasets/images")
_PHOTOGRAPHS = {
    "train": (
        (_SKIMAGE, "astronaut.png"),
        (_SKIMAGE, "chelsea.png"),
        (_SKIMAGE, "motorcycle_left.png"),
        (_SKIMAGE, "motorcycle_right.png"),
        (_SKIMAGE, "rocket.jpg"),
        (_SKLEARN, "flower.jpg"),
    ),
    "heldout": ((_SKLEARN, "china.jpg"), (_SKIMAGE, "coffee.png")),
}


class Sample(TypedDict):
    """A pair: `hq`, `lq` (3, H, W) float32 in [0, 1], `lq` at the size of `hq`; `key`: the sample number.

    Data sets with text add `text`: features (T, E) float32 of the prompt, or None for the null text. Those with classes
    add `label`: of the picture's quality, or of what it shows.
    """

    hq: Tensor
    lq: Tensor
    name: str
    key: int
    text: NotRequired[Tensor | None]
    label: NotRequired[int]


class EpochOrder:
    """Which image sample n shows: a new permutation of all images every epoch."""

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images, self.seed = num_images, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, n: int) -> int:
        epoch, place = divmod(n, self.num_images)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = numpy_generator(self.seed, "order", epoch).permutation(self.num_images)
        return int(self._order[place])


class _Crops(Dataset[Sample]):
    """What data sets of crops share."""

    store: ImageStore
    root: str | None
    texts: Any  # features (T, E) of a photograph by its number, None for the null text; None: samples come without

    def __len__(self) -> int:
        """Number of images, or pairs (of one epoch); sample numbers go on beyond it."""
        return len(self.store)

    def read_ahead(self) -> None:
        """Before workers start: see `ImageStore.read_ahead`."""
        self.store.read_ahead()

    def contents(self) -> Contents:
        """Which files, and which texts, the samples are of."""
        return file_contents(self.store.items, self.root) | (contents_of(self.texts) or {})

    def with_text(self, sample: Sample, index: int) -> Sample:
        """The sample, with the text of photograph `index` if there are texts."""
        return sample if self.texts is None else {**sample, "text": self.texts[index]}


class PhotoCrops(_Crops):
    """Random squares of photographs, with bad versions made by a degradation.

    Args:
        root: a folder of images, or one that holds them in `hr`, `hq`, `gt`, `test_HR`, `NAME_train_HR`;
            None: the embedded photographs (training side).
        crop: side of the squares, pixels.
        degradation: makes the bad picture from the good one and a NumPy generator; None leaves it good, for
            stages that look at good pictures alone.
        seed: seed of order, place, flip and degradation.
        downscale: range of a random zoom out, e.g. (1, 2): small crops then show more of a scene. None: off.
        use_flip: mirror every other square, left to right.
        text: a folder that `precompute_text` made of these photographs; None: samples come without text. A prompt is
            about the whole photograph, whatever the square shows of it. Shards may hold the text too: `shards`.
        packed: `root` is a folder of webdataset shards.
        spoil: makes the good pictures bad first: what is restored to is bad then.
        label: class of all pictures, such as 1 for bad ones that are restored to themselves (VARSR), or "folder": each
            folder of pictures is a class, numbered in the order of their names; None: samples come without.
    Raises:
        UserError: `root` is missing, without usable images, or more than 5 % of them are broken; `text` is no such
            folder, or one of other photographs; classes by folder of shards.
    """

    def __init__(
        self,
        root: str | None,
        crop: int,
        degradation: Degrade | None,
        seed: int,
        downscale: Sequence[float] | None = None,
        use_flip: bool = True,
        text: str | None = None,
        packed: bool = False,
        label: int | str | None = None,
        spoil: Degrade | None = None,
    ) -> None:
        if crop < 1:
            raise UserError(f"data.crop must be a positive number of pixels, got {crop}")
        if downscale is not None and not (len(downscale) == 2 and 1 <= downscale[0] <= downscale[1]):
            raise UserError(f"data.downscale must be [low, high], 1 <= low <= high, got {list(downscale)}")
        files = self._files(root, packed, text)
        self.crop, self.degradation, self.seed, self.use_flip = crop, degradation, seed, use_flip
        self.root = root
        self.downscale = None if downscale is None else (float(downscale[0]), float(downscale[1]))
        self.store = ImageStore([(file,) for file in files], root or "the embedded photographs")
        self.order = EpochOrder(len(files), seed)
        self.labels, self.spoil = self._labels(files, label), spoil

    def __getitem__(self, n: int) -> Sample:
        """Make sample n, any number >= 0."""
        index, (photo,) = self.store.read(self.order[n])
        rng = numpy_generator(self.seed, "crop", n)
        hq_3HW = random_square(photo, self.crop, rng, self.downscale)
        if self.use_flip and rng.random() < 0.5:
            hq_3HW = hq_3HW.flip(-1)
        if self.spoil is not None:
            hq_3HW = self.spoil(hq_3HW, numpy_generator(self.seed, "spoil", n))
        lq_3HW = hq_3HW
        if self.degradation is not None:
            lq_3HW = self.degradation(hq_3HW, numpy_generator(self.seed, "degradation", n))
        sample: Sample = {"hq": hq_3HW, "lq": lq_3HW, "name": self.store.items[index][0].stem, "key": n}
        if self.labels is not None:
            sample["label"] = self.labels[index]
        return self.with_text(sample, index)

    def _files(self, root: str | None, packed: bool, text: str | None) -> Sequence[Path] | Sequence[Packed]:
        """The files of good photographs; sets their texts if these are asked for."""
        if not packed:
            paths = embedded_paths("train") if root is None else hq_images(root)
            self.texts = open_texts(text, root, paths)
            return paths
        samples = packed_photographs(root or "")
        if text == INSIDE:
            if not any(sample.features for sample in samples):
                raise UserError(f"data.text={INSIDE}: the shards of {root} hold no text; pack them with text=FOLDER")
            self.texts = _PackedTexts(samples)
        else:
            names = [sample.name for sample in samples]
            self.texts = None if text is None else PhotoTexts(expand_user(text), names)
        return samples

    @staticmethod
    def _labels(files: Sequence[Path] | Sequence[Packed], label: int | str | None) -> list[int] | None:
        """The class of each file."""
        if label is None or isinstance(label, int):
            return None if label is None else [label] * len(files)
        paths = [file for file in files if isinstance(file, Path)]
        if label != "folder" or len(paths) < len(files):
            raise UserError(f"data.label must be a number, or folder for a folder of pictures per class, got {label}")
        numbers = {folder: number for number, folder in enumerate(sorted({path.parent for path in paths}))}
        return [numbers[path.parent] for path in paths]


class _PackedTexts(list[Packed]):
    """Features (T, E) float32 that shards hold beside their photographs, by number; None for the null text."""

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index).load_features()


class PairedCrops(_Crops):
    """Random squares of real pairs, the bad ones enlarged to the good ones' size (bicubic, 8-bit levels).

    Args:
        root: folder with `hr`, `hq`, `gt` or `test_HR` beside `lr`, `lq` or `test_LR`; names must match.
        crop: side of the squares, pixels of the good image; a multiple of `scale`.
        seed: of order, place and flip.
        scale: how much larger the good images are; bad images already of their size are taken too.
        use_flip: mirror every other square, left to right.
        text: as for `PhotoCrops`, made of the good images.
    Raises:
        UserError: no such `root` or `text`, sizes that do not fit, or more than 5 % broken images.
    """

    def __init__(
        self, root: str, crop: int, seed: int, scale: int = 4, use_flip: bool = True, text: str | None = None
    ) -> None:
        if crop < 1 or crop % scale:
            raise UserError(f"data.crop must be a positive multiple of scale {scale}, got {crop}")
        pairs = find_pairs(root, split="train")
        self.crop, self.seed, self.scale, self.use_flip = crop, seed, scale, use_flip
        self.names, self.root = [name for name, _, _ in pairs], root
        self.store = ImageStore([(low, high) for _, low, high in pairs], str(root))
        self.order = EpochOrder(len(pairs), seed)
        self.texts = open_texts(text, root, [high for _, _, high in pairs])

    def __getitem__(self, n: int) -> Sample:
        """Make sample n, any number >= 0."""
        index, (low, high) = self.store.read(self.order[n])
        factor = pair_factor(low, high, self.scale, self.store.items[index])
        rng = numpy_generator(self.seed, "crop", n)
        box = draw_box((low.shape[-2], low.shape[-1]), self.crop // factor, rng)
        top, left, height, width = (factor * side for side in box)
        hq_3HW = cut(high, (top, left, height, width)).float() / 255
        lq_3HW = round_to_8bit(resize(cut(low, box).float() / 255, (height, width)))
        hq_3HW, lq_3HW = fill_square(hq_3HW, self.crop), fill_square(lq_3HW, self.crop)
        if self.use_flip and rng.random() < 0.5:
            hq_3HW, lq_3HW = hq_3HW.flip(-1), lq_3HW.flip(-1)
        sample: Sample = {"hq": hq_3HW, "lq": lq_3HW, "name": self.names[index], "key": n}
        return self.with_text(sample, index)


def pair_factor(low: Tensor, high: Tensor, scale: int, paths: Sequence[object]) -> int:
    """How much larger the good image of a pair is: `scale`, or 1 if both have the same size.

    UserError, naming both files (`paths`): anything else.
    """
    small, large = tuple(low.shape[-2:]), tuple(high.shape[-2:])
    if small == large:
        return 1
    if large != (scale * small[0], scale * small[1]):
        raise UserError(
            f"{paths[1]} is {large[1]}x{large[0]}; wanted the same size as {paths[0]}, "
            f"{small[1]}x{small[0]}, or {scale} times that"
        )
    return scale


def draw_box(size: tuple[int, int], window: int, rng: np.random.Generator) -> Box:
    """Place a square window of `window` pixels; a side shorter than that is taken whole."""
    height, width = (min(side, window) for side in size)
    top, left = int(rng.integers(size[0] - height + 1)), int(rng.integers(size[1] - width + 1))
    return top, left, height, width


def cut(img_CHW: Tensor, box: Box) -> Tensor:
    """The part of a picture inside a box."""
    top, left, height, width = box
    return img_CHW[:, top : top + height, left : left + width]


def fill_square(img_CHW: Tensor, side: int) -> Tensor:
    """Continue a picture smaller than (side, side) by reflection, evenly on both sides."""
    height, width = img_CHW.shape[-2:]
    top, left = (side - height) // 2, (side - width) // 2
    return pad_reflect(img_CHW, top, side - height - top, left, side - width - left)


def random_square(
    photo_CHW: Tensor, crop: int, rng: np.random.Generator, downscale: tuple[float, float] | None = None
) -> Tensor:
    """Cut a random square out of an 8-bit photograph: (C, crop, crop) float32 in [0, 1].

    A small photograph is continued by reflection. `downscale` is a range of the zoom: 2 shows twice as much of the
    photograph at half its resolution (Lanczos).
    """
    size = photo_CHW.shape[-2], photo_CHW.shape[-1]
    window = crop
    if downscale is not None:  # photograph pixels that a crop pixel covers, no more than the photograph has to give
        window = round(crop * min(float(rng.uniform(*downscale)), max(1.0, min(size) / crop)))
    square = fill_square(cut(photo_CHW, draw_box(size, window, rng)).float() / 255, window)
    return resize(square, (crop, crop), mode="lanczos")


def embedded_paths(split: Split) -> list[Path]:
    """Files of the embedded photographs, in fixed order: `train` (six of five scenes) or `heldout` (china, coffee).

    UserError if a package is not installed or does not carry its photographs.
    """
    if split not in _PHOTOGRAPHS:
        raise ValueError(f"split must be train or heldout, got {split!r}")
    found = []
    for (module, package, folder), name in _PHOTOGRAPHS[split]:
        spec = find_spec(module)  # without importing the package, which takes a second
        roots = list(spec.submodule_search_locations or []) if spec else []
        path = next((path for root in roots if (path := Path(root, folder, name)).is_file()), None)
        if path is None:
            problem = "does not carry it here" if roots else "is not installed"
            raise UserError(
                f"the embedded photograph {name} comes with {package}, which {problem}: "
                f"pip install --force-reinstall {package}, or train on a folder: data=folder data.root=..."
            )
        found.append(path)
    return found


def embedded_photographs(split: Split) -> list[tuple[str, Tensor]]:
    """(name, (3, H, W) float32 in [0, 1]) of each embedded photograph of a split (see `embedded_paths`)."""
    return [(path.stem, load_image(path)) for path in embedded_paths(split)]


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
        seed: of the degradation.
        limit: at most so many pictures, evenly spread.
        scale: size of good over bad pictures.
    Returns:
        Samples; without `crop` they differ in size. `key` is the picture's number in the set.
    Raises:
        UserError: as `PhotoCrops` and `PairedCrops`.
    """
    if crop is not None and (crop < 1 or crop % scale):
        raise UserError(f"crop must be a positive multiple of scale {scale}, got {crop}")
    found: Sequence[tuple[Any, ...]]
    if degradation is not None:
        paths = embedded_paths("heldout") if root is None else hq_images(root, split="test")
        found = [(path.stem, path) for path in paths]
    elif root is None:
        raise UserError("the embedded photographs need a degradation; a folder of real pairs does without")
    else:
        found = find_pairs(root)
    taken = len(found) if limit is None else min(len(found), limit)
    keys = [i * len(found) // taken for i in range(taken)]
    store = ImageStore([found[key][1:] for key in keys], root or "the embedded photographs")
    samples: list[Sample] = []
    for index, (*lows, high) in store.read_all():
        key, hq = keys[index], _center(high.float() / 255, crop, scale)
        if degradation is not None:
            lq = degradation(hq, numpy_generator(seed, "heldout", key))
        else:
            pair_factor(lows[0], high, scale, store.items[index])
            lq = round_to_8bit(resize(lows[0].float() / 255, (high.shape[-2], high.shape[-1])))
            lq = _center(lq, crop, scale)
        samples.append({"hq": hq, "lq": lq, "name": found[key][0], "key": key})
    return samples


def _center(img_3HW: Tensor, crop: int | None, scale: int) -> Tensor:
    """The central square, or the whole cut to multiples of `scale`."""
    height, width = img_3HW.shape[-2:]
    most = (crop, crop) if crop else (max(1, height // scale) * scale, max(1, width // scale) * scale)
    rows, columns = min(height, most[0]), min(width, most[1])
    middle = cut(img_3HW, ((height - rows) // 2, (width - columns) // 2, rows, columns))
    return fill_square(middle, crop) if crop else middle
