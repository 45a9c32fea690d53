"""The errors a user of unweave can meet: one base class, one class for each kind of cause."""

from __future__ import annotations


class UnweaveError(ValueError):
    """Base of every error that unweave raises on purpose; the message says the way out."""


class ArtifactError(UnweaveError):
    """A saved file is missing, damaged, unsafe to open, or belongs to another base model."""


class PipelineError(UnweaveError):
    """A pipeline cannot be found, is no Stable Diffusion pipeline, or is unsafe to load."""


class SelectionError(UnweaveError):
    """A selection of parameters, layers or tokens is unknown or empty."""


class PromptError(UnweaveError):
    """A prompt is empty, too long, or does not contain the phrase it should."""


class ImageError(UnweaveError):
    """A file or array is not an image, or has an unusable size or value range."""


class NonFiniteError(UnweaveError):
    """A loss, gradient or parameter became NaN or infinite."""
