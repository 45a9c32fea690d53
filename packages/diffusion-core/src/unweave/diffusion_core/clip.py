"""CLIP models whatever the version of transformers: their features and their token embeddings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from unweave.diffusion_core.errors import PromptError, UnweaveError

_FEATURES = ("text_embeds", "image_embeds", "pooler_output")


@contextlib.contextmanager
def token_embedding_override(text_encoder: nn.Module, embeds: Tensor) -> Iterator[None]:
    """Let a text encoder read `embeds` (n or 1, tokens, width) instead of its token embeddings.

    Positions are added as usual and gradients flow to `embeds`. The token ids given to the encoder
    then only say where prompts end. Raises `PromptError`, from within the encoder, when `embeds`
    does not have the shape of what it replaces.
    """

    def replace(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        if embeds.shape[1:] != output.shape[1:] or len(embeds) not in (1, len(output)):
            raise PromptError(
                f"`embeds` must be {tuple(output.shape)} to replace the token embeddings, got "
                f"{tuple(embeds.shape)}"
            )
        return embeds.to(output).expand_as(output)

    encoder: Any = text_encoder
    handle = encoder.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def clip_features(output: Any) -> Tensor:
    """Return the features (n, d) in what a CLIP model returned, not normalised.

    transformers < 5 returns a tensor from `get_text_features` and `get_image_features`, later
    versions an output object; models with projection have `text_embeds` or `image_embeds`.
    """
    if isinstance(output, Tensor):
        return output
    for name in _FEATURES:
        features = getattr(output, name, None)
        if isinstance(features, Tensor):
            return features
    raise UnweaveError(
        f"expected a tensor or a CLIP output with one of {', '.join(_FEATURES)}, got "
        f"{type(output).__name__}"
    )
