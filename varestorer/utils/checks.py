"""Comparison of tensors with golden ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Check:
    """One golden tensor compared.

    Attributes:
        name: file and tensor.
        error: largest absolute difference (inf for another shape).
        tolerance: largest that is right: 0 for bits and indices, 1 level for uint8 images.
    """

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the difference is within the tolerance (never for NaN)."""
        return self.error <= self.tolerance


def largest_error(ours: Tensor, golden: Tensor) -> float:
    """Largest absolute difference; infinite where shapes differ, NaN where either is NaN."""
    if ours.shape != golden.shape:
        return float("inf")
    return (ours.double() - golden.double()).abs().max().item() if ours.numel() else 0.0
