"""Capture, edit and guide attention in diffusion models (planned)."""

__all__ = ["__version__"]

__version__ = "0.0.1"
