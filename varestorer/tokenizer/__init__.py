"""Multi-scale tokenizer: autoencoder, quantizer, residual pyramid, scale schedules."""

from varestorer.tokenizer.quantizer import BinarySphericalQuantizer, MultiScaleQuantizer, RunningSum, TokenPyramid
from varestorer.tokenizer.schedule import ScaleSchedule
from varestorer.tokenizer.tokenizer import MultiScaleTokenizer, TokenizerConfig

__all__ = [
    "BinarySphericalQuantizer",
    "MultiScaleQuantizer",
    "MultiScaleTokenizer",
    "RunningSum",
    "ScaleSchedule",
    "TokenPyramid",
    "TokenizerConfig",
]
