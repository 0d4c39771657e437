"""Published state dicts under our names, strictly: every tensor has a place, and every place its tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

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

BLOCK = r"block_chunks\.\d+\.module\.(\d+)\."


def tokenizer_tensors(
    wanted: Mapping[str, Tensor], num_levels: int, latent_width: int, tensors: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Tensors of a published tokenizer under our names.

    Args:
        wanted: state dict of a `MultiScaleTokenizer` of the same sizes, on any device.
        num_levels: of its autoencoder.
        latent_width: of its tokens.
        tensors: the file's content.
        source: the file, for messages.
    Raises:
        UserError: names what is missing, unexpected or misshapen.
    """
    names = {name: published_tokenizer_name(name, num_levels) for name in wanted}
    tensors = add_infixes(tensors, names.values())
    return from_published(wanted, tensors, names, derived_tokenizer_buffers(latent_width, tensors), source)


def transformer_tensors(
    wanted: Mapping[str, Tensor], width: int, tensors: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Tensors of a published teacher, or student (base and adapters), under our plain names.

    Args:
        wanted: a `VARTransformer`'s state dict under plain names (`adapters.plain_state_dict`), on any device; for a
            teacher's file without the adapters.
        width: of the transformer.
        tensors: the file's content; adapters are recognised by their names.
        source: the file, for messages.
    Raises:
        UserError: names what is missing, unexpected or misshapen.
    """
    names = transformer_names(wanted, blocks_per_chunk(tensors))
    return from_published(wanted, tensors, names, derived_transformer_buffers(names.values(), width), source)


def transformer_names(plain: Mapping[str, Tensor], per_chunk: int) -> dict[str, str]:
    """Ours -> published for the tensors of a transformer, with or without adapters."""
    adapted = adapted_layers(plain)
    if not adapted:
        return {name: published_transformer_name(name, per_chunk) for name in plain}
    return {name: published_student_name(name, per_chunk, adapted) for name in plain}


def blocks_per_chunk(tensors: Mapping[str, Tensor]) -> int:
    """Blocks are stored in chunks: how many in each, read from the names (1 where there are none)."""
    numbers = [int(found[1]) for found in (re.match(BLOCK, name) for name in tensors) if found]
    return max(numbers, default=0) + 1
