"""Disentangled contrastive collaborative filtering on today's stack (planned)."""

__all__ = ["__version__"]

__version__ = "0.0.1"
