"""Errors of this package: each message names the value, what was expected and the way out."""


class AttentionError(ValueError):
    """Base of the errors of unweave-attention-tools."""


class UnsupportedLayerError(AttentionError):
    """An attention layer whose processor cannot be intercepted."""


class TokenError(AttentionError):
    """A word that is not in the prompt, or a token outside of it."""


class MapError(AttentionError):
    """Maps that were not recorded, or a mask or selection that does not fit them."""


class BudgetError(AttentionError):
    """More bytes of maps than were allowed."""


class GuidanceError(AttentionError):
    """A latent update that failed or cannot be made."""


class ViewError(AttentionError):
    """A view that is not known, has no inverse or does not fit the size of the image."""
