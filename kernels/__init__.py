"""Contractions of sources with destination gradients. This package knows tensors, nothing of models."""

from .dispatch import contract, row_statistics
from .operands import Destination, Norm, Source
from .rows import RowStatistics

__all__ = ["Destination", "Norm", "RowStatistics", "Source", "contract", "row_statistics"]
