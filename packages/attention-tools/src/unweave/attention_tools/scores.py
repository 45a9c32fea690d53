"""How much views look like prompts: scorers for anagrams, and what their cosines say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize


class Scorer(Protocol):
    """Says how much each view looks like each prompt."""

    def __call__(self, views: Tensor, t: float, prompts: Sequence[str]) -> Tensor:
        """Return cosines (T, T), of view i and prompt j, of the views (T, C, H, W) at time t."""


@torch.no_grad()
def text_features(model: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Return the features (n, D) of unit length that a CLIP of transformers has for prompts."""
    tokens = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
    ids = tokens.input_ids.to(model.device)
    return unit_features(model.get_text_features(input_ids=ids))


class PromptFeatures:
    """Those features of prompts that are asked for again and again, kept."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self._kept: dict[tuple[str, ...], Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return the features (T, D) of prompts."""
        key = tuple(prompts)
        if key not in self._kept:
            self._kept[key] = text_features(self.model, self.tokenizer, prompts)
        return self._kept[key]


class CLIPScorer:
    """Cosines of an ordinary CLIP of transformers, for predicted images in [-1, 1].

    `mean` and `std` are those of its image processor, by default OpenAI's. Images are resized to
    the size that the model reads. Embeddings of prompts are kept.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
    ) -> None:
        self.model, self.texts = model.eval(), PromptFeatures(model, tokenizer)
        self.mean, self.std = (torch.tensor(one).reshape(1, 3, 1, 1) for one in (mean, std))

    @torch.no_grad()
    def __call__(self, views: Tensor, t: float, prompts: Sequence[str]) -> Tensor:
        """Return cosines (T, T) of views (T, 3, H, W) and prompts."""
        size = self.model.config.vision_config.image_size
        images = views.float() / 2 + 0.5
        if images.shape[-2:] != (size, size):
            images = interpolate(images, (size, size), mode="bicubic", antialias=True)
        images = (images.clamp(0, 1) - self.mean.to(images)) / self.std.to(images)
        seen = self.model.get_image_features(pixel_values=images.to(self.model.dtype))
        return unit_features(seen) @ self.texts(prompts).T


def alignment(scores: Tensor) -> Tensor:
    """Return A = min_i S_ii of cosines (..., T, T) of view i and prompt j.

    >>> alignment(torch.tensor([[0.3, 0.1], [0.2, 0.25]]))
    tensor(0.2500)
    """
    return scores.diagonal(dim1=-2, dim2=-1).amin(-1)


def concealment(scores: Tensor, temperature: float = 0.01) -> Tensor:
    """Return C, the mean share of the right prompt of a view, and of the right view of a prompt.

    Softmax of `scores` (..., T, T) over `temperature`, that of the CLIP, by rows and by columns.

    >>> concealment(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    tensor(1.)
    """
    logits = scores / temperature
    both = (logits.softmax(-1) + logits.softmax(-2)) / 2
    return both.diagonal(dim1=-2, dim2=-1).mean(-1)


def unit_features(features: Any) -> Tensor:
    """Return what `get_image_features` and `get_text_features` of any release gave, of length 1."""
    vectors: Tensor = getattr(features, "pooler_output", features)
    return normalize(vectors.float(), dim=-1)
