"""Multi-scale tokenizer: autoencoder, quantizer, residual pyramid, scale schedules."""

from varestorer.tokenizer.quantizers import BinarySphericalQuantizer
from varestorer.tokenizer.residual import MultiScaleQuantizer, RunningSum, TokenPyramid
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
