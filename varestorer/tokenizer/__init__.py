"""Multi-scale tokenizer: autoencoder, quantiser, residual pyramid, scale schedules."""

from varestorer.tokenizer.quantisers import BinarySphericalQuantiser
from varestorer.tokenizer.residual import MultiScaleQuantizer, TokenPyramid
from varestorer.tokenizer.schedule import ScaleSchedule
from varestorer.tokenizer.tokenizer import MultiScaleTokenizer, TokenizerConfig

__all__ = [
    "BinarySphericalQuantiser",
    "MultiScaleQuantizer",
    "MultiScaleTokenizer",
    "ScaleSchedule",
    "TokenPyramid",
    "TokenizerConfig",
]
