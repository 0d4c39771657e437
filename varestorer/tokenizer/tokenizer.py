"""The multi-scale tokenizer: autoencoder and residual quantizer together (Infinity, section 3.2).

Shapes: `B` batch, `H W` pixels, `Z` latent width, `h w` latent positions.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from varestorer.tokenizer.autoencoder import NORMS, Decoder, Encoder, clamp_keeping_gradient
from varestorer.tokenizer.quantizers import BinarySphericalQuantizer
from varestorer.tokenizer.residual import Corruption, MultiScaleQuantizer, TokenPyramid
from varestorer.tokenizer.schedule import ScaleSchedule
from varestorer.utils.errors import UserError


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of a tokenizer; the defaults are the published d32 network (110,118,051 parameters).

    Attributes:
        channels: width of the finest level.
        multipliers: width of each level over `channels`; each level but the last halves the size.
        latent_width: channels of the latent, which are also the bits per token of the binary spherical quantizer.
        num_encoder_blocks: residual blocks per encoder level.
        num_decoder_blocks: residual blocks per decoder level.
        patch_size: pixels folded into channels before the first convolution (1 = published).
        norm: "group" (published) or "none", see `autoencoder.normalisation`.

    Raises:
        UserError: another `norm`.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4, 4)
    latent_width: int = 32
    num_encoder_blocks: int = 2
    num_decoder_blocks: int = 3
    patch_size: int = 1
    norm: str = "group"

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise UserError(f"model.tokenizer.norm must be {' or '.join(NORMS)}, got {self.norm!r}")
        object.__setattr__(self, "multipliers", tuple(self.multipliers))

    @property
    def stride(self) -> int:
        """Pixels per latent position, along one side."""
        return self.patch_size * 2 ** (len(self.multipliers) - 1)


class MultiScaleTokenizer(nn.Module):
    """Images to tokens of K scales, and back."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        sizes = (config.channels, config.multipliers, config.latent_width)
        self.encoder = Encoder(*sizes, config.num_encoder_blocks, config.patch_size, config.norm)
        self.decoder = Decoder(*sizes, config.num_decoder_blocks, config.patch_size, config.norm)
        self.quantizer = MultiScaleQuantizer(BinarySphericalQuantizer(config.latent_width))

    @property
    def stride(self) -> int:
        """Pixels per latent position, along one side."""
        return self.config.stride

    def features(self, img_B3HW: Tensor) -> Tensor:
        """Encoder output before quantization.

        Args:
            img_B3HW: RGB in [-1, 1]; H, W multiples of `stride`.

        Returns:
            features_BZhw: float, h = H / stride.

        Raises:
            ValueError: wrong rank, channels or size.
        """
        if img_B3HW.ndim != 4 or img_B3HW.shape[1] != 3:
            raise ValueError(f"the tokenizer wants images (B, 3, H, W), got {tuple(img_B3HW.shape)}")
        if any(side % self.stride for side in img_B3HW.shape[-2:]):
            got = tuple(img_B3HW.shape[-2:])
            raise ValueError(f"image sides must be multiples of {self.stride} pixels, got {got}; pad first")
        return self.encoder(img_B3HW)

    def encode(self, img_B3HW: Tensor, schedule: ScaleSchedule, corrupt: Corruption | None = None) -> TokenPyramid:
        """Tokens of an image in [-1, 1] whose latent size is the schedule's last scale."""
        return self.quantizer(self.features(img_B3HW), schedule, corrupt)

    def decode(self, codes_BZhw: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] of summed codes; the clamp lets gradients pass."""
        return clamp_keeping_gradient(self.decoder(codes_BZhw))
