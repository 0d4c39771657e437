"""The text that a training sample comes with."""

from __future__ import annotations

import torch
from torch import Tensor

from varestorer.systems.varestorer import VARestorer
from varestorer.training.task import Batch
from varestorer.transformer import ClassLabels, TextFeatures
from varestorer.utils.errors import UserError
from varestorer.utils.seeds import uniform_per_sample


def prompts_of(batch: Batch, system: VARestorer, condition_drop: float, seed: int) -> TextFeatures | ClassLabels:
    """Features of the batch's prompts, some replaced by the null text; the null text where there are no prompts.

    A dropped prompt becomes the null text of its length; a sample without a prompt gets all of the null text, as in
    restoring without a prompt.

    Args:
        batch: its optional entry "text" is a list of (T, E) features on any device, or None, one per sample.
        system: holds the learned null text.
        condition_drop: share of prompts that are dropped; which ones depends on seed and sample alone.
        seed: of the drops.
    Raises:
        UserError: features of another width than the model's.
    """
    keys = batch["key"]
    if system.transformer.config.num_classes:  # qualities instead of words, and what is restored to is good
        return ClassLabels(torch.zeros(len(keys), dtype=torch.int64, device=system.device))
    if "text" not in batch:
        return system.null_text(len(keys))
    null_TE = system.transformer.condition.null_features
    draws = uniform_per_sample((), seed, keys, "condition drop").tolist()
    chosen: list[Tensor] = []
    for text_TE, draw in zip(batch["text"], draws, strict=True):
        if text_TE is None:
            chosen.append(null_TE)
            continue
        if text_TE.shape[-1] != null_TE.shape[-1]:
            raise UserError(
                f"data.text holds features of width {text_TE.shape[-1]}, but the model wants {null_TE.shape[-1]}; make "
                "the folder again with the text encoder of this model (scripts/precompute_text.py text_encoder=...)"
            )
        # the null text gets a gradient, if only of zero, in every process: they wait for each other's
        prompt_TE = text_TE.to(null_TE) + 0 * null_TE.sum()
        chosen.append(null_TE[: len(text_TE)] if draw < condition_drop else prompt_TE)
    return TextFeatures.from_list(chosen)
