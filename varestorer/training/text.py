"""The text that a training sample comes with."""

from __future__ import annotations

from varestorer.systems.varestorer import VARestorer
from varestorer.training.task import Batch
from varestorer.transformer import TextFeatures
from varestorer.utils.seeds import uniform_per_sample


def prompts_of(batch: Batch, system: VARestorer, condition_drop: float, seed: int) -> TextFeatures:
    """Features of the batch's prompts, some replaced by the null text; the null text where there are no prompts.

    Args:
        batch: its optional entry "text" is a list of (T, E) features, one per sample.
        system: holds the learned null text.
        condition_drop: share of prompts that are dropped; which ones depends on seed and sample alone.
        seed: of the drops.
    """
    keys = batch["key"]
    if "text" not in batch:
        return system.null_text(len(keys))
    text = TextFeatures.from_list(batch["text"])
    dropped = uniform_per_sample((), seed, keys, "condition drop", text.features_BTE.device) < condition_drop
    return system.transformer.text.drop(text, dropped)
