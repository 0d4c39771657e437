"""HTML pages, and the pictures on them: columns side by side, the places with the most detail enlarged.

Every value is escaped. Shapes: `H W` pixels of a whole picture.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from io import BytesIO
from typing import Any

import torch
from einops import rearrange
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from varestorer.utils.images import to_uint8

MIN_SIDE, MAX_SIDE = 24, 72
DETAIL_WIDTH = 3 * MAX_SIDE
"""Width of an enlarged detail, pixels."""

HINT = """Under each picture the framed places, enlarged pixel by pixel. Click a picture to see it at its own pixels,
and any two of them under a slider or in turns."""


@dataclass(frozen=True)
class Crop:
    """A square of a picture, pixels."""

    top: int
    left: int
    side: int

    def of(self, image_3HW: Tensor) -> Tensor:
        """The pixels of this square, (3, side, side)."""
        return image_3HW[:, self.top : self.top + self.side, self.left : self.left + self.side]

    def style(self, height: int, width: int) -> str:
        """The square as CSS places it on a picture of that size."""
        return (
            f"left:{100 * self.left / width:.3f}%;top:{100 * self.top / height:.3f}%;"
            f"width:{100 * self.side / width:.3f}%;height:{100 * self.side / height:.3f}%"
        )


@dataclass(frozen=True)
class PictureColumn:
    """One of the pictures that stand side by side."""

    label: str
    source: str  # URL of the whole picture
    image: Tensor  # (3, H, W), all columns at one size
    is_small: bool = False  # the page enlarges it, and then shows its pixels
    note: str = ""  # more of it, such as its scores


def html_picture(name: str, note: str, columns: Sequence[PictureColumn], crops: Sequence[Crop]) -> Markup:
    """Columns of one picture, with the crops framed in each and enlarged below it by repeating pixels."""
    height, width = columns[-1].image.shape[-2:]
    return render(
        "picture.html",
        name=name,
        note=note,
        columns=columns,
        frames=[crop.style(height, width) for crop in crops],
        details=[[png_url(_magnify(crop.of(column.image))) for crop in crops] for column in columns],
    )


def _magnify(detail_3hw: Tensor) -> Tensor:
    side = detail_3hw.shape[-1]
    side *= max(DETAIL_WIDTH // side, 1)
    return enlarge(detail_3hw, side, side)


def detailed_crops(image_3HW: Tensor, count: int = 1, multiple: int = 1) -> list[Crop]:
    """The squares with the most detail (energy of the differences between neighbors), see `best_crops`."""
    gray = image_3HW.float().mean(dim=0)
    energy = torch.zeros_like(gray)
    energy[:-1] += (gray[1:] - gray[:-1]).abs()
    energy[:, :-1] += (gray[:, 1:] - gray[:, :-1]).abs()
    return best_crops(energy, count, multiple)


def differing_crops(images: Sequence[Tensor], count: int = 1, multiple: int = 1, side: int | None = None) -> list[Crop]:
    """The squares in which images (3, H, W) of one size differ most, see `best_crops`."""
    return best_crops(torch.stack(list(images)).float().std(dim=0, correction=0).mean(dim=0), count, multiple, side)


def best_crops(energy_HW: Tensor, count: int = 1, multiple: int = 1, side: int | None = None) -> list[Crop]:
    """Find the squares of the largest sums, a side apart or more, best first.

    Args:
        energy_HW: not negative; at least `multiple` pixels wide and high.
        count: squares wanted; fewer are found in a small picture.
        multiple: edges of the squares are multiples of this, so that pixels of a smaller picture stay whole.
        side: at most that of the picture; default: a quarter of the shorter side, `MIN_SIDE` to `MAX_SIDE`.
    """
    height, width = energy_HW.shape
    side = min(side or min(max(min(height, width) // 4, MIN_SIDE), MAX_SIDE), height, width)
    side = max(side // multiple, 1) * multiple
    stride = max(min(side // 4, MIN_SIDE) // multiple, 1) * multiple
    sums = torch.nn.functional.avg_pool2d(energy_HW[None, None], side, stride)[0, 0]
    crops: list[Crop] = []
    while len(crops) < count and sums.max() >= 0:
        best = int(sums.argmax())
        row, column = divmod(best, sums.shape[1])
        crops.append(Crop(row * stride, column * stride, side))
        reach = -(-2 * side // stride)
        sums[max(row - reach + 1, 0) : row + reach, max(column - reach + 1, 0) : column + reach] = -1
    return crops


def enlarge(image_3HW: Tensor, height: int, width: int) -> Tensor:
    """Repeat pixels until the picture has that size."""
    if tuple(image_3HW.shape[-2:]) == (height, width):
        return image_3HW
    return torch.nn.functional.interpolate(image_3HW[None].float(), (height, width), mode="nearest")[0]


def png_url(image_3HW: Tensor) -> str:
    """A picture in [0, 1] as a PNG inside a `data:` URL."""
    buffer = BytesIO()
    array = rearrange(to_uint8(image_3HW.detach()).cpu(), "c h w -> h w c").numpy()
    Image.fromarray(array).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def render(template: str, **values: Any) -> Markup:
    """Fill a template by its file name; `Markup` among the values is HTML already, everything else is escaped."""
    return Markup(_environment().get_template(template).render(**values))


@cache
def _environment() -> Environment:
    folder = files("varestorer.evaluation")
    loader = FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8"))
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
