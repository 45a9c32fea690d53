"""Anti-segregation of Anagram-MTL: concepts' attention maps are drawn over one another
(arXiv 2412.02693, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from unweave.attention_tools.capture import MapReader
from unweave.attention_tools.errors import MapError, TokenError
from unweave.attention_tools.layers import AttentionLayer
from unweave.attention_tools.overlap import min_sum_ratio
from unweave.attention_tools.tokens import Word, find_tokens
from unweave.attention_tools.views import View


def anti_segregation_loss(maps: Tensor) -> Tensor:
    """Return L, the mean over pairs of |phi_T - R_jk|, of maps (..., T, h, w) (section 3.2).

    R_jk = sum min(A_j, A_k) / sum (A_j + A_k), and phi_T = 0.5 - 0.05 (T - 1) is less than the
    overlap of equal maps, so full overlap is not forced.

    >>> anti_segregation_loss(torch.eye(2).reshape(2, 1, 2))
    tensor(0.4500)
    """
    tasks = maps.shape[-3]
    if tasks < 2:
        raise MapError(f"anti-segregation needs the maps of two views or more, got {tasks}")
    first, second = torch.triu_indices(tasks, tasks, 1).tolist()
    overlap = min_sum_ratio(maps[..., first, :, :], maps[..., second, :, :])
    return (0.5 - 0.05 * (tasks - 1) - overlap).abs().mean(-1)


def desegregated(
    x: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    lr: float,
    inner_steps: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return x (n, C, H, W) after gradient steps on `loss_of(x)` (n,), and the loss at the start.

    Plain gradient descent, as the paper's code does it.
    """
    before = None
    for _ in range(inner_steps):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            loss = loss_of(x)
            (gradient,) = torch.autograd.grad(loss.sum(), x)
        x = (x - lr * gradient).detach()
        before = loss.detach() if before is None else before
    assert before is not None
    return x, before


def concept_maps(
    unet: Any, x: Tensor, t: Any, text: Tensor, views: Sequence[View], reader: MapReader
) -> Tensor:
    """Return the map A_k of each concept in the frame of the image, (n, T, h, w).

    `x` (n, C, H, W) is scaled for the U-Net and `text` (T, L, D) has the prompts alone. A_k is the
    mean over heads and layers, summed over the concept's tokens; the loss is the same for sums.
    """
    count, tasks = x.shape[0], len(views)
    flat = torch.cat([view.view(x) for view in views])
    context = text.repeat_interleave(count, 0)
    maps = reader(lambda: unet(flat, t, encoder_hidden_states=context, return_dict=False))
    if not maps.layers:
        raise MapError(
            f"no cross-attention of down and up blocks has maps of {reader.resolution}: set "
            "`map_resolution`, or `anti_segregation=False`"
        )
    every = maps.aggregate(reader.resolution).unflatten(0, (tasks, count))
    size = (x.shape[2], x.shape[3])
    return torch.stack(
        [view.inverse_map(every[at, :, at], size) for at, view in enumerate(views)], dim=1
    )


def concept_reader(
    pipe: Any, prompts: Sequence[str], concepts: Sequence[Word], resolution: tuple[int, int]
) -> MapReader:
    """Return what reads maps (h, w) of the concepts from cross-attention of down and up blocks."""
    spans = concept_spans(pipe, prompts, concepts)
    # Halves of a batch of views can be equal, which must not be taken for guidance.
    plain = SimpleNamespace(unet=pipe.unet, do_classifier_free_guidance=False)
    return MapReader(plain, tokens=spans, layers=_is_outer, resolution=resolution)


def concept_spans(pipe: Any, prompts: Sequence[str], concepts: Sequence[Word]) -> list[list[int]]:
    """Return the token positions of each prompt's concept, as the pipeline writes the prompt.

    Raises `TokenError` for a concept that is not in its prompt, or too few of them.
    """
    if len(concepts) != len(prompts):
        raise TokenError(f"{len(prompts)} prompts need as many `concepts`, got {list(concepts)}")
    written = getattr(pipe, "_text_preprocessing", None)
    texts = list(prompts) if written is None else written(list(prompts))
    return [
        list(find_tokens(pipe, text, [concept]).positions[0])
        for text, concept in zip(texts, concepts, strict=True)
    ]


def last_word(prompt: str) -> str:
    """Return the last word of a prompt, without punctuation around it.

    >>> last_word("an oil painting of a Red Fox.")
    'Fox'
    """
    words = [word.strip(".,;:!?\"'()[]") for word in prompt.split()]
    return next((word for word in reversed(words) if word), "")


def _is_outer(layer: AttentionLayer) -> bool:
    return layer.kind == "cross" and layer.place != "mid_block"
