"""Attention edited: words dropped, reweighted or kept to a region, and prompt-to-prompt.

Prompt-to-prompt is arXiv 2208.01626 (Hertz et al.). Where it multiplies a map that was made
elsewhere by the values, here queries and keys of elsewhere go into fused attention.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from unweave.attention_tools.errors import AttentionError, MapError, UnsupportedLayerError
from unweave.attention_tools.guidance import replaced_method
from unweave.attention_tools.interception import AttentionCall, intercept_attention
from unweave.attention_tools.layers import Layers, select_layers
from unweave.attention_tools.tokens import Word, find_tokens
from unweave.kernels import masked_attention

Edit = Literal["replace", "refine"]


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
    factors = _factors(pipe, prompt, reweight or {})
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
            changes["v"] = _reweighted(call, factors)
        return call.proceed(**changes)

    with intercept_attention(pipe, chosen, edit):
        yield


@dataclass(frozen=True)
class PromptToPromptConfig:
    """Settings of `PromptToPrompt`."""

    cross_steps: float = 0.8
    """The share of steps, from the first, that look at words as the source does."""

    self_steps: float = 0.4
    """The share of steps, from the first, in which image looks at image as in the source."""

    self_places: int = 32 * 32
    """Self-attention of more image positions than this stays the target's own."""

    def __post_init__(self) -> None:
        for name in ("cross_steps", "self_steps"):
            if not 0 <= getattr(self, name) <= 1:
                raise AttentionError(f"`{name}` must be in [0, 1], got {getattr(self, name)}")


class PromptToPrompt:
    """Draws a source prompt and a target prompt that keeps the source's composition.

    >>> draw = PromptToPrompt(pipe)  # doctest: +SKIP
    >>> noise = torch.Generator().manual_seed(0)
    >>> draw("a cat on grass", "a dog on grass", generator=noise).images  # doctest: +SKIP
    """

    def __init__(self, pipe: Any, config: PromptToPromptConfig | None = None) -> None:
        self.pipe, self.config = pipe, config or PromptToPromptConfig()

    def __call__(
        self,
        source: str,
        target: str,
        *,
        edit: Edit | None = None,
        reweight: Mapping[str, float] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        **arguments: Any,
    ) -> Any:
        """Return the pipeline's output for both: images of the source, then of the target.

        Args:
            source: the prompt whose attention is used.
            target: the prompt that uses it.
            edit: "replace" swaps words for as many words, "refine" gives maps of their own to
                words that are new; by default whichever fits.
            reweight: factors for words of the target.
            generator: one for each pair of images, which begin from the same noise.
            arguments: for the pipeline.

        Raises `TokenError` for words that are not in the target and `AttentionError` for prompts
        that `edit` does not fit.
        """
        single = generator is None or isinstance(generator, torch.Generator)
        given = cast(list[torch.Generator | None], [generator] if single else generator)
        generators = [own or _fresh() for own in given]
        prompts = [source] * len(generators) + [target] * len(generators)
        with self.applied(source, target, edit=edit, reweight=reweight):
            return self.pipe(prompts, generator=generators + _copies(generators), **arguments)

    @contextmanager
    def applied(
        self,
        source: str,
        target: str,
        *,
        edit: Edit | None = None,
        reweight: Mapping[str, float] | None = None,
    ) -> Iterator[None]:
        """Let the second half of a pipeline's prompts, the target's, attend as the first half."""
        pipe, config = self.pipe, self.config
        mapping = token_mapping(pipe, source, target, edit)
        factors = _factors(pipe, target, reweight or {})
        cross, within = select_layers(pipe, "cross"), select_layers(pipe, "self")
        mixed = [layer.name for layer in cross if layer.order != "beside"]
        if mixed:
            raise UnsupportedLayerError(
                f"prompt-to-prompt needs layers in which text is the only key; {mixed[0]} and "
                f"{len(mixed) - 1} others also have image keys"
            )

        def inject(call: AttentionCall) -> Tensor:
            crossed = call.layer.kind == "cross"
            v = _reweighted(call, factors, targets=True) if crossed and factors else call.v
            share = config.cross_steps if crossed else config.self_steps
            large = not crossed and call.q.shape[2] > config.self_places
            if large or steps.index >= share * steps.count:
                return call.proceed(v=v)
            return _as_source(call, v, mapping if crossed else None)

        with follow_steps(pipe) as steps, intercept_attention(pipe, [*cross, *within], inject):
            yield


@dataclass(frozen=True)
class TokenMapping:
    """How tokens of a target prompt take the maps of a source prompt."""

    weights: Tensor = field(repr=False)
    """(source tokens, target tokens): a target map is the sum of source maps by these."""

    own: Tensor = field(repr=False)
    """(target tokens): true where a token keeps its own map."""


def token_mapping(
    pipe: Any, source: str, target: str, edit: Edit | None = None, window: int | None = None
) -> TokenMapping:
    """Return which source maps each target token takes (section 3.2).

    "replace": words stand for one another in their order, and a word's maps are summed and shared
    evenly among the tokens of its partner. "refine": tokens that both prompts have in the same
    order are partners, and others keep their own maps. None is "replace" for as many words, else
    "refine". `window` is how many tokens the text encoder gives, by default the tokenizer's.

    Raises `AttentionError` when "replace" gets prompts of different length.
    """
    words = source.split(), target.split()
    if edit is None:
        edit = "replace" if len(words[0]) == len(words[1]) else "refine"
    if edit not in ("replace", "refine"):
        raise AttentionError(f'`edit` must be "replace" or "refine", got {edit!r}')
    if edit == "replace" and len(words[0]) != len(words[1]):
        raise AttentionError(
            f'"replace" needs prompts of as many words, got {len(words[0])} in {source!r} and '
            f'{len(words[1])} in {target!r}; use "refine"'
        )
    whole = find_tokens(pipe, source, [source]), find_tokens(pipe, target, [target])
    first, second = (list(spans.positions[0]) for spans in whole)
    window = pipe.tokenizer.model_max_length if window is None else window
    weights = torch.zeros(window, window)
    own = torch.zeros(window, dtype=torch.bool)
    start, ends = first[0], (first[-1] + 1, second[-1] + 1)
    weights[:start, :start] = torch.eye(start)
    for at in range(ends[0], window):
        weights[at, min(at - ends[0] + ends[1], window - 1)] = 1
    if edit == "replace":
        for old, new in _partners(pipe, source, target, words):
            share = torch.eye(len(old)) if len(old) == len(new) else 1 / len(new)
            weights[old[0] : old[-1] + 1, new[0] : new[-1] + 1] = share
        return TokenMapping(weights, own)
    tokens = [spans.tokens[at] for spans in whole for at in spans.positions[0]]
    own[second] = True
    blocks = difflib.SequenceMatcher(
        a=tokens[: len(first)], b=tokens[len(first) :], autojunk=False
    ).get_matching_blocks()
    for block in blocks:
        for offset in range(block.size):
            old_at, new_at = first[block.a + offset], second[block.b + offset]
            weights[old_at, new_at], own[new_at] = 1, False
    return TokenMapping(weights, own)


@dataclass
class SamplingSteps:
    """How far a run is."""

    scheduler: Any = field(repr=False)
    index: int = 0
    """Steps of the scheduler since its timesteps were set."""

    @property
    def count(self) -> int:
        """How many it was set to."""
        return len(self.scheduler.timesteps)


@contextmanager
def follow_steps(pipe: Any) -> Iterator[SamplingSteps]:
    """Count the steps of a pipeline's scheduler, whatever passes of the denoiser each takes."""
    scheduler = pipe.scheduler
    steps, step, begin = SamplingSteps(scheduler), scheduler.step, scheduler.set_timesteps

    def counted(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        steps.index += 1
        return result

    def begun(*args: Any, **kwargs: Any) -> Any:
        steps.index = 0
        return begin(*args, **kwargs)

    with (
        replaced_method(scheduler, "step", counted),
        replaced_method(scheduler, "set_timesteps", begun),
    ):
        yield steps


def _as_source(call: AttentionCall, v: Tensor, mapping: TokenMapping | None) -> Tensor:
    """Return attention in which target samples look as their source samples do.

    The injected map is M W, from the source's map M and the mapping's weights W: (M W) v = M (W v).
    """
    first, targets = _halves(call)
    q, k, mask, mapped = call.q.clone(), call.k.clone(), call.mask, v
    q[targets], k[targets] = q[first], k[first]
    if mask is not None:
        mask = mask.expand(q.shape[0], -1, -1, -1).clone()
        mask[targets] = mask[first]
    if mapping is not None:
        if mapping.own.numel() != v.shape[2]:
            raise AttentionError(
                f"the text encoder gives {v.shape[2]} tokens, the tokenizer {mapping.own.numel()}"
            )
        mapped = v.clone()
        mapped[targets] = mapping.weights.to(v) @ v[targets]
    out = call.proceed(q=q, k=k, v=mapped, mask=mask)
    if mapping is not None and mapping.own.any():
        kept = v[targets] * mapping.own.to(v)[:, None]
        old = None if call.mask is None else call.mask.expand(q.shape[0], -1, -1, -1)[targets]
        added = masked_attention(call.q[targets], call.k[targets], kept, mask=old, scale=call.scale)
        out = out.clone()
        out[targets] = out[targets] + added
    return out


def _halves(call: AttentionCall) -> tuple[slice, slice]:
    """Return which samples have the source prompt, and which the target."""
    start, stop, _ = call.conditional.indices(call.q.shape[0])
    if (stop - start) % 2:
        raise AttentionError(
            f"prompt-to-prompt needs as many samples of the target as of the source, got "
            f"{stop - start} together"
        )
    middle = (start + stop) // 2
    return slice(start, middle), slice(middle, stop)


def _partners(
    pipe: Any, source: str, target: str, words: tuple[list[str], list[str]]
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Return the tokens of each word of two prompts that have as many words."""
    spans = []
    for prompt, own in zip((source, target), words, strict=True):
        ends = [
            len(find_tokens(pipe, " ".join(own[: at + 1]), [" ".join(own[: at + 1])]).positions[0])
            for at in range(len(own))
        ]
        places = find_tokens(pipe, prompt, [prompt]).positions[0]
        spans.append(
            [places[first:last] for first, last in zip([0, *ends[:-1]], ends, strict=True)]
        )
    return list(zip(*spans, strict=True))


def _fresh() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


def _copies(generators: Sequence[torch.Generator]) -> list[torch.Generator]:
    copies = [torch.Generator(one.device) for one in generators]
    for copy, one in zip(copies, generators, strict=True):
        copy.set_state(one.get_state())
    return copies


def _factors(pipe: Any, prompt: str, reweight: Mapping[str, float]) -> dict[int, float]:
    """Return the factor of each token."""
    wrong = {word: factor for word, factor in reweight.items() if not math.isfinite(factor)}
    if wrong:
        raise AttentionError(f"`reweight` must have finite factors, got {wrong}")
    if not reweight:
        return {}
    spans = find_tokens(pipe, prompt, list(reweight)).require_distinct()
    pairs = zip(spans.positions, reweight.values(), strict=True)
    return {at: float(factor) for span, factor in pairs for at in span}


def _reweighted(call: AttentionCall, factors: Mapping[int, float], targets: bool = False) -> Tensor:
    """Return values with tokens multiplied, which is the same as multiplying their maps."""
    assert call.text is not None
    scales = torch.ones(call.v.shape[2], dtype=call.v.dtype)
    for at, factor in factors.items():
        scales[call.text.start + at] = factor
    v = call.v.clone()
    part = _halves(call)[1] if targets else call.conditional
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
