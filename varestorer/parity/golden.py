"""Golden tensors: folders of them, and comparison with ours."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from varestorer.systems.varsr import VARSR
from varestorer.systems.varsr_files import fill_tokenizer
from varestorer.tokenizer import MultiScaleTokenizer, ScaleSchedule, TokenizerConfig
from varestorer.utils.errors import UsageError, reason
from varestorer.utils.files import utf8_path
from varestorer.weights.files import read_tensors
from varestorer.weights.published.varsr import VQVAE_NESTED, vqvae_sizes

LEAST = 1e-2  # size of a tensor below which errors are not compared with it: gradients that should vanish
FEW = 1e-3  # share of 8-bit levels that may be off by one


@dataclass(frozen=True)
class Check:
    """One golden tensor compared."""

    name: str  # file and tensor
    error: float  # largest absolute difference (inf for another shape)
    tolerance: float  # largest that is right: 0 for bits and indices, 1 level for uint8 images

    @property
    def ok(self) -> bool:
        """Whether the difference is within the tolerance (never for NaN)."""
        return self.error <= self.tolerance


def largest_error(ours: Tensor, golden: Tensor) -> float:
    """Largest absolute difference; infinite where shapes differ, NaN where either is NaN."""
    if ours.shape != golden.shape:
        return float("inf")
    return (ours.double() - golden.double()).abs().max().item() if ours.numel() else 0.0


def image(pixels_BHW3: Tensor) -> Tensor:
    """8-bit pixels as the networks take them, (B, 3, H, W) in [-1, 1]."""
    return rearrange(pixels_BHW3, "b h w c -> b c h w").float() / 255 * 2 - 1


@contextmanager
def kept(
    outputs: Mapping[str, nn.Module], inputs: Mapping[str, nn.Module] | None = None
) -> Iterator[dict[str, Tensor]]:
    """What modules give (`outputs`) and what others are given first (`inputs`) in the block, by the names of these."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor | None = None) -> None:
        seen[name] = args[0] if output is None else output

    handles = [module.register_forward_hook(partial(keep, name)) for name, module in outputs.items()]
    handles += [module.register_forward_pre_hook(partial(keep, name)) for name, module in (inputs or {}).items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class GoldenFolder:
    """A folder of golden files; UsageError when one that is asked for is missing or unreadable."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def json(self, stem: str) -> dict[str, Any]:
        """Content of `<stem>.json`."""
        path = self.folder / f"{stem}.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UsageError(f"fixtures={self.folder}: cannot read {path.name} ({reason(error)})") from error

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """Content of `<stem>.safetensors`."""
        path = self.folder / f"{stem}.safetensors"
        try:
            with utf8_path(path) as plain:
                return load_file(plain)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"fixtures={self.folder}: cannot read {path.name} ({reason(error)})") from error


def open_tokenizer(path: Path) -> MultiScaleTokenizer:
    """VAR's tokenizer of a file of weights in the published form."""
    tokenizer = MultiScaleTokenizer(TokenizerConfig(**vqvae_sizes(read_tensors(path, VQVAE_NESTED))))
    fill_tokenizer(tokenizer, path)
    return tokenizer.eval()


class GoldenVARSR(GoldenFolder):
    """Golden files of VAR and VARSR, and the tiny networks in them.

    For each STEM, `STEM.io.safetensors` holds inputs, intermediates and outputs, `STEM.weights.safetensors`, if there,
    weights under published names, and `STEM.json` the configuration and the names of other files of weights. Networks
    are built and opened as published files are, so any folder of that form works.
    """

    @property
    def stems(self) -> list[str]:
        """Names of the groups of tensors."""
        return sorted(path.name.removesuffix(".io.safetensors") for path in self.folder.glob("*.io.safetensors"))

    def io(self, stem: str) -> dict[str, Tensor]:
        """Inputs, intermediates and outputs."""
        return self.tensors(f"{stem}.io")

    def weights_file(self, stem: str, part: str) -> Path:
        """The file of weights that a group's JSON names as its "vae" or "network"; else its own."""
        named = re.findall(r"\w+\.weights\.safetensors", str(self.json(stem).get(part, "")))
        return self.folder / (named[0] if named else f"{stem}.weights.safetensors")

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


@dataclass
class Group:
    """Golden tensors of one file, and what has to be known to compare with them."""

    golden: GoldenVARSR
    stem: str
    io: dict[str, Tensor]

    def near(
        self, name: str, ours: Tensor, tolerance: float, is_relative: bool = False, least: float = LEAST
    ) -> Iterator[Check]:
        """One tensor, of the same number of elements, if the file has it.

        The tolerance is of the largest absolute difference, or of that over the golden tensor's largest entry (over
        `least`, where that is larger).
        """
        if name not in self.io:
            return
        wanted = self.io[name].double()
        error = largest_error(ours.detach().reshape(wanted.shape) if ours.numel() == wanted.numel() else ours, wanted)
        if is_relative:
            error /= max(wanted.abs().max().item(), least)
        yield Check(f"{self.stem}/{name}", error, tolerance)

    def each(self, name: str, ours: Sequence[Tensor], tolerance: float) -> Iterator[Check]:
        """`<name>_k` of every scale."""
        for k, tensor in enumerate(ours):
            yield from self.near(f"{name}_{k}", tensor, tolerance)

    def pixels(self, name: str, ours: Tensor) -> Iterator[Check]:
        """8-bit pixels, of which a few may be one level off."""
        off = (ours.int() - self.io[name].int()).abs()
        is_many = bool((off > 0).float().mean() > FEW)
        yield Check(f"{self.stem}/{name}", float("inf") if is_many else float(off.max()), 1.0)
