"""Find, read and move concepts in language and vision-language models (planned)."""

__all__ = ["__version__"]

__version__ = "0.0.1"
