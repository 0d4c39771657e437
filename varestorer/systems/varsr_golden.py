"""A folder of golden files of VAR and VARSR, and the tiny networks in it.

For each STEM, `STEM.io.safetensors` holds inputs, intermediates and outputs, `STEM.weights.safetensors`, if there,
weights under published names, and `STEM.json` the configuration and the names of other files of weights. Networks are
built and opened as published files are, so any folder of that form works.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from varestorer.systems.varsr import VARSR
from varestorer.systems.varsr_files import published_tokenizer_sizes, tokenizer_of
from varestorer.tokenizer import MultiScaleTokenizer, ScaleSchedule, TokenizerConfig
from varestorer.transformer.adapters import assign_plain
from varestorer.utils.errors import UsageError, reason


class GoldenVARSR:
    """A folder of golden files.

    Args:
        folder: the folder.

    Raises:
        UsageError: a file that is asked for is missing or unreadable.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @property
    def stems(self) -> list[str]:
        """Names of the groups of tensors."""
        return sorted(path.name.removesuffix(".io.safetensors") for path in self.folder.glob("*.io.safetensors"))

    def io(self, stem: str) -> dict[str, Tensor]:
        """Inputs, intermediates and outputs."""
        return self._tensors(f"{stem}.io.safetensors")

    def json(self, stem: str) -> dict[str, Any]:
        """What is known of them."""
        path = self.folder / f"{stem}.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UsageError(f"fixtures={self.folder}: cannot read {path.name} ({reason(error)})") from error

    def weights_file(self, stem: str, part: str) -> Path:
        """The file of weights that a group's JSON names as its "vae" or "network"; else its own."""
        named = re.findall(r"\w+\.weights\.safetensors", str(self.json(stem).get(part, "")))
        return self.folder / (named[0] if named else f"{stem}.weights.safetensors")

    def tokenizer(self, path: Path) -> MultiScaleTokenizer:
        """The tokenizer of a file of weights."""
        tokenizer = MultiScaleTokenizer(TokenizerConfig(**published_tokenizer_sizes(path)))
        assign_plain(tokenizer, tokenizer_of(tokenizer, path))
        return tokenizer.eval()

    def system(self, stem: str, part: str = "own") -> VARSR:
        """The networks of a group, or those that its JSON names, with its guidance."""
        own = self.weights_file(stem, part).name.removesuffix(".weights.safetensors")
        tokenizer = self.weights_file(own, "vae")
        system = VARSR.from_published(self.weights_file(own, "own"), str(tokenizer)).eval()
        system.tokenizer.to(memory_format=torch.contiguous_format)  # as the golden ones: 8-bit levels hang on it
        for config in (self.json(own)["config"], self.json(stem)):
            system.sampling = replace(system.sampling, guidance=config.get("cfg", system.sampling.guidance))
        return system

    def schedule(self, stem: str) -> ScaleSchedule:
        """The scales of a group."""
        return ScaleSchedule.build(sides=self.json(stem)["config"]["patch_nums"])

    def _tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / name)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"fixtures={self.folder}: cannot read {name} ({reason(error)})") from error


def image(pixels_BHW3: Tensor) -> Tensor:
    """8-bit pixels as the networks take them, (B, 3, H, W) in [-1, 1]."""
    return rearrange(pixels_BHW3, "b h w c -> b c h w").float() / 255 * 2 - 1
