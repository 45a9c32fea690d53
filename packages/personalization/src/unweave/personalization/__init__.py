"""Learn concepts from a few images for diffusion models (planned)."""

__all__ = ["__version__"]

__version__ = "0.0.1"
