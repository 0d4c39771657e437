"""What makes restoring faster than plain float32 code: what it costs in exactness is tested, not supposed.

Merged adapters are the same function in exact arithmetic. Bfloat16 and low-precision linear layers round the logits,
so that bits whose two logits are close may flip. Compiled code and CUDA graphs compute what they were made from.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from varestorer.systems.graphs import BatchGraphs
from varestorer.systems.restoring import PreparedTexts
from varestorer.utils.device import gains_from_bf16
from varestorer.utils.errors import UsageError, UserError

if TYPE_CHECKING:
    from varestorer.systems.varestorer import VARestorer

PRECISIONS = ("fp32", "bf16", "auto")
LINEARS = ("none", "int8", "fp8")
COMPILERS = ("g++", "c++", "clang++", "cl")
MOST_COMPILATIONS = 64
"""Of one piece of code: systems, sizes of batches and precisions in one process; torch goes on uncompiled after 8."""


@dataclass(frozen=True)
class Acceleration:
    """How a system restores; the default changes nothing but where a device gains from bfloat16.

    Attributes:
        merge: fold the adapters into the base weights, so that no teacher is left: one-step restoring only.
        precision: "fp32"; "bf16": blocks, decoder and restorer, while the encoder, which decides the bits of the
            input, the text and the head stay in float32 (spec E); "auto": bf16 where the device gains from it.
        compile: blocks, encoder and decoder through torch.compile, for each size of a batch once (a minute or more).
        graphs: replay each size of a batch as one CUDA graph.
        linears: linear layers of the blocks in "int8" or "fp8", through torchao; "none" leaves them.
    """

    merge: bool = True
    precision: str = "auto"
    compile: bool = False
    graphs: bool = False
    linears: str = "none"

    def __post_init__(self) -> None:
        for name, choices in (("precision", PRECISIONS), ("linears", LINEARS)):
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} must be one of {', '.join(choices)}, got {name}={getattr(self, name)}")

    @classmethod
    def parse(cls, text: str) -> Acceleration:
        """A variant by its name: means joined by "+", in any order.

        Args:
            text: "eager" (float32, adapters apart), or some of "merged", "bf16", "compile", "graphs", "int8", "fp8";
                all but eager have their adapters merged, so "bf16" is "merged+bf16".
        Raises:
            UsageError: an unknown word, or eager among others.
        """
        words = text.split("+")
        if words == ["eager"]:
            return cls(merge=False, precision="fp32")
        chosen: dict[str, Any] = {"precision": "fp32"}
        for word in words:
            if word not in WORDS:
                raise UsageError(f"a variant is eager, or some of {', '.join(WORDS)} joined by +; got {text!r}")
            chosen |= WORDS[word]
        return cls(**chosen)

    def on(self, device: torch.device) -> Acceleration:
        """The same with `precision` decided for a device: "fp32" or "bf16"."""
        if self.precision != "auto":
            return self
        return replace(self, precision="bf16" if gains_from_bf16(device) else "fp32")


WORDS: dict[str, dict[str, Any]] = {
    "merged": {"merge": True},
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "compile": {"compile": True},
    "graphs": {"graphs": True},
    "int8": {"linears": "int8"},
    "fp8": {"linears": "fp8"},
}
"""What each word of a variant's name chooses."""


def accelerate(system: VARestorer, acceleration: Acceleration) -> VARestorer:
    """Change a system, in place, for restoring alone: it is neither trained nor saved afterwards.

    Args:
        system: in evaluation mode, on the device where it will restore.
        acceleration: what to do.
    Returns:
        the same system; its `restore` and `restore_batch` are the fast ones.
    Raises:
        UserError: what this machine cannot do, or a system that was accelerated otherwise.
    """
    chosen = acceleration.on(system.device)
    if system.acceleration == chosen:
        return system
    if system.acceleration is not None:
        raise UserError("this system is accelerated already; load it again to choose other means")
    check_means(chosen, system.device)
    if chosen.precision == "fp32":
        system.set_precision("fp32")  # before the adapters are merged, so that nothing is rounded
    if chosen.merge:
        system.merge_adapters()
    if system.restorer is not None and system.device.type == "cpu":
        system.restorer.to(memory_format=torch.channels_last)  # 1.1 times as fast in bf16, 1.4 in float32
    if chosen.precision == "bf16":
        lower_precision(system)
    if chosen.linears != "none":
        quantise_linears(system.transformer.blocks, chosen.linears)
    if chosen.compile:
        compile_parts(system)
    if chosen.graphs:
        system.graphs = BatchGraphs()
    system.acceleration, system.texts = chosen, PreparedTexts()
    return system


def check_means(chosen: Acceleration, device: torch.device) -> None:
    """Refuse what cannot be done, before anything is changed.

    Raises:
        UserError: says what is missing.
    """
    if chosen.graphs and device.type != "cuda":
        raise UserError(f"graphs=true records CUDA graphs, and the device is {device.type}; leave it out")
    if chosen.compile and not any(map(shutil.which, (os.environ.get("CXX", "c++"), *COMPILERS))):
        raise UserError(f"compile=true needs a C++ compiler ({', '.join(COMPILERS)}); install one, or leave it out")
    if chosen.linears != "none" and not chosen.merge:
        raise UserError(f"linears={chosen.linears} needs merged adapters: use merge=true")
    if chosen.linears != "none" and find_spec("torchao") is None:
        raise UserError(f"linears={chosen.linears} needs torchao: pip install torchao")
    if chosen.linears == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise UserError("linears=fp8 needs an NVIDIA GPU of compute capability 8.9 or above; use int8 or none")


def lower_precision(system: VARestorer) -> None:
    """Blocks, restorer and decoder in bfloat16; the decoder's last norm and convolution, which make pixels, are not.

    Eight bits of mantissa are too few for the pixels themselves: they would be off by up to a level of 8 bits.
    """
    system.set_precision("bf16")
    if system.restorer is not None:
        system.restorer.use_bf16 = True
    decoder: Any = system.tokenizer.decoder
    decoder.to(torch.bfloat16)
    decoder.norm_out.float()
    decoder.conv_out.float()
    decoder.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(torch.bfloat16),))
    decoder.norm_out.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def quantise_linears(blocks: nn.Module, kind: str) -> None:
    """Weights of linear layers kept, and products made, in 8 bits: one scale a row of weights and a token.

    Args:
        blocks: changed in place.
        kind: "int8" or "fp8".
    """
    from torchao import quantization

    if kind == "int8":
        quantization.quantize_(blocks, quantization.Int8DynamicActivationInt8WeightConfig())
    else:
        config = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
        quantization.quantize_(blocks, config)


def compile_parts(system: VARestorer) -> None:
    """Compile at their first call what takes the time: the blocks, which share one piece of code, and the tokenizer."""
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, MOST_COMPILATIONS)
    for part in (*system.transformer.blocks, system.tokenizer.encoder, system.tokenizer.decoder):
        part.compile()
