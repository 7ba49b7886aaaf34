"""Contractions of sources with destination gradients. This package knows tensors, nothing of models."""

from .dispatch import contract
from .operands import Destination, Norm, Source

__all__ = ["Destination", "Norm", "Source", "contract"]
