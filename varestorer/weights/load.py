"""Published state dicts into our modules, strictly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from varestorer.weights.files import check_names_and_shapes
from varestorer.weights.published import (
    adapted_layers,
    add_infixes,
    derived_tokenizer_buffers,
    derived_transformer_buffers,
    from_published,
    published_student_name,
    published_tokenizer_name,
    published_transformer_name,
)


def load_published_tokenizer(tokenizer: Any, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy a published tokenizer into a `MultiScaleTokenizer` of the same sizes."""
    num_levels = len(tokenizer.config.multipliers)
    names = {name: published_tokenizer_name(name, num_levels) for name in tokenizer.state_dict()}
    tensors = add_infixes(tensors, names.values())
    derived = derived_tokenizer_buffers(tokenizer.config.num_bits, tensors)
    ours = from_published(tensors, names, derived, source)
    check_names_and_shapes(tokenizer.state_dict(), ours, source)
    tokenizer.load_state_dict(ours)


def load_published_transformer(
    transformer: Any, plain: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str
) -> None:
    """Copy a published teacher, or student (base and adapters), into a `VARTransformer`.

    Args:
        transformer: receives the weights.
        plain: its state dict under plain names (`adapters.plain_state_dict`); for a teacher file without the
            adapters.
        tensors: the file's content; adapters are recognised by their names.
        source: the file, for messages.
    """
    names = transformer_names(plain, blocks_per_chunk(tensors))
    derived = derived_transformer_buffers(names.values(), transformer.config.width)
    ours = from_published(tensors, names, derived, source)
    check_names_and_shapes(plain, ours, source)
    for name, tensor in ours.items():
        plain[name].copy_(tensor)


def transformer_names(plain: Mapping[str, Tensor], per_chunk: int) -> dict[str, str]:
    """Ours -> published for the tensors of a transformer, with or without adapters."""
    adapted = adapted_layers(plain)
    if not adapted:
        return {name: published_transformer_name(name, per_chunk) for name in plain}
    return {name: published_student_name(name, per_chunk, adapted) for name in plain}


def blocks_per_chunk(tensors: Mapping[str, Tensor]) -> int:
    """Blocks are stored in chunks: how many in each, read from the names (1 where there are none)."""
    numbers = [int(name.split(".")[3]) for name in tensors if name.startswith("block_chunks.")]
    return max(numbers, default=0) + 1
