"""Multi-Concept T2I-Zero: text embeddings and attention corrected so that no concept is lost.

Method of arXiv 2310.07419: Correction by Similarities edits the embedding of a prompt once;
Cross-Token Non-Maximum Suppression gives each place of early attention maps to one concept.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from unweave.attention_tools.errors import AttentionError, MapError, TokenError
from unweave.attention_tools.guidance import follow_steps, replaced_method
from unweave.attention_tools.interception import AttentionCall, Handler, intercept_attention
from unweave.attention_tools.layers import select_layers
from unweave.attention_tools.tokens import Concepts, TokenSpans, find_concepts, find_tokens
from unweave.kernels import attention_maps, attention_with_maps

LEAST_LEFT = 1e-4
"""Attention that is left of a row below which rounding is as large."""


@dataclass(frozen=True)
class T2IZeroConfig:
    """Settings of `T2IZero`; `tau`, `gamma`, `alpha` and `end_step` are not in the paper's text."""

    similarities: bool = True
    """Whether Correction by Similarities is on."""

    tau: float = 0.2
    """How large a product must be to count, in [0, 1]; what it is compared to: `threshold`."""

    gamma: int = 2
    """How many tokens on each side of a concept's token may correct it."""

    alpha: float = 0.3
    """Share of the correction in the new embedding, in [0, 1]."""

    threshold: Literal["relative", "quantile"] = "relative"
    """"relative": `tau` times the largest product; "quantile": that of 1 - exp(-10 tau)."""

    exclude_special: bool = True
    """Whether start, end and padding tokens are left out of the correction."""

    renorm: bool = False
    """Whether a corrected embedding gets the norm it had."""

    per_encoder: bool = True
    """Whether the embeddings of two encoders side by side (SDXL) are corrected apart."""

    suppression: bool = True
    """Whether Cross-Token Non-Maximum Suppression is on."""

    mode: Literal["concepts", "strict"] = "concepts"
    """"concepts" suppresses the losing concepts; "strict" all tokens but the winning concept's."""

    strength: float = 1.0
    """How much of what is suppressed goes, in [0, 1]."""

    renormalize: bool = False
    """Whether the attention that is left sums to 1 again, where it is above `LEAST_LEFT`."""

    kernel: int = 3
    """Side of the Gaussian that smooths maps before concepts are compared, odd; 1 is none."""

    sigma: float = 1.0
    """Its standard deviation, in places of the map."""

    start_step: int = 0
    """First step of sampling with suppression."""

    end_step: int | None = None
    """The step before which it ends; None is half of the steps."""

    def __post_init__(self) -> None:
        for name in ("tau", "alpha", "strength"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise AttentionError(f"`{name}` must be in [0, 1], got {value}")
        for name, known in (
            ("threshold", ("relative", "quantile")),
            ("mode", ("concepts", "strict")),
        ):
            if getattr(self, name) not in known:
                raise AttentionError(
                    f"`{name}` must be one of {known}, got {getattr(self, name)!r}"
                )
        if self.gamma < 0 or self.start_step < 0 or (self.end_step or 0) < 0:
            raise AttentionError(
                f"`gamma`, `start_step` and `end_step` must be at least 0, got {self.gamma}, "
                f"{self.start_step} and {self.end_step}"
            )
        if self.kernel < 1 or self.kernel % 2 == 0 or self.sigma <= 0:
            raise AttentionError(
                f"`kernel` must be odd and `sigma` above 0, got {self.kernel} and {self.sigma}"
            )


class T2IZero:
    """Runs a pipeline so that every named concept of the prompt gets its place.

    >>> zero = T2IZero(pipe, T2IZeroConfig(alpha=0.2))  # doctest: +SKIP
    >>> zero("a cat face and a rocket", ["cat face", "rocket"]).images  # doctest: +SKIP
    """

    def __init__(self, pipe: Any, config: T2IZeroConfig | None = None) -> None:
        self.pipe, self.config = pipe, config or T2IZeroConfig()
        if self.config.suppression and self.config.mode == "strict":
            warnings.warn(
                'mode "strict" also takes the attention to the start token and to ordinary words '
                "away, which darkens or washes out images",
                stacklevel=2,
            )

    def __call__(
        self,
        prompt: str | Sequence[str],
        concepts: Concepts,
        **arguments: Any,
    ) -> Any:
        """Return the pipeline's output for `prompt`; `arguments` go to the pipeline.

        `concepts` are words of the prompt, phrases or token positions, or for several prompts one
        list of them each. Raises `TokenError` for words that are not in their prompt or share a
        token, and when there are not as many lists as prompts.
        """
        with self.applied(prompt, concepts):
            prompts = prompt if isinstance(prompt, str) else list(prompt)
            return self.pipe(prompt=prompts, **arguments)

    @contextmanager
    def applied(
        self,
        prompt: str | Sequence[str],
        concepts: Concepts,
    ) -> Iterator[tuple[TokenSpans, ...]]:
        """Correct calls of the pipeline with `prompt` in the block; yields the chosen tokens."""
        config, pipe = self.config, self.pipe
        spans = find_concepts(pipe, prompt, concepts)
        if config.suppression and config.mode == "concepts" and min(map(len, spans)) == 1:
            warnings.warn("one concept has no other to be told apart from", stacklevel=4)
        with ExitStack() as stack:
            if config.similarities:
                encode = _corrected(pipe, spans, config)
                stack.enter_context(replaced_method(pipe, "encode_prompt", encode))
            if config.suppression and config.strength:
                steps = stack.enter_context(follow_steps(pipe))
                handler = _suppressing(
                    spans, config, lambda: _in_range(steps.index, steps.count, config)
                )
                stack.enter_context(
                    intercept_attention(pipe, select_layers(pipe, "cross"), handler)
                )
            yield spans


def correction_by_similarities(
    embeds: Tensor,
    positions: Sequence[int],
    *,
    tau: float = 0.2,
    gamma: int = 2,
    alpha: float = 0.3,
    threshold: Literal["relative", "quantile"] = "relative",
    renorm: bool = False,
    allowed: Sequence[int] | None = None,
) -> Tensor:
    """Return `embeds` (B, n, d) with the rows at `positions` corrected: algorithm 1.

    Every row f_c becomes (1 - alpha) f_c + alpha sum_i S_i f_i. The weights S_i, of each channel
    alone, are the products f_c f_i over the largest of them, where that is above `tau` and i is at
    most `gamma` tokens from c; the products are of the rows as they came, so the order of
    `positions` does not matter. `allowed` are the tokens that may contribute and set the largest
    product, by default all. Products below 0 never count.

    >>> f = torch.tensor([[[1.0, 0.0], [1.0, 2.0]]])
    >>> correction_by_similarities(f, [0], alpha=0.5)
    tensor([[[1.5000, 0.0000],
             [1.0000, 2.0000]]])
    """
    n, at = embeds.shape[-2], torch.tensor(list(positions), dtype=torch.int64)
    places = torch.tensor(sorted(range(n) if allowed is None else allowed), dtype=torch.int64)
    if not len(at) or not bool(torch.isin(at, places).all()):
        raise TokenError(
            f"`positions` must be among the tokens {places.tolist()} that may contribute, got "
            f"{at.tolist()}"
        )
    f = embeds.to(torch.promote_types(embeds.dtype, torch.float32))
    own, others = f[:, at, None], f[:, None, places]
    products = own * others
    largest = products.amax((2, 3), keepdim=True)
    if threshold == "relative":
        least = tau * largest
    else:
        least = products.flatten(2).quantile(1 - math.exp(-10 * tau), 2)[..., None, None]
    near = ((places - at[:, None]).abs() <= gamma)[..., None].to(f.device)
    kept = near & (products > least.clamp(min=0))
    weights = torch.where(kept, products / largest, 0)
    rows = (1 - alpha) * f[:, at] + alpha * (weights * others).sum(2)
    if renorm:
        rows = rows * (f[:, at].norm(dim=-1, keepdim=True) / rows.norm(dim=-1, keepdim=True))
    corrected = embeds.clone()
    corrected[:, at] = rows.to(embeds.dtype)
    return corrected


def gaussian_smoothing(maps: Tensor, kernel: int = 3, sigma: float = 1.0) -> Tensor:
    """Return `maps` (..., h, w), each smoothed by a Gaussian; what is outside repeats the edge."""
    if kernel == 1:
        return maps
    half = kernel // 2
    offsets = torch.arange(-half, half + 1, dtype=maps.dtype, device=maps.device)
    taps = torch.exp(-(offsets**2) / (2 * sigma**2))
    taps = taps / taps.sum()
    padded = pad(maps.reshape(-1, 1, *maps.shape[-2:]), (half,) * 4, mode="replicate")
    return conv2d(padded, torch.outer(taps, taps)[None, None]).reshape(maps.shape)


def winning_concepts(
    maps: Tensor, grid: tuple[int, int], kernel: int = 3, sigma: float = 1.0
) -> Tensor:
    """Return which concept holds each place (..., h * w), from maps (..., h * w, concepts).

    >>> winning_concepts(torch.tensor([[0.1, 0.3], [0.1, 0.3]]), (1, 2))
    tensor([1, 1])
    """
    if maps.shape[-2] != grid[0] * grid[1]:
        raise MapError(f"maps of {maps.shape[-2]} places are no grid of {grid[0]} by {grid[1]}")
    smooth = gaussian_smoothing(maps.mT.unflatten(-1, grid), kernel, sigma)
    return smooth.flatten(-2).argmax(-2)


def cross_token_nms(
    call: AttentionCall, columns: Tensor, members: Tensor, config: T2IZeroConfig
) -> Tensor:
    """Return the output of attention without the losing concepts: algorithm 2.

    `columns` (B, T) are the concepts' text tokens in each conditional sample, and `members`
    (B, T, k) says with ones of which concept each is; a row of zeros is padding. Suppressing after
    the softmax takes p_c v_c of the losing tokens from the output, so attention stays fused.
    """
    assert call.text is not None
    part, image, columns = call.conditional, call.image, columns + call.text.start
    out, p = _with_probabilities(call, columns)
    p = p[:, :, image]
    groups = members[:, None].to(p.dtype)
    absent = (groups.amax(2, keepdim=True) == 0).to(p.dtype)
    winners = winning_concepts(p @ groups - absent, call.grid, config.kernel, config.sigma)
    taken = groups.amax(-1)[:, :, None]
    won = (winners[..., None] == members.argmax(-1)[:, None, None]) * taken
    v = call.v[part].take_along_dim(columns[:, None, :, None], 2)
    s, before = config.strength, out[part, :, image]
    if config.mode == "strict":
        kept = p * won
        after = (1 - s) * before + s * (kept @ v)
        left = 1 - s + s * kept.sum(-1, keepdim=True)
    else:
        lost = s * p * (taken - won)
        after = before - lost @ v
        left = 1 - lost.sum(-1, keepdim=True)
    if config.renormalize:
        after = after / left.clamp(min=LEAST_LEFT)
    out = out.clone()
    out[part, :, image] = after
    return out


def _with_probabilities(call: AttentionCall, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output of attention, and (B, H, Q, T) of the conditional samples."""
    part = call.conditional
    mask = None if call.mask is None else call.mask.expand(call.q.shape[0], -1, -1, -1)[part]
    wanted: dict[str, Any] = {
        "columns": columns,
        "reduce_heads": "none",
        "mask": mask,
        "scale": call.scale,
    }
    if call.alone and not call.denoiser.guided:
        return attention_with_maps(call.q, call.k, call.v, **wanted)
    return call.proceed(), attention_maps(call.q[part], call.k[part], **wanted)


def _suppressing(
    spans: Sequence[TokenSpans], config: T2IZeroConfig, active: Callable[[], bool]
) -> Handler:
    """Return a handler that suppresses while `active()`."""
    columns, members = _table(spans)

    def suppress(call: AttentionCall) -> Tensor:
        if not active():
            return call.proceed()
        rows = len(range(*call.conditional.indices(call.q.shape[0])))
        if rows % len(spans):
            raise AttentionError(
                f"{len(spans)} prompts with concepts do not fit {rows} samples: give the pipeline "
                "the same prompts"
            )
        times, device = rows // len(spans), call.q.device
        own, of = (x.to(device).repeat_interleave(times, 0) for x in (columns, members))
        return cross_token_nms(call, own, of, config)

    return suppress


def _table(spans: Sequence[TokenSpans]) -> tuple[Tensor, Tensor]:
    """Return columns (prompts, T) and their concepts (prompts, T, k), padded with zeros."""
    width = max(sum(map(len, own.positions)) for own in spans)
    columns = torch.zeros(len(spans), width, dtype=torch.int64)
    members = torch.zeros(len(spans), width, max(map(len, spans)))
    for row, own in enumerate(spans):
        pairs = [(at, concept) for concept, span in enumerate(own.positions) for at in span]
        for place, (at, concept) in enumerate(pairs):
            columns[row, place] = at
            members[row, place, concept] = 1
    return columns, members


def _in_range(index: int, count: int, config: T2IZeroConfig) -> bool:
    end = count // 2 if config.end_step is None else config.end_step
    return config.start_step <= index < end


def _corrected(pipe: Any, spans: Sequence[TokenSpans], config: T2IZeroConfig) -> Callable[..., Any]:
    """Return `pipe.encode_prompt` with the embeddings of the prompts corrected."""
    original = pipe.encode_prompt
    content = [find_tokens(pipe, own.prompt, [own.prompt]).positions[0] for own in spans]

    def encode(*args: Any, **kwargs: Any) -> Any:
        embeds, *rest = original(*args, **kwargs)
        if embeds.shape[0] % len(spans):
            raise AttentionError(
                f"{len(spans)} prompts with concepts do not fit {embeds.shape[0]} embeddings: give "
                "the pipeline the same prompts"
            )
        widths = _widths(pipe, embeds.shape[-1]) if config.per_encoder else [embeds.shape[-1]]
        each = embeds.shape[0] // len(spans)
        new = [
            torch.cat([_correct(one, own, real, config) for one in rows.split(widths, -1)], -1)
            for rows, own, real in zip(embeds.split(each), spans, content, strict=True)
        ]
        return (torch.cat(new), *rest)

    return encode


def _correct(
    embeds: Tensor, spans: TokenSpans, content: Sequence[int], config: T2IZeroConfig
) -> Tensor:
    return correction_by_similarities(
        embeds,
        [at for span in spans.positions for at in span],
        tau=config.tau,
        gamma=config.gamma,
        alpha=config.alpha,
        threshold=config.threshold,
        renorm=config.renorm,
        allowed=content if config.exclude_special else None,
    )


def _widths(pipe: Any, features: int) -> list[int]:
    """Return the features of each of two encoders whose embeddings stand side by side."""
    encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
    widths = [encoder.config.hidden_size for encoder in encoders if encoder is not None]
    return widths if sum(widths) == features else [features]
