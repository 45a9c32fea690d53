"""Disentangled and concept-based representations, their metrics and explanations (planned)."""

__all__ = ["__version__"]

__version__ = "0.0.1"
