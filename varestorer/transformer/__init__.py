"""The visual autoregressive transformer: attention, positions, masks, adapters, sampling, generation."""

from varestorer.transformer.model import TransformerConfig, VARTransformer
from varestorer.transformer.text import TextContext, TextFeatures

__all__ = ["TextContext", "TextFeatures", "TransformerConfig", "VARTransformer"]
