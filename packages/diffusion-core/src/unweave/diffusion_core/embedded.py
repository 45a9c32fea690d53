"""The embedded world and its recogniser, for packages that do not depend on emoji-world."""

from __future__ import annotations

from typing import Any

from unweave.diffusion_core.errors import PipelineError


def embedded_world() -> Any:
    """Return the table of concepts, styles and backgrounds of emoji-world.

    Raises `PipelineError` when unweave-emoji-world is not installed.
    """
    try:
        from unweave.emoji_world import World
    except ImportError as error:
        raise PipelineError(
            "the model 'emoji-world' is in a package of its own: pip install unweave-emoji-world"
        ) from error
    return World


def embedded_recogniser() -> Any:
    """Return the recogniser of emoji-world.

    Raises `PipelineError` when unweave-emoji-world is not installed or carries no weights for it.
    """
    embedded_world()
    from unweave import emoji_world

    try:
        return emoji_world.load_recogniser()
    except FileNotFoundError as error:
        raise PipelineError(str(error)) from error
