"""The multi-scale tokenizer: autoencoder and residual quantizer together (Infinity, section 3.2).

Shapes: `B` batch, `H W` pixels, `Z` latent width, `h w` latent positions.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from varestorer.tokenizer.autoencoder import NORMS, Decoder, Encoder, clamp_keeping_gradient, conv3x3
from varestorer.tokenizer.quantizer import (
    REDUCTIONS,
    RESIZES,
    REUSES,
    BinarySphericalQuantizer,
    CodebookQuantizer,
    Corruption,
    MultiScaleQuantizer,
    Phi,
    TokenPyramid,
)
from varestorer.tokenizer.schedule import ScaleSchedule
from varestorer.utils.errors import UserError
from varestorer.utils.watch import watch


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
        norm: "group" (published) or "none", see `autoencoder.normalization`.
        vocabulary: entries of the codebook (VAR: 4096); 0: the binary spherical quantizer of Infinity.
        use_attention: attention at the coarsest level and in the middle (VAR).
        use_quant_conv: a convolution on both sides of the quantizer (VAR).
        num_phi: convolutions that smooth the enlarged codes (VAR: 4); 0: none.
        enlarge: kernel that brings codes to the latent size, see `MultiScaleQuantizer`.
        shrink: kernel that makes the next scale's input of their sum, likewise.
        reuse: see `MultiScaleQuantizer`; says something where a schedule has several targets (H-VAR).
        reduce: how an image is reduced to them: "area" (mean of squares), or "bicubic" with antialiasing.
    Raises:
        UserError: another `norm`, `enlarge`, `shrink`, `reuse` or `reduce`.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4, 4)
    latent_width: int = 32
    num_encoder_blocks: int = 2
    num_decoder_blocks: int = 3
    patch_size: int = 1
    norm: str = "group"
    vocabulary: int = 0
    use_attention: bool = False
    use_quant_conv: bool = False
    num_phi: int = 0
    enlarge: str = "bilinear"
    shrink: str = "bilinear"
    reuse: str = "tokens"
    reduce: str = "area"

    def __post_init__(self) -> None:
        choices = {"norm": NORMS, "enlarge": tuple(RESIZES), "shrink": tuple(RESIZES), "reuse": REUSES}
        choices["reduce"] = tuple(REDUCTIONS)
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"model.tokenizer.{name} must be {' or '.join(known)}, got {getattr(self, name)!r}")
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
        options = config.patch_size, config.norm, config.use_attention
        self.encoder = Encoder(*sizes, config.num_encoder_blocks, *options)
        self.decoder = Decoder(*sizes, config.num_decoder_blocks, *options)
        width = config.latent_width
        codebook = CodebookQuantizer(config.vocabulary, width) if config.vocabulary else BinarySphericalQuantizer(width)
        phi = Phi(width, config.num_phi) if config.num_phi else None
        self.quantizer = MultiScaleQuantizer(codebook, config.enlarge, config.shrink, phi, config.reuse)
        self.quant_conv = conv3x3(width, width) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = conv3x3(width, width) if config.use_quant_conv else nn.Identity()

    @property
    def stride(self) -> int:
        """Pixels per latent position, along one side."""
        return self.config.stride

    @watch("VAE encoder")
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
        return self.quant_conv(self.encoder(img_B3HW))

    def encode(
        self, img_B3HW: Tensor, schedule: ScaleSchedule, corrupt: Corruption | None = None, raw_last: bool = False
    ) -> TokenPyramid:
        """Tokens of an image in [-1, 1] whose latent size is the schedule's last scale.

        Where the schedule has several targets, the image is reduced to each of them and encoded there (H-VAR). For
        `corrupt` and `raw_last` see `MultiScaleQuantizer.forward`.
        """
        features = [self.features(image) for image in self.reduced(img_B3HW, schedule)]
        with watch("quantize"):
            return self.quantizer(features, schedule, corrupt, raw_last)

    def reduced(self, img_B3HW: Tensor, schedule: ScaleSchedule) -> list[Tensor]:
        """The image at the size of each of the schedule's targets, smallest first; the last one is itself."""
        sizes = [(h * self.stride, w * self.stride) for h, w in schedule.targets]
        return [*(REDUCTIONS[self.config.reduce](img_B3HW, size) for size in sizes[:-1]), img_B3HW]

    @watch("VAE decoder")
    def decode(self, codes_BZhw: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] of summed codes; the clamp lets gradients pass."""
        return clamp_keeping_gradient(self.decoder(self.post_quant_conv(codes_BZhw)))
