"""The released VARestorer inference, step by step, with what hurts its users; for parity, not for use.

What it does, and what `VARestorer.restore` does instead:

- 8 bits and Lanczos between all steps; ours stays in floats and resizes once.
- Non-square images are squashed to the square the network sees and stretched back (or `tiled`, one tile after the
  other); ours keeps the aspect, pads what is small and runs tiles in batches.
- Bits are drawn from the global generators, whatever the seed; ours takes the likelier bits or seeded ones.
- One time in ten the prompt is dropped, and then stays dropped for the tiles that follow; ours always uses it.
- The result is truncated to 8 bits, which darkens it by half a level; ours is rounded.

Shapes: `H W` pixels, `t` side of the system's square, `L` tokens, `Z` bits per token, `T` text tokens, `E` text width.
Arrays end in `3` because Pillow's do.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from varestorer.transformer import TextFeatures
from varestorer.utils.errors import UserError
from varestorer.utils.finite import check_finite, spread_nan
from varestorer.utils.images import as_picture, from_levels, to_levels
from varestorer.utils.tiling import gaussian_weights, scaled_size, tile_positions

DROP_RATE = 0.1  # of the training, left on
LEAST_WEIGHT = 1e-8  # sums of blending weights are raised to it before the division


@torch.inference_mode()
def restore_official(
    system: Any, image_3HW: Tensor, scale: float = 4, *, prompt: Tensor | None = None, tiled: bool = False
) -> Tensor:
    """Restore an image as the released script does: (3, H', W') float32 in [0, 1], multiples of 1/255.

    Draws from two global generators, as that script does: per square one number of Python's `random`, then one
    `torch.rand` per scale on the CPU. `random.seed` and `torch.manual_seed` make a result repeatable. What the released
    script's autocast changes on a GPU (bf16 matrix products) is not imitated: this is its float32 arithmetic.

    Args:
        system: with the traits of the released student; its square has a side of `system.tile`, released 512.
        image_3HW: RGB in [0, 1], see `as_picture`; rounded to 8 bits first, as if it had been read from a file.
        scale: enlargement.
        prompt: text features (T, E); None for the null text. The released code overwrites it where it drops it;
            here that happens to a copy, made once per call, so the caller's tensor never changes.
        tiled: restore overlapping squares at the size of the result instead of the squashed whole.
    Raises:
        UserError: a prompt that does not fit the network, or a result that is not finite.
    """
    image_3HW = as_picture(image_3HW)
    null_TE = system.transformer.condition.null_features
    features_TE = null_TE if prompt is None else prompt
    (most, width), shape = null_TE.shape, tuple(features_TE.shape)
    if len(shape) != 2 or not 1 <= shape[0] <= most or shape[1] != width:
        raise UserError(f"a prompt must be features of 1 to {most} tokens of width {width}, got shape {shape}")
    features_TE = features_TE.detach().to(system.device, torch.float32, copy=True)  # it may be overwritten
    enlarged_HW3 = _lanczos(to_levels(image_3HW), scaled_size(image_3HW.shape[1], image_3HW.shape[2], scale))
    if tiled:
        restored_HW3 = _tiled(system, enlarged_HW3, features_TE)
    else:  # the whole image as one square, whatever its aspect
        square_tt3 = _lanczos(enlarged_HW3, (system.tile, system.tile))
        restored_tt3 = restore_square(system, from_levels(square_tt3), features_TE)
        restored_HW3 = _lanczos(restored_tt3, enlarged_HW3.shape[:2])
    return from_levels(restored_HW3).to(image_3HW.device)


def _tiled(system: Any, image_HW3: np.ndarray, features_TE: Tensor) -> np.ndarray:
    """Squares that share a quarter of their side (released: 128 of 512), each restored alone, blended by a Gaussian."""
    tile, margin = system.tile, system.tile // 4
    height, width = image_HW3.shape[:2]
    padded_HW3 = _pad(image_HW3, (margin, margin), (margin, margin))
    # The released code pads tiles that are too small; only a side with a single tile has them, so padding the image
    # there is the same. Whether the weights count the padding is not specified; along such a side they cancel, so
    # that only a tie of the rounding may fall the other way.
    padded_HW3 = _pad(padded_HW3, *((0, max(tile - side, 0)) for side in padded_HW3.shape[:2]))
    weights_tt1 = gaussian_weights(tile).float().numpy()[..., None]
    total_HW3 = np.zeros(padded_HW3.shape, np.float32)
    weight_HW1 = np.zeros((*padded_HW3.shape[:2], 1), np.float32)
    rows, columns = (tile_positions(side, tile, margin) for side in padded_HW3.shape[:2])
    # The order decides which random numbers a tile gets; it is not specified, row by row is assumed.
    for top, left in ((y, x) for y in rows for x in columns):
        place = slice(top, top + tile), slice(left, left + tile)
        total_HW3[place] += restore_square(system, from_levels(padded_HW3[place]), features_TE) * weights_tt1
        weight_HW1[place] += weights_tt1
    blended_HW3 = np.rint(total_HW3 / np.maximum(weight_HW1, LEAST_WEIGHT)).clip(0, 255).astype(np.uint8)
    return blended_HW3[margin : margin + height, margin : margin + width]


@torch.inference_mode()
def restore_square(system: Any, square_3tt: Tensor, features_TE: Tensor) -> np.ndarray:
    """One pass of a square in [0, 1]: perhaps drop the prompt, clean, tokenize, predict, draw bits, decode, truncate.

    The prompt's features are overwritten for good by the null text, one time in ten. Gives (t, t, 3) uint8; UserError:
    the result is not finite.
    """
    # The released script always has a prompt; the null text is taken for one, so its number is drawn as well.
    if random.random() < DROP_RATE:
        features_TE.copy_(system.transformer.condition.null_features[: len(features_TE)])
    condition = system.condition(square_3tt[None].to(system.device))
    logits_1LZ2 = system.student_logits(condition, TextFeatures.from_list([features_TE]))
    codes = spread_nan(system.codes(draw_bits(system, logits_1LZ2)), logits_1LZ2)
    image_3tt = system.decode(codes)[0]
    check_finite(image_3tt, "the result")
    return rearrange((image_3tt * 255).to(torch.uint8).cpu(), "c h w -> h w c").numpy()


def draw_bits(system: Any, logits_BLZ2: Tensor) -> Tensor:
    """Bits (B, L, Z) bool of all scales, sampled with noise of PyTorch's global CPU generator, scale by scale."""
    bits = []
    for tokens in system.schedule.slices:
        part_BlZ2 = logits_BLZ2[:, tokens]
        batch, num_tokens, num_bits, _ = part_BlZ2.shape
        uniform = torch.rand(batch, num_tokens * num_bits, 2, device="cpu").view(part_BlZ2.shape)
        bits.append(system.transformer.head.select(part_BlZ2, uniform.to(part_BlZ2.device)))
    return torch.cat(bits, dim=1)


def _lanczos(image_HW3: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Resize 8-bit pixels to (height, width)."""
    return np.array(Image.fromarray(image_HW3).resize((size[1], size[0]), Image.Resampling.LANCZOS))


def _pad(image_HW3: np.ndarray, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
    """Continue an image by its mirror image, or by its edge pixels where a side is too short for one reflection."""
    # Whether sides are judged one by one is not specified; here one that is too short decides for both.
    fits = max(rows) < image_HW3.shape[0] and max(columns) < image_HW3.shape[1]
    return np.pad(image_HW3, (rows, columns, (0, 0)), mode="reflect" if fits else "edge")
