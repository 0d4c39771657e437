"""The released VARSR inference around a stand-in for the network."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from varestorer.systems.official_varsr import (
    TILE,
    blend_latents,
    enlarged_size,
    restore_square,
    restore_tiled,
    tile_weights,
)


def encode(tiles: Tensor) -> Tensor:
    return F.avg_pool2d(tiles, 16)


def decode(latents: Tensor) -> Tensor:
    return F.interpolate(latents, scale_factor=16.0, mode="bilinear")


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([90 + 80 * y / height, 90 + 80 * x / width, 120 + 0 * x], axis=-1).astype(np.uint8)


def test_sides_are_rounded_up_one_by_one() -> None:
    assert enlarged_size(130, 150) == (576, 640)
    assert enlarged_size(20, 129) == (512, 576)
    assert enlarged_size(100, 300, scale=2) == (512, 608)


def test_tiles_overlap_and_the_last_ones_lie_flush_with_the_end() -> None:
    seen = []

    def count(tiles: Tensor) -> Tensor:
        seen.append(len(tiles))
        return encode(tiles)

    restored = restore_tiled(smooth(250, 270), count, decode)
    assert restored.shape == (1000, 1080, 3)
    assert seen == [3, 3, 3]  # latents of 64 x 68: tiles at 0, 24 and the end
    expected = smooth(1000, 1080).astype(int)
    assert np.abs(restored.astype(int) - expected)[40:-40, 40:-40].max() <= 6


def test_a_blend_of_equal_tiles_is_the_tile() -> None:
    tiles = torch.full((6, 2, TILE, TILE), 0.7)
    blended = blend_latents(tiles, [0, 24], [0, 24, 30])
    assert blended.shape == (1, 2, 56, 62)
    torch.testing.assert_close(blended, torch.full_like(blended, 0.7))


def test_weights_are_lower_by_half_a_position_in_rows_alone() -> None:
    weights = tile_weights()
    assert torch.equal(weights, weights.flip(1))
    torch.testing.assert_close(weights[1:], weights[1:].flip(0))
    assert weights[0, 16] < weights[31, 16]


def test_a_square_comes_from_the_whole_image_in_8_bits() -> None:
    restored = restore_square(smooth(128, 256), encode, decode)
    assert restored.shape == (512, 512, 3)
    assert restored.dtype == np.uint8
    assert np.abs(restored.astype(int) - smooth(512, 512).astype(int))[40:-40, 40:-40].max() <= 6
