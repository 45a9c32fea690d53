"""Prompt-to-prompt: one image's attention for another prompt, and edits kept to a region.

Hertz et al., arXiv 2208.01626. Where the paper multiplies a map that was made elsewhere by the
values, here queries and keys of elsewhere go into fused attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from unweave.attention_tools.editing import reweighted, token_factors
from unweave.attention_tools.errors import AttentionError, MapError, UnsupportedLayerError
from unweave.attention_tools.guidance import SamplingSteps, follow_steps
from unweave.attention_tools.interception import AttentionCall, intercept_attention
from unweave.attention_tools.layers import select_layers
from unweave.attention_tools.maps import AttentionMaps
from unweave.attention_tools.masks import to_mask
from unweave.attention_tools.token_mapping import Edit, TokenMapping, token_mapping
from unweave.attention_tools.tokens import Word, find_tokens
from unweave.kernels import attention_maps, masked_attention


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


@dataclass(frozen=True)
class LocalBlend:
    """Keeps an edit to where some words look (section 3.2, local editing).

    Outside the union of both words' masks, the target's latents are the source's after each step.
    """

    source: Sequence[Word]
    """Words of the source prompt, whose place may change; empty when the edit only adds."""

    target: Sequence[Word]
    """Words of the target prompt; empty when the edit only takes away."""

    threshold: float = 0.3
    """The share of its maximum from which a map, averaged over the steps so far, is in the mask.
    The paper has 0.3, and its code divides maps by their maximum."""

    start: float = 0.0
    """The share of steps before the first that blends."""

    widen: int = 1
    """By how many places a mask grows on each side, as in the paper's code."""

    resolution: int | tuple[int, int] | None = None
    """Positions of the maps; None is a quarter of the latents a side: 16 for 512 pixels."""

    def __post_init__(self) -> None:
        for name in ("source", "target"):
            if isinstance(getattr(self, name), str):
                raise AttentionError(
                    f"`{name}` must be a list of words, got the text {getattr(self, name)!r}"
                )
        if not (self.source or self.target):
            raise AttentionError("`source` or `target` must name a word, got none")
        if not 0 < self.threshold <= 1:
            raise AttentionError(f"`threshold` must be in (0, 1], got {self.threshold}")
        if not 0 <= self.start < 1:
            raise AttentionError(f"`start` must be in [0, 1), got {self.start}")
        if self.widen < 0:
            raise AttentionError(f"`widen` must not be negative, got {self.widen}")


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
        blend: LocalBlend | None = None,
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
            blend: the words to whose places the edit is kept; None lets all of the image change.
            generator: one for each pair of images, which begin from the same noise.
            arguments: for the pipeline.

        Raises `TokenError` for words that are not in their prompt, `AttentionError` for prompts
        that `edit` does not fit, and `MapError` when no layer has the resolution of `blend`.
        """
        single = generator is None or isinstance(generator, torch.Generator)
        given = cast(list[torch.Generator | None], [generator] if single else generator)
        generators = [own or _fresh() for own in given]
        prompts = [source] * len(generators) + [target] * len(generators)
        with self.applied(source, target, edit=edit, reweight=reweight, blend=blend):
            return self.pipe(prompts, generator=generators + _copies(generators), **arguments)

    @contextmanager
    def applied(
        self,
        source: str,
        target: str,
        *,
        edit: Edit | None = None,
        reweight: Mapping[str, float] | None = None,
        blend: LocalBlend | None = None,
    ) -> Iterator[None]:
        """Let the second half of a pipeline's prompts, the target's, attend as the first half."""
        pipe, config = self.pipe, self.config
        mapping = token_mapping(pipe, source, target, edit)
        factors = token_factors(pipe, target, reweight or {})
        blending = None if blend is None else _Blending(pipe, source, target, blend)
        cross, within = select_layers(pipe, "cross"), select_layers(pipe, "self")
        mixed = [layer.name for layer in cross if layer.order != "beside"]
        if mixed:
            raise UnsupportedLayerError(
                f"prompt-to-prompt needs layers in which text is the only key; {mixed[0]} and "
                f"{len(mixed) - 1} others also have image keys"
            )

        def inject(call: AttentionCall) -> Tensor:
            crossed = call.layer.kind == "cross"
            if crossed and blending is not None:
                blending.see(call, steps)
            v = reweighted(call, factors, _halves(call)[1]) if crossed and factors else call.v
            share = config.cross_steps if crossed else config.self_steps
            large = not crossed and call.q.shape[2] > config.self_places
            if large or steps.index >= share * steps.count:
                return call.proceed(v=v)
            return _as_source(call, v, mapping if crossed else None)

        def blended(latents: Tensor) -> Tensor:
            return latents if blending is None else blending(latents, steps)

        with (
            follow_steps(pipe, blended) as steps,
            intercept_attention(pipe, [*cross, *within], inject),
        ):
            yield


def blend_mask(
    source: Tensor | None,
    target: Tensor | None,
    size: tuple[int, int],
    *,
    threshold: float = 0.3,
    widen: int = 1,
) -> Tensor:
    """Return where an edit may change latents of `size`, boolean (n, 1, height, width).

    The maps (n, 1, h, w) of the source's and of the target's words grow by `widen` places, are
    enlarged to `size` and cut at `threshold` of their maxima; the mask is the union of both.

    >>> blend_mask(torch.tensor([[[[0.0, 0.1, 0.4]]]]), None, (1, 3), widen=0)
    tensor([[[[False, False,  True]]]])
    """
    masks = []
    for maps in (source, target):
        if maps is not None:
            wide = max_pool2d(maps, 2 * widen + 1, stride=1, padding=widen)
            large = interpolate(wide, size, mode="bilinear", align_corners=False)
            masks.append(to_mask(large, "relative", threshold))
    return torch.stack(masks).any(0)


class _Blending:
    """Maps of the words in both halves of a run, averaged over steps, and what they keep."""

    def __init__(self, pipe: Any, source: str, target: str, blend: LocalBlend) -> None:
        self.blend = blend
        self.groups = [
            [at for span in find_tokens(pipe, prompt, words).positions for at in span]
            for prompt, words in ((source, blend.source), (target, blend.target))
            if words
        ]
        self.maps, self.step = AttentionMaps(), 0

    def see(self, call: AttentionCall, steps: SamplingSteps) -> None:
        """Add the maps of a call of cross-attention, as they are before injection."""
        height, width = call.denoiser.size
        grid = self.blend.resolution or (-(-height // 4), -(-width // 4))
        if call.grid != ((grid, grid) if isinstance(grid, int) else grid):
            return
        if steps.index < self.step:
            self.maps, self.step = AttentionMaps(), 0
        part = call.conditional
        mask = None if call.mask is None else call.mask.expand(call.q.shape[0], -1, -1, -1)[part]
        own = attention_maps(
            call.q[part], call.k[part], mask=mask, scale=call.scale, groups=self.groups
        )
        self.maps.add(call.layer.name, call.denoiser.step, own.detach(), call.grid)

    def __call__(self, latents: Tensor, steps: SamplingSteps) -> Tensor:
        """Return latents (2 n, C, h, w) whose second half is the first outside the masks."""
        self.step = steps.index
        if self.step <= self.blend.start * steps.count:
            return latents
        if not self.maps.values:
            raise MapError(
                f"no cross-attention layer has the `resolution` {self.blend.resolution} of the "
                "blend (None is a quarter of the latents a side): give one that a layer has"
            )
        half = latents.shape[0] // 2
        source, target = latents[:half], latents[half:]
        seen = iter(self.maps.aggregate().split(1, 1))
        mask = blend_mask(
            next(seen)[:half] if self.blend.source else None,
            next(seen)[half:] if self.blend.target else None,
            (latents.shape[2], latents.shape[3]),
            threshold=self.blend.threshold,
            widen=self.blend.widen,
        )
        return torch.cat([source, torch.where(mask, target, source)])


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


def _fresh() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


def _copies(generators: Sequence[torch.Generator]) -> list[torch.Generator]:
    copies = [torch.Generator(one.device) for one in generators]
    for copy, one in zip(copies, generators, strict=True):
        copy.set_state(one.get_state())
    return copies
