"""Attention edited in runs of one prompt: words dropped, reweighted or kept to a region.

Reweighting is that of prompt-to-prompt (Hertz et al., arXiv 2208.01626, section 3.2). Everything
is done to masks and values, so that attention stays fused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from unweave.attention_tools.errors import AttentionError, MapError
from unweave.attention_tools.interception import AttentionCall, intercept_attention
from unweave.attention_tools.layers import Layers, select_layers
from unweave.attention_tools.tokens import Word, find_tokens


@contextmanager
def edit_attention(
    pipe: Any,
    prompt: str,
    *,
    drop: Sequence[Word] = (),
    reweight: Mapping[str, float] | None = None,
    region_masks: Mapping[str, Tensor] | None = None,
    layers: Layers = "cross",
) -> Iterator[None]:
    """Edit where the image looks in runs of one prompt in the block.

    Args:
        pipe: a diffusers pipeline.
        prompt: the prompt that it is run with, alone or several times.
        drop: words whose tokens leave the softmax. What the text encoder has spread of a word to
            later tokens stays.
        reweight: factors of words: their attention after the softmax is multiplied, the rest stays
            as it was (section 3.2, attention re-weighting).
        region_masks: (H, W) of any size for words. Where a boolean mask is false, nothing looks at
            the word; a floating mask is added to the word's scores. Fitted to each layer's grid.
        layers: which layers, as in `capture_attention`.

    Under guidance only the conditional half changes. In joint attention text that looks at text is
    dropped and reweighted too, and kept to no region. Raises `TokenError` for words that are not
    in the prompt, `AttentionError` for factors that are not finite and `MapError` for masks that
    are empty or have other dimensions.
    """
    factors = token_factors(pipe, prompt, reweight or {})
    dropped = (
        [at for span in find_tokens(pipe, prompt, drop).positions for at in span] if drop else []
    )
    regions = [
        (find_tokens(pipe, prompt, [word]).positions[0], _checked_mask(word, mask))
        for word, mask in (region_masks or {}).items()
    ]
    chosen = select_layers(pipe, layers)

    def edit(call: AttentionCall) -> Tensor:
        if call.text is None:
            return call.proceed()
        changes: dict[str, Tensor] = {}
        if dropped or regions:
            changes["mask"] = _edited_mask(call, dropped, regions)
        if factors:
            changes["v"] = reweighted(call, factors, call.conditional)
        return call.proceed(**changes)

    with intercept_attention(pipe, chosen, edit):
        yield


def token_factors(pipe: Any, prompt: str, reweight: Mapping[str, float]) -> dict[int, float]:
    """Return the factor of each token of the words in `reweight`.

    Raises `TokenError` for words that are not in the prompt or share a token, and `AttentionError`
    for factors that are not finite.
    """
    wrong = {word: factor for word, factor in reweight.items() if not math.isfinite(factor)}
    if wrong:
        raise AttentionError(f"`reweight` must have finite factors, got {wrong}")
    if not reweight:
        return {}
    spans = find_tokens(pipe, prompt, list(reweight)).require_distinct()
    pairs = zip(spans.positions, reweight.values(), strict=True)
    return {at: float(factor) for span, factor in pairs for at in span}


def reweighted(call: AttentionCall, factors: Mapping[int, float], part: slice) -> Tensor:
    """Return the values with tokens of the samples in `part` multiplied by their factors.

    Multiplying values is the same as multiplying the maps of the tokens after the softmax.
    """
    assert call.text is not None
    scales = torch.ones(call.v.shape[2], dtype=call.v.dtype)
    for at, factor in factors.items():
        scales[call.text.start + at] = factor
    v = call.v.clone()
    v[part] *= scales.to(v.device)[:, None]
    return v


def _edited_mask(
    call: AttentionCall, dropped: Sequence[int], regions: Sequence[tuple[Sequence[int], Tensor]]
) -> Tensor:
    """Return the mask of a call, added to scores, with dropped words and regions in it."""
    assert call.text is not None
    batch, keys, first = call.q.shape[0], call.k.shape[2], call.text.start
    queries = call.q.shape[2] if regions else 1
    bias = torch.zeros(batch, 1, queries, keys, dtype=call.q.dtype, device=call.q.device)
    part = call.conditional
    bias[part, ..., [first + at for at in dropped]] = -math.inf
    for positions, mask in regions:
        fitted = _fitted(mask, call.grid).to(bias).flatten()[:, None]
        bias[part, :, call.image, [first + at for at in positions]] += fitted
    if call.mask is None:
        return bias
    if call.mask.dtype == torch.bool:
        return torch.where(call.mask, bias, -math.inf)
    return bias + call.mask


def _fitted(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return what a mask adds to scores at each place of a grid."""
    if mask.dtype != torch.bool:
        return interpolate(mask[None, None], grid, mode="bilinear", align_corners=False)[0, 0]
    covered = adaptive_avg_pool2d(mask[None].float(), grid)[0]
    inside = covered >= covered.max().clamp(max=0.5)
    return torch.zeros(grid).masked_fill(~inside.cpu(), -math.inf)


def _checked_mask(word: str, mask: Tensor) -> Tensor:
    mask = torch.as_tensor(mask)
    fits = mask.dim() == 2 and (mask.dtype == torch.bool or mask.is_floating_point())
    if not fits or not mask.numel():
        raise MapError(
            f"the mask of {word!r} must be boolean or floating (H, W), got {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    if mask.dtype == torch.bool and not mask.any():
        raise MapError(f"the mask of {word!r} is empty; use `drop` for a word that is nowhere")
    return mask
