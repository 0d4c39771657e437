"""Seams: whether gradients across the borders of tiles differ from those elsewhere."""

from __future__ import annotations

from functools import cache

import pytest
import skimage.data
import torch
from torch import Tensor

from varestorer.utils.images import resize
from varestorer.utils.seeds import torch_generator
from varestorer.utils.tiling import restore_tiled, tile_positions

TILE = 64
PHOTOGRAPHS = {"smooth": "moon", "textured": "brick"}


def seam_positions(length: int, tile: int, overlap: int) -> list[int]:
    """Pixels whose step from the one before crosses a seam.

    They are where a tile's weight begins and ends, and the middle between the two.
    """
    positions = tile_positions(length, tile, overlap)
    found: set[int] = set()
    for before, after in zip(positions, positions[1:], strict=False):
        found |= {after, before + tile, (after + before + tile) // 2}
    return sorted(p for p in found if 0 < p < length)


def seam_ratio(image_3HW: Tensor, original_3HW: Tensor, tile: int, overlap: int, period: int = 1) -> float:
    """Mean absolute gradient across seams over that elsewhere, relative to the same in the picture without tiles.

    Dividing by the original's ratio takes out what the picture itself has at these places. Mean of rows and columns.

    Args:
        image_3HW: restored from tiles.
        original_3HW: of the same size, without seams.
        tile: side, pixels.
        overlap: of the tiles, pixels.
        period: a decoder that draws patches has edges between them everywhere; seams are then compared with places
            that lie alike in a patch of this many pixels.
    """
    ratios = []
    for dim in (-2, -1):
        seams = torch.tensor(seam_positions(image_3HW.shape[dim], tile, overlap))
        places = torch.arange(1, image_3HW.shape[dim])
        elsewhere = ~torch.isin(places, seams)
        alike = elsewhere & (places % period == seams[:, None] % period)
        image, original = (
            (steps[seams - 1] / ((alike * steps).sum(dim=1) / alike.sum(dim=1))).mean()
            for steps in (x.diff(dim=dim).abs().double().mean(dim=(0, -3 - dim)) for x in (image_3HW, original_3HW))
        )
        ratios.append((image / original).item())
    return sum(ratios) / 2


@cache
def photograph(kind: str) -> Tensor:
    """A quarter of a photograph, reduced as low-resolution inputs are: (3, 96, 96) in [0, 1]."""
    gray = torch.tensor(getattr(skimage.data, PHOTOGRAPHS[kind])()[:384, :384]) / 255
    return resize(gray.expand(3, -1, -1), (96, 96), "area")


def disagreeing_network(seed: int):  # noqa: ANN201
    """A network whose tiles disagree where they overlap.

    Every tile has its own offset of each channel, its own contrast, and darker or brighter borders some 3 pixels wide
    (standard deviations 0.02, 10 % and 0.02; those of a model of quickstart_scratch differ as much from tile to tile).
    """

    def run(tiles_B3tt: Tensor, numbers: list[int]) -> Tensor:
        reach = torch.exp(-(torch.arange(TILE) + 0.5) / 3)
        from_border = torch.stack([reach, reach.flip(0)])
        restored = []
        for tile_3tt, number in zip(tiles_B3tt, numbers, strict=True):
            generator = torch_generator(seed, "tile", number)
            mean = tile_3tt.mean(dim=(-2, -1), keepdim=True)
            contrast = 1 + 0.1 * torch.randn((), generator=generator)
            offset = 0.02 * torch.randn(3, 1, 1, generator=generator)
            borders = 0.02 * torch.randn(2, 3, 2, generator=generator) @ from_border
            restored.append((tile_3tt - mean) * contrast + mean + offset + borders[0, :, None] + borders[1, :, :, None])
        return torch.stack(restored)

    return run


def restored_seam_ratio(kind: str, overlap: int, seed: int) -> float:
    size = (384, 384)
    out = restore_tiled(photograph(kind), size, TILE, overlap, 16, disagreeing_network(seed))
    return seam_ratio(out, resize(photograph(kind), size, "bicubic"), TILE, overlap)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", PHOTOGRAPHS)
def test_borders_of_tiles_look_like_the_rest_of_the_picture(kind: str, seed: int) -> None:
    assert restored_seam_ratio(kind, TILE // 4, seed) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", PHOTOGRAPHS)
def test_hard_cuts_are_seen_as_seams(kind: str) -> None:
    assert restored_seam_ratio(kind, 0, 0) > 2


@pytest.mark.parametrize("kind", PHOTOGRAPHS)
def test_a_picture_has_no_seams_compared_with_itself(kind: str) -> None:
    image = photograph(kind)
    assert seam_ratio(image, image, 32, 8) == 1
    assert seam_ratio(image, image, 32, 8, period=4) == 1


def test_seams_lie_where_weights_begin_and_end_and_in_the_middle_of_overlaps() -> None:
    assert seam_positions(112, 64, 16) == [48, 56, 64]
    assert seam_positions(128, 64, 0) == [64]
    assert seam_positions(64, 64, 16) == []


def test_patches_of_a_decoder_are_not_taken_for_seams() -> None:
    patches = 0.1 * (torch.arange(256) // 8 % 2).expand(3, 256, 256)
    plain = 0.1 * torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0))
    patchy = plain + patches + patches.mT
    assert seam_ratio(patchy, plain, TILE, 16) > 1.2
    assert seam_ratio(patchy, plain, TILE, 16, period=8) == pytest.approx(1, abs=0.03)
