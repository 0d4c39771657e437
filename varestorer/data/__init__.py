"""Pictures in, training pairs out: folders, embedded photographs, degradation, loaders."""

from varestorer.data.datasets import PairedCrops, PhotoCrops, Sample, embedded_photographs, heldout_pairs
from varestorer.data.degradation import BicubicDegradation, Degradation
from varestorer.data.folders import find_pairs, hq_images
from varestorer.data.loader import Batch, build_loader
from varestorer.data.mixture import Mixture
from varestorer.data.quality import quality_crops

__all__ = [
    "Batch",
    "BicubicDegradation",
    "Degradation",
    "Mixture",
    "PairedCrops",
    "PhotoCrops",
    "Sample",
    "build_loader",
    "embedded_photographs",
    "find_pairs",
    "heldout_pairs",
    "hq_images",
    "quality_crops",
]
