"""The parts of VARSR put together as far as tests of the parts need it, with the golden weights."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from varestorer.tokenizer.autoencoder import Decoder, Encoder
from varestorer.tokenizer.quantizers import CodebookQuantizer
from varestorer.tokenizer.residual import Phi, resize_area
from varestorer.weights.published_varsr import vqvae_sizes, vqvae_tensors


class Golden:
    """A folder of golden tensors: weights as float32, inputs and outputs as they are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def io(self, stem: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{stem}.io.safetensors")

    def weights(self, stem: str) -> dict[str, Tensor]:
        tensors = load_file(self.folder / f"{stem}.weights.safetensors")
        return {name: t.float() if t.dtype == torch.float16 else t for name, t in tensors.items()}

    def json(self, stem: str) -> dict:
        return json.loads((self.folder / f"{stem}.json").read_text())


def golden_folder(shared: Path) -> Golden:
    folder = shared / "fixtures" / "varsr"
    if not folder.is_dir():
        pytest.skip(f"no golden tensors in {folder}")
    return Golden(folder)


@dataclass(frozen=True)
class Quantized:
    indices: list[Tensor]
    cumulative: list[Tensor]
    residual: Tensor  # left over before the last scale's codes


class Tokenizer(nn.Module):
    """VAR's VQ-VAE, quantizing as the fixtures do."""

    def __init__(self, sizes: dict) -> None:
        super().__init__()
        width = sizes["code_width"]
        common = (sizes["channels"], sizes["multipliers"], width)
        self.encoder = Encoder(*common, sizes["num_encoder_blocks"], patch_size=1, use_attention=True)
        self.decoder = Decoder(*common, sizes["num_decoder_blocks"], patch_size=1, use_attention=True)
        self.quantizer = nn.Module()
        self.quantizer.quantiser = CodebookQuantizer(sizes["num_codes"], width)
        self.quantizer.phi = Phi(width)
        self.quant_conv = nn.Conv2d(width, width, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(width, width, 3, padding=1)

    @classmethod
    def golden(cls, golden: Golden, stem: str) -> "Tokenizer":
        tensors = golden.weights(stem)
        sizes = vqvae_sizes(tensors)
        tokenizer = cls(sizes).eval()
        tokenizer.load_state_dict(
            vqvae_tensors(tokenizer.state_dict(), len(sizes["multipliers"]), tensors, f"{stem}.weights.safetensors")
        )
        return tokenizer

    def features(self, image: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(image))

    def decode(self, codes: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(codes))

    def quantize(self, features: Tensor, sides: Sequence[int], phi_at_last: bool) -> Quantized:
        quantiser, phi = self.quantizer.quantiser, self.quantizer.phi
        size, last = features.shape[-2:], len(sides) - 1
        total, indices, cumulative, residual = torch.zeros_like(features), [], [], features
        for k, side in enumerate(sides):
            residual = (features - total).detach()
            numbers = quantiser.indices(residual if k == last else resize_area(residual, (side, side)))
            codes = quantiser.codes(numbers)
            if k < last:
                codes = F.interpolate(codes, size=size, mode="bicubic")
            total = total + (phi(codes, k, len(sides)) if k < last or phi_at_last else codes)
            indices.append(numbers)
            cumulative.append(total)
        return Quantized(indices, cumulative, residual)


def next_inputs(cumulative: Sequence[Tensor], sides: Sequence[int]) -> Tensor:
    pooled = [resize_area(total, (side, side)) for total, side in zip(cumulative, sides[1:], strict=False)]
    return torch.cat([x.flatten(2).transpose(1, 2) for x in pooled], dim=1)
