"""JPEG for a batch of pictures of different sizes, on any device.

The losses of a baseline JPEG file with 4:2:0 chroma (ITU-T T.81, JFIF), in floats but with the roundings of the usual
integer codec: colour conversion, averages of the chroma, quantised coefficients and decoded samples are whole numbers.
Entropy coding loses nothing and is left out. The cosine transforms are exact where the codec's are 13-bit integers, so
a coefficient next to a rounding boundary may fall on its other side.
"""

import math
from functools import lru_cache

import torch
from einops import rearrange, repeat
from torch import Tensor

# quantisation tables of T.81, annex K: luminance and chrominance at quality 50, row by row
_LUMINANCE = """
16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99
"""
_CHROMINANCE = """
17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99
"""

TIE = 1e-3  # lifts ties of decoded samples over the errors of float32, so that they are rounded up


def compress(img_B3HW: Tensor, sizes: list[tuple[int, int]], qualities: list[int]) -> Tensor:
    """What writing and reading a JPEG file makes of pictures.

    Args:
        img_B3HW: RGB float32, best in [0, 1] (clamped); each picture in the top left corner.
        sizes: (height, width) of each picture; what lies outside does not matter.
        qualities: of each, 1 to 100 (libjpeg's scale).
    Returns:
        (B, 3, H, W), 8-bit levels in [0, 1]; outside the pictures anything in that range.
    """
    height, width = img_B3HW.shape[-2:]
    heights, widths = (torch.tensor(side, device=img_B3HW.device) for side in zip(*sizes, strict=True))
    levels = (img_B3HW.clamp(0, 1) * 255).round()
    levels = _continue_edges(levels, heights, widths, _up(height, 16), _up(width, 16))
    luma, chroma = _to_ycc(levels)
    tables = [_table(name, qualities, img_B3HW.device) for name in (_LUMINANCE, _CHROMINANCE)]
    luma = _quantise(luma, tables[0])
    chroma = _quantise(_halve(chroma), tables[1])
    chroma = _double(chroma, (heights + 1) // 2, (widths + 1) // 2)
    return _to_rgb(luma, chroma)[..., :height, :width] / 255


def _up(length: int, step: int) -> int:
    return math.ceil(length / step) * step


def _continue_edges(x_BCHW: Tensor, heights_B: Tensor, widths_B: Tensor, height: int, width: int) -> Tensor:
    """Repeat the last row and column of each picture up to the size of the frame."""
    rows, columns = (torch.arange(side, device=x_BCHW.device) for side in (height, width))
    return take(x_BCHW, torch.minimum(rows, heights_B[:, None] - 1), torch.minimum(columns, widths_B[:, None] - 1))


def take(x_BCHW: Tensor, rows_BI: Tensor, columns_BJ: Tensor) -> Tensor:
    """Rows and columns of each picture by number: (B, C, I, J)."""
    batch, channels, _, width = x_BCHW.shape
    x = x_BCHW.gather(2, rows_BI[:, None, :, None].expand(batch, channels, -1, width))
    return x.gather(3, columns_BJ[:, None, None, :].expand(batch, channels, x.shape[2], -1))


def _to_ycc(rgb_B3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Luma (B, 1, H, W) and chroma (B, 2, H, W), whole numbers of 0 to 255."""
    red, green, blue = rgb_B3HW.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    blueness, redness = (blue - luma) / 1.772 + 128, (red - luma) / 1.402 + 128
    return luma.round()[:, None], torch.stack([blueness, redness], 1).round()


def _to_rgb(luma_B1HW: Tensor, chroma_B2HW: Tensor) -> Tensor:
    """RGB (B, 3, H, W), whole numbers of 0 to 255."""
    luma, (blueness, redness) = luma_B1HW[:, 0], (chroma_B2HW - 128).unbind(1)
    green = -(0.114 * 1.772 * blueness + 0.299 * 1.402 * redness) / 0.587
    parts = torch.stack([1.402 * redness, green, 1.772 * blueness], 1).round()
    return (luma[:, None] + parts).clamp(0, 255)


def _halve(x_BCHW: Tensor) -> Tensor:
    """Averages of 2 x 2 samples; ties are rounded down in even columns and up in odd ones."""
    sums = rearrange(x_BCHW, "b c (h i) (w j) -> b c h w i j", i=2, j=2).sum((-2, -1))
    bias = 1 + torch.arange(sums.shape[-1], device=sums.device) % 2
    return ((sums + bias) / 4).floor()


def _double(x_BChw: Tensor, heights_B: Tensor, widths_B: Tensor) -> Tensor:
    """Twice as many samples in both directions, by 3/4 of the nearer one and 1/4 of the farther one.

    Args:
        x_BChw: whole numbers.
        heights_B, widths_B: sizes of the pictures; samples beyond are not looked at.
    """
    height, width = x_BChw.shape[-2:]
    near_rows, far_rows = _neighbours(height, heights_B)
    near_columns, far_columns = _neighbours(width, widths_B)
    x = 3 * take(x_BChw, near_rows, near_columns) + take(x_BChw, far_rows, near_columns)
    farther = 3 * take(x_BChw, near_rows, far_columns) + take(x_BChw, far_rows, far_columns)
    bias = 8 - torch.arange(2 * width, device=x.device) % 2
    return ((3 * x + farther + bias) / 16).floor()


def _neighbours(frame: int, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (B, 2 frame) of the nearer and the farther sample of every place of twice the resolution."""
    place = torch.arange(2 * frame, device=lengths_B.device)
    near, last = place // 2, lengths_B[:, None] - 1
    far = (near + 2 * (place % 2) - 1).clamp_min(0)
    return torch.minimum(near, last), torch.minimum(far, last)


def _quantise(x_BCHW: Tensor, table_B88: Tensor) -> Tensor:
    """Round the cosine coefficients of 8 x 8 blocks to multiples of a table; whole numbers of 0 to 255 again."""
    basis = _cosines(x_BCHW.device)
    blocks = rearrange(x_BCHW - 128, "b c (h i) (w j) -> b c h w i j", i=8, j=8)
    steps = table_B88[:, None, None, None]
    # the codec's coefficients are whole eighths; ties, which flat blocks are full of, are rounded away from zero
    eighths = (8 * (basis @ blocks @ basis.T)).round()
    coefficients = eighths.sign() * ((eighths.abs() + 4 * steps) / (8 * steps)).floor() * steps
    decoded = (basis.T @ coefficients @ basis + (128.5 + TIE)).floor().clamp(0, 255)
    return rearrange(decoded, "b c h w i j -> b c (h i) (w j)")


@lru_cache(maxsize=8)
def _cosines(device: torch.device) -> Tensor:
    """(8, 8) orthonormal cosine transform: frequency, place."""
    frequency, place = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    basis = torch.cos((2 * place + 1) * frequency * math.pi / 16) / 2
    basis[0] /= math.sqrt(2)
    return basis.to(device)


def _table(name: str, qualities: list[int], device: torch.device) -> Tensor:
    """(B, 8, 8) quantisation steps."""
    base = torch.tensor([int(step) for step in name.split()])
    scale = torch.tensor([5000 // q if q < 50 else 200 - 2 * q for q in qualities])
    steps = ((repeat(base, "k -> b k", b=len(qualities)) * scale[:, None] + 50) // 100).clamp(1, 255)
    return rearrange(steps, "b (i j) -> b i j", i=8).float().to(device)
