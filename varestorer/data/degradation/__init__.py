"""Making low-quality pictures out of good ones."""

from varestorer.data.degradation.operations import round_to_8bit
from varestorer.data.degradation.pipeline import (
    BicubicDegradation,
    Degradation,
    Degrade,
    OneOf,
    RandomBlur,
    RandomNoise,
    RandomResize,
)

__all__ = [
    "BicubicDegradation",
    "Degradation",
    "Degrade",
    "OneOf",
    "RandomBlur",
    "RandomNoise",
    "RandomResize",
    "round_to_8bit",
]
