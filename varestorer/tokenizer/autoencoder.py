"""Convolutional encoder and decoder of the tokenizers: BSQ-VAE (Infinity) and, with attention, VQ-VAE (VAR, VARSR).

Shapes: `B` batch, `Z` latent channels (bits per token), `H W` pixels, `h w` latent positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, zip_longest

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

NORMS = ("group", "none")


def normalization(norm: str, channels: int) -> nn.Module:
    """What stands before an activation.

    "group" is the published network's: 32 groups, eps 1e-6, affine. "none" lets a small network keep the brightness of
    a square, which group norm takes out of the features: it trains several times faster and seams less.
    """
    return nn.GroupNorm(32, channels, eps=1e-6) if norm == "group" else nn.Identity()


def conv3x3(channels_in: int, channels_out: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


class ResBlock(nn.Module):
    """x -> shortcut(x) + conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))); the shortcut is 1x1 when channels change."""

    def __init__(self, channels_in: int, channels_out: int, norm: str) -> None:
        super().__init__()
        self.norm1 = normalization(norm, channels_in)
        self.conv1 = conv3x3(channels_in, channels_out)
        self.norm2 = normalization(norm, channels_out)
        self.conv2 = conv3x3(channels_out, channels_out)
        changes = channels_in != channels_out
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class AttentionBlock(nn.Module):
    """x + proj(attention(norm(x))) over all positions, with one head as wide as the channels."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.norm = normalization(norm, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (three c) h w -> three b 1 (h w) c", three=3)
        taken = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(rearrange(taken, "b 1 (h w) c -> b c h w", h=x.shape[-2]))


class Downsample(nn.Module):
    """Halves the size: zero padding on the right and bottom only, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the size: nearest neighbor, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by its attention if there is any, then a change of resolution.

    Args:
        channels_in: of the first block.
        channels_out: of all that follows.
        num_blocks: residual blocks.
        resample: the change of resolution, if any.
        norm: see `normalization`.
        use_attention: one `AttentionBlock` after each residual block.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        num_blocks: int,
        resample: nn.Module | None,
        norm: str,
        use_attention: bool = False,
    ) -> None:
        super().__init__()
        widths = [channels_in, *[channels_out] * num_blocks]
        self.blocks = nn.ModuleList(ResBlock(*pair, norm) for pair in pairwise(widths))
        self.attentions = nn.ModuleList(AttentionBlock(width, norm) for width in widths[1:] if use_attention)
        self.resample = resample if resample is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip_longest(self.blocks, self.attentions):
            x = block(x)
            if attention is not None:
                x = attention(x)
        return self.resample(x)


def _middle(channels: int, norm: str, use_attention: bool) -> nn.Sequential:
    """Two residual blocks, with attention between them if there is any."""
    attention = [AttentionBlock(channels, norm)] if use_attention else []
    return nn.Sequential(ResBlock(channels, channels, norm), *attention, ResBlock(channels, channels, norm))


class Encoder(nn.Module):
    """Image to latent features.

    Args:
        channels: width of the first level.
        multipliers: width of each level over `channels`; all levels but the last halve the size.
        latent_channels: Z.
        num_blocks: residual blocks per level.
        patch_size: pixels folded into channels (pixel unshuffle) before the first convolution; 1 is the
            published network, larger values make a small network much faster.
        norm: see `normalization`.
        use_attention: in the last, coarsest level after each block, and in the middle (VAR's autoencoder).
    """

    def __init__(
        self,
        channels: int,
        multipliers: Sequence[int],
        latent_channels: int,
        num_blocks: int,
        patch_size: int,
        norm: str = "group",
        use_attention: bool = False,
    ) -> None:
        super().__init__()
        self.unshuffle = nn.PixelUnshuffle(patch_size)
        self.conv_in = conv3x3(3 * patch_size**2, channels)
        widths = [channels, *(channels * m for m in multipliers)]
        last = len(multipliers) - 1
        self.levels = nn.ModuleList(
            Level(
                widths[level],
                widths[level + 1],
                num_blocks,
                Downsample(widths[level + 1]) if level < last else None,
                norm,
                use_attention and level == last,
            )
            for level in range(len(multipliers))
        )
        self.middle = _middle(widths[-1], norm, use_attention)
        self.norm_out = normalization(norm, widths[-1])
        self.conv_out = conv3x3(widths[-1], latent_channels)

    def forward(self, img_B3HW: Tensor) -> Tensor:
        x = self.conv_in(self.unshuffle(img_B3HW))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """Latent features to image; mirrors `Encoder`. `levels` runs coarse to fine."""

    def __init__(
        self,
        channels: int,
        multipliers: Sequence[int],
        latent_channels: int,
        num_blocks: int,
        patch_size: int,
        norm: str = "group",
        use_attention: bool = False,
    ) -> None:
        super().__init__()
        widths = [channels * m for m in multipliers]
        self.conv_in = conv3x3(latent_channels, widths[-1])
        self.middle = _middle(widths[-1], norm, use_attention)
        incoming = [*widths[1:], widths[-1]]
        last = len(multipliers) - 1
        self.levels = nn.ModuleList(
            Level(
                incoming[level],
                widths[level],
                num_blocks,
                Upsample(widths[level]) if level > 0 else None,
                norm,
                use_attention and level == last,
            )
            for level in reversed(range(len(multipliers)))
        )
        self.norm_out = normalization(norm, widths[0])
        self.conv_out = conv3x3(widths[0], 3 * patch_size**2)
        self.shuffle = nn.PixelShuffle(patch_size)

    def forward(self, codes_BZhw: Tensor) -> Tensor:
        x = self.middle(self.conv_in(codes_BZhw))
        for level in self.levels:
            x = level(x)
        return self.shuffle(self.conv_out(F.silu(self.norm_out(x))))


def clamp_keeping_gradient(x: Tensor) -> Tensor:
    """Clamp to [-1, 1]; the gradient passes unchanged, so that saturated pixels can still be corrected."""
    return x + (torch.clamp(x, -1.0, 1.0) - x).detach()


@torch.no_grad()
def init_weights(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Random convolutions (uniform, by fan-in) and neutral norms, from one generator."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.GroupNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
