"""Contractions of sources with destination gradients. This package knows tensors, nothing of models."""

from .operands import Destination, Norm, Source
from .reference import contract

__all__ = ["Destination", "Norm", "Source", "contract"]
