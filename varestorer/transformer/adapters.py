"""Low-rank adapters that turn the teacher into the student (LoRA through peft; paper, section 3).

The adapters sit on linear layers inside the blocks, by default those of self and cross attention, and nowhere else.
With them off the network is the teacher, bit for bit, so one copy of the weights serves both.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from varestorer.transformer.blocks import CrossAttention
from varestorer.utils.errors import UserError

LAYERS = {"self_attention": "qkv|proj", "cross_attention": "q|kv|proj", "ffn": "fc1|fc2"}
"""The linear layers of each part of a block that adapters may sit on."""
TARGETS = ("self_attention", "cross_attention")
"""Parts with adapters in the released student (5 layers per block, 320 tensors for Infinity-2B)."""
ADAPTER = "student"


def target_pattern(targets: Sequence[str]) -> str:
    """Regular expression for the names of the layers that get adapters; anchored, so that no other layer does.

    Raises:
        UserError: no part, or an unknown one.
    """
    if not targets or not set(targets) <= LAYERS.keys():
        raise UserError(f"model.student.lora_targets must list some of {', '.join(LAYERS)}, got {list(targets)}")
    layers = "|".join(rf"{part}\.({LAYERS[part]})" for part in targets)
    return rf"^blocks\.\d+\.({layers})$"


def attach_adapters(
    transformer: nn.Module, rank: int, cross_value_bias: bool, targets: Sequence[str] = TARGETS
) -> None:
    """Add adapters of the given rank (alpha = rank, no dropout) in place, and switch them on.

    Args:
        transformer: a `VARTransformer`.
        rank: r of every adapter.
        cross_value_bias: whether cross attention adds its value bias while its adapters are on.
        targets: parts of the blocks that get adapters, see `LAYERS`.
    Raises:
        UserError: see `target_pattern`.
    """
    config = lora_config(rank, targets)
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, transformer, adapter_name=ADAPTER)
    for layer in _cross_attentions(transformer):
        layer.adapted_v_bias = cross_value_bias or "cross_attention" not in targets
    use_adapters(transformer, True)


def lora_config(rank: int, targets: Sequence[str], **options: Any) -> Any:
    """What peft calls these adapters: alpha = rank, no dropout, no bias; for rank and targets see `attach_adapters`."""
    # peft pulls in bitsandbytes where that is installed, which complains about kernels nobody asked it for
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # callers build on the meta device, where what libraries make on import must not be, nor can be with torch 2.6
    with torch.device("cpu"):
        from peft import LoraConfig

    pattern = target_pattern(targets)
    return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=pattern, bias="none", **options)


@torch.no_grad()
def init_adapters(transformer: nn.Module, generator: torch.Generator | None = None) -> None:
    """Random down projections and zero up projections: the student starts as the teacher."""
    for name, parameter in adapter_parameters(transformer).items():
        if name.endswith(".lora_up.weight"):
            nn.init.zeros_(parameter)
        else:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)


def use_adapters(transformer: nn.Module, enabled: bool) -> None:
    """Switch the network to the student (True) or the teacher (False)."""
    for layer in _adapted_layers(transformer):
        layer.enable_adapters(enabled)
    for attention in _cross_attentions(transformer):
        attention.use_v_bias = attention.adapted_v_bias if enabled else True


@contextmanager
def adapters_off(transformer: nn.Module) -> Iterator[None]:
    """The teacher inside the block, the student again after it."""
    use_adapters(transformer, False)
    try:
        yield
    finally:
        use_adapters(transformer, True)


def switches(module: nn.Module) -> tuple[bool, ...]:
    """Whether each adapted layer of a part of a transformer has its adapters off now; changes when they are merged."""
    return tuple(layer.disable_adapters for layer in _adapted_layers(module))


def adapter_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the adapters under their plain names, see `plain_name`."""
    return {plain_name(name): p for name, p in transformer.named_parameters() if ".lora_" in name}


def plain_name(name: str) -> str:
    """A parameter's name without peft's wrapping: `X.base_layer.weight` -> `X.weight`, and
    `X.lora_A.student.weight` -> `X.lora_down.weight`."""
    name = name.replace(".base_layer.", ".")
    return re.sub(r"\.lora_([AB])\." + ADAPTER, lambda m: ".lora_down" if m.group(1) == "A" else ".lora_up", name)


@torch.no_grad()
def merge_adapters(transformer: nn.Module) -> None:
    """Fold the adapters into the base weights and remove them; the result is the student alone.

    The value bias of cross attention becomes zero where the student does not use it.
    """
    for name, layer in list(_named_adapted_layers(transformer)):
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(transformer.get_submodule(parent), child, layer.get_base_layer())
    for attention in _cross_attentions(transformer):
        if not attention.adapted_v_bias:
            attention.v_bias.zero_()
        attention.adapted_v_bias = attention.use_v_bias = True


@torch.no_grad()
def folded(base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], cross_value_bias: bool) -> dict[str, Tensor]:
    """Weights of the merged student, as `merge_adapters` makes them, from those of teacher and adapters by plain names.

    Needs no network with adapters, and so not peft, which takes longer to import than such a network to load.
    """
    merged = dict(base)
    layers = {name.removesuffix(".lora_up.weight") for name in adapters if name.endswith(".lora_up.weight")}
    for layer in layers:
        weight = base[f"{layer}.weight"]
        up, down = (adapters[f"{layer}.lora_{way}.weight"].to(weight.dtype) for way in ("up", "down"))
        merged[f"{layer}.weight"] = weight + up @ down
    if not cross_value_bias and any(".cross_attention." in layer for layer in layers):
        biases = [name for name in base if name.endswith(".cross_attention.v_bias")]
        merged |= {name: torch.zeros_like(base[name]) for name in biases}
    return merged


def plain_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The module's state dict under plain names."""
    return {plain_name(name): tensor for name, tensor in module.state_dict().items()}


def assign_plain(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make tensors under plain names the module's own, without a copy; others of the module stay as they are.

    They go to the device of the tensors they replace (those on the meta device: stay where they are).
    """
    places = {plain_name(name): (name, tensor.device) for name, tensor in module.state_dict().items()}
    placed = {}
    for name, tensor in tensors.items():
        place, device = places[name]
        placed[place] = tensor if device.type == "meta" else tensor.to(device)
    module.load_state_dict(placed, strict=False, assign=True)


def _named_adapted_layers(transformer: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in transformer.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            yield name, module


def _adapted_layers(transformer: nn.Module) -> Iterator[Any]:
    return (layer for _, layer in _named_adapted_layers(transformer))


def _cross_attentions(transformer: nn.Module) -> Iterator[CrossAttention]:
    return (module for module in transformer.modules() if isinstance(module, CrossAttention))
