"""Balanced assignments by Sinkhorn-Knopp."""

from unweave.kernels.sinkhorn.functions import sinkhorn

__all__ = ["sinkhorn"]
