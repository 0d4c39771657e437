"""What is measured: a checkpoint, or a network of given sizes with random weights, and its variants.

Speed does not depend on what weights say, so they are drawn cheaply: once, on the device itself, in the precision that
is measured; the variants share what they do not change.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn

from varestorer.benchmark.counting import Count, as_on_cuda, count
from varestorer.conditioning.restorer import PUBLISHED_SIZES, Restorer, new_restorer
from varestorer.systems import load
from varestorer.systems.acceleration import WORDS as MEANS
from varestorer.systems.acceleration import Acceleration
from varestorer.systems.base import System
from varestorer.utils.errors import UsageError
from varestorer.utils.iqa import quiet
from varestorer.utils.seeds import isolated_rng, torch_generator
from varestorer.weights.bundle import shipped
from varestorer.weights.restorers import load_restorer

PAPER_MODEL = "2b"
"""The model that has a restorer in front although its config names no file."""
PUBLISHED_MULTIPLE = 64
"""Sides that the published restorer sees are multiples of this, pixels."""
PATTERN = 2**20  # numbers that are drawn; weights repeat them
WAYS = ("cfg", "prefix", "nocache", "compile", "graphs")
STEPS = ("eager", "bf16", "checkpoint", "compile", "slices")
GRAMMAR: dict[str, list[tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "restore": [(("eager",), ()), ((*MEANS,), (*MEANS,))],
    "generate": [(("one",), ("short", "compile", "graphs")), (("multi",), WAYS)],
    "train_step": [(STEPS, STEPS)],
}
"""Of each benchmark: first words of a variant's name, and those that may follow, joined by +."""


def words_of(what: str, name: str) -> frozenset[str]:
    """The words of a variant's name; UsageError for a word that is none, or that does not follow the first."""
    first, *more = name.split("+")
    if not any(first in firsts and set(more) <= set(followers) for firsts, followers in GRAMMAR[what]):
        choices = [
            f"{firsts[0]} with some of {', '.join(followers)}"
            if len(firsts) == 1 < len(followers)
            else ", ".join(firsts)
            for firsts, followers in GRAMMAR[what]
        ]
        raise UsageError(f"a variant of what={what} joins words by +: {'; or '.join(choices)}; got {name!r}")
    return frozenset([first, *more])


@dataclass
class Source:
    """Where the measured systems come from: a checkpoint (a run, a bundle, a published student), or random weights.

    With the restorer "published" one of the published sizes is in front of a system that has none; "auto" is published
    for the paper's own sizes.
    """

    name: str  # of the checkpoint or of the sizes, for the report
    model: Mapping[str, Any]  # a config of `configs/model`, as `hydra.utils.instantiate` takes it
    ckpt: str | Path | None = None
    restorer: str = "none"
    seed: int = 0

    def blank(self, merged: bool) -> System:
        """The system on the meta device, in evaluation mode, its adapters merged if it is asked for.

        Without weights there is nothing to merge: such a system is made without adapters, which would cost seconds.
        """
        if self.ckpt is not None:
            blank = without_weights(self._loaded)
            return blank.merge_adapters() if merged else blank
        sizes = {name: part for name, part in self.model.items() if name not in ("restorer", "weights")}
        if merged and (sizes.get("student") or {}).get("lora_rank"):
            sizes["student"] = {**sizes["student"], "merged": True}
        with torch.device("meta"):
            system: System = instantiate(sizes, _convert_="all")
        if self._restorer is not None:
            system.restorer = copy.deepcopy(self._restorer).to("meta")
        return system.eval().requires_grad_(False)

    def system(self, device: torch.device, merged: bool = False, precision: str = "fp32") -> System:
        """The system, see `blank`, its blocks in `precision`; random weights never pass through the host's memory."""
        if self.ckpt is not None:
            system = copy.deepcopy(self._loaded).to(device)
            return (system.merge_adapters() if merged else system).set_precision(precision)
        system = self.blank(merged).set_precision(precision).to_empty(device=device)
        fill(system, self.seed)
        if self._restorer is not None:
            system.restorer = self._restorer.to(device)
        system.tokenizer.to(memory_format=torch.channels_last)
        return system

    @cached_property
    def _loaded(self) -> System:
        system: System = load(self.ckpt).eval().requires_grad_(False)
        if self.restorer == "published" and "restorer" not in system.networks:
            system.restorer = published_restorer(self.seed)
        return system

    @cached_property
    def _restorer(self) -> Restorer | None:
        """What `model.restorer` names; one of the published sizes stands in for a file that is not there."""
        named = self.model.get("restorer")
        if isinstance(named, str) and shipped(named).exists():
            return load_restorer(named)
        if named is not None and not isinstance(named, str):
            return new_restorer(**named, seed=self.seed)
        is_wanted = self.restorer == "published" or (self.restorer == "auto" and self.name == PAPER_MODEL)
        return published_restorer(self.seed) if isinstance(named, str) or is_wanted else None


@torch.no_grad()
def fill(system: nn.Module, seed: int) -> None:
    """Random matrices of one spread by fan-in, repeating one pattern; gains of 1, small vectors, adapters at rest."""
    device = next(system.parameters()).device
    pattern = torch.randn(PATTERN, generator=torch_generator(seed, "weights", device=device), device=device)
    for name, parameter in system.named_parameters():
        if ".lora_B." in name:  # merging then changes nothing, so that variants can share the base
            parameter.zero_()
        elif parameter.ndim == 1 and not name.endswith("bias"):
            parameter.fill_(1.0)
        else:
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.02
            flat = parameter.view(-1)
            for start in range(0, len(flat), PATTERN):
                part = flat[start : start + PATTERN]
                part.copy_(pattern[: len(part)] * spread)


def sharing(system: System) -> System:
    """A twin with parameters of its own on the same memory: to change one's precision leaves the other as it is."""
    held = [*system.parameters(), *system.buffers()]
    return copy.deepcopy(system, {id(tensor): nn.Parameter(tensor.data, requires_grad=False) for tensor in held})


def without_weights(system: System) -> System:
    """A system of the same sizes on the meta device."""
    with torch.device("meta"):
        twin = type(system)(**system.config)
    restorer = system.networks.get("restorer")
    if restorer is not None:
        twin.restorer = copy.deepcopy(restorer[0]).to("meta")
    return twin.eval().requires_grad_(False)


def published_restorer(seed: int = 0) -> Restorer:
    """A restorer of the published sizes with random weights."""
    from spandrel.architectures.SwinIR import SwinIR  # slow to import

    with quiet(), isolated_rng(seed):
        return Restorer(SwinIR(**PUBLISHED_SIZES), multiple=PUBLISHED_MULTIPLE)


class Variants:
    """The variants (name -> its means, precisions decided) of a source on a device.

    What two of them have in common is in memory once.
    """

    def __init__(self, source: Source, device: torch.device, chosen: Mapping[str, Acceleration]) -> None:
        self.source, self.device, self.chosen = source, device, chosen
        self._bases: dict[tuple[bool, str], System] = {}

    def system(self, name: str) -> System:
        """A variant, accelerated; an eager one is left as it is loaded, and so computes the text for each batch.

        UserError: what this machine cannot do.
        """
        means = self.chosen[name]
        twin = sharing(self._base(means.merge, means.precision))
        return twin.accelerate(means) if means.merge else twin

    def _base(self, merged: bool, precision: str) -> System:
        key = merged, precision
        if key not in self._bases:
            others = [held for (is_merged, _), held in self._bases.items() if is_merged == merged]
            if others:
                self._bases[key] = sharing(others[0]).set_precision(precision)
            elif self._bases and self.source.ckpt is None:
                self._bases[key] = sharing(next(iter(self._bases.values()))).merge_adapters().set_precision(precision)
            else:
                self._bases[key] = self.source.system(self.device, merged, precision)
        return self._bases[key]

    def counts(self, name: str, batch: int) -> dict[str, Count]:
        """What a variant computes and moves for a batch; products in 8 bits count as those they stand for."""
        means = replace(self.chosen[name], compile=False, graphs=False, linears="none")
        return restoring_counts(self.source.blank(means.merge), batch, means if means.merge else None)


def restoring_counts(blank: System, batch: int = 1, means: Acceleration | None = None) -> dict[str, Count]:
    """What restoring a batch of squares takes, part by part; `blank` is a system on the meta device, and changed.

    With means of acceleration the text is made once, and does not count.
    """
    images_B3tt = torch.empty(batch, 3, blank.tile, blank.tile, device="meta")
    with as_on_cuda():
        if means is not None:
            blank.accelerate(means).restore_batch(images_B3tt)
        return count(lambda: blank.restore_batch(images_B3tt))


def num_parameters(system: System) -> dict[str, int]:
    """Network -> its parameters."""
    return {
        name: sum(parameter.numel() for module in modules for parameter in module.parameters())
        for name, modules in system.networks.items()
    }


def num_trained(system: System) -> int:
    """Parameters that the paper's training changes: the adapters, or, where it has none, all but the frozen parts.

    Of a merged system, those of the adapters it had.
    """
    if system.student_config.merged:
        with torch.device("meta"):
            student = asdict(replace(system.student_config, merged=False))
            system = type(system)(**system.config | {"student": student})
    adapters = [p.numel() for name, p in system.transformer.named_parameters() if ".lora_" in name]
    frozen = [*system.tokenizer.parameters()] + [p for m in system.networks.get("restorer", ()) for p in m.parameters()]
    return sum(adapters) or sum(p.numel() for p in system.parameters()) - sum(p.numel() for p in frozen)
