"""A system's weights in the published form, and what the published files must hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from varestorer.conditioning.restorer import published_restorer_tensors
from varestorer.tokenizer import MultiScaleTokenizer, TokenizerConfig
from varestorer.transformer import TransformerConfig, VARTransformer
from varestorer.transformer.adapters import attach_adapters, plain_state_dict
from varestorer.utils.errors import UserError
from varestorer.weights.load import transformer_names
from varestorer.weights.published import (
    derived_tokenizer_buffers,
    derived_transformer_buffers,
    published_tokenizer_name,
    to_published,
)

TEACHER = "infinity_2b"
STUDENT = "varestorer_student_lora_r32"
TOKENIZER = "infinity_vae_d32"
RESTORER = "general_swinir"
KINDS = (TEACHER, STUDENT, TOKENIZER, RESTORER)
NUM_CHUNKS = 8  # the published blocks are stored in
RANK = 32


def manifest(kind: str) -> dict[str, Tensor]:
    """Names, shapes and types of a published file, as tensors whose values do not count.

    Args:
        kind: one of `KINDS`.
    """
    if kind == RESTORER:
        return published_restorer_tensors()
    with torch.device("meta"):
        if kind == TOKENIZER:
            return tokenizer_tensors(MultiScaleTokenizer(TokenizerConfig()))
        transformer = VARTransformer(TransformerConfig())
        if kind == STUDENT:
            attach_adapters(transformer, RANK, cross_value_bias=False)
        return transformer_tensors(transformer)


def kind_of(names: Mapping[str, Tensor]) -> str | None:
    """Which published file the names are nearest to; None if none."""
    marks = {
        STUDENT: ("block_chunks.", ".lora_down."),  # a file of adapters alone has the second only
        TEACHER: ("block_chunks.",),
        TOKENIZER: ("encoder.down.",),
        RESTORER: (".residual_group.",),
    }
    for kind, wanted in marks.items():
        if all(any(mark in name for name in names) for mark in wanted):
            return kind
    return None


def tokenizer_tensors(tokenizer: MultiScaleTokenizer) -> dict[str, Tensor]:
    """A tokenizer's tensors by published names, derived ones included."""
    state = tokenizer.state_dict()
    names = {name: published_tokenizer_name(name, len(tokenizer.config.multipliers)) for name in state}
    return to_published(state, names, derived_tokenizer_buffers(tokenizer.config.latent_width))


def transformer_tensors(transformer: VARTransformer) -> dict[str, Tensor]:
    """A transformer's tensors by published names, derived ones included; with adapters, as a student's."""
    plain = plain_state_dict(transformer)
    depth = transformer.config.depth
    names = transformer_names(plain, depth // NUM_CHUNKS if depth % NUM_CHUNKS == 0 else 1)
    return to_published(plain, names, derived_transformer_buffers(names.values(), transformer.config.width))


def part_tensors(system: Any, part: str) -> dict[str, Tensor]:
    """A part of a system by published names.

    Args:
        system: a `VARestorer`.
        part: "transformer", "tokenizer" or "restorer".

    Raises:
        UserError: the system has no restorer.
    """
    if part == "transformer":
        return transformer_tensors(system.transformer)
    if part == "tokenizer":
        return tokenizer_tensors(system.tokenizer)
    if system.restorer is None:
        raise UserError("this model has no restorer to write")
    return dict(system.restorer.published_state_dict())
