"""The visual autoregressive transformer: attention, positions, masks, conditions, heads, adapters, generation."""

from varestorer.transformer.conditions import ClassLabels, Context, TextFeatures
from varestorer.transformer.model import PreparedCondition, TransformerConfig, VARTransformer

__all__ = ["ClassLabels", "Context", "PreparedCondition", "TextFeatures", "TransformerConfig", "VARTransformer"]
