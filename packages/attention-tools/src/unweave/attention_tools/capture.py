"""Attention maps recorded while a pipeline runs, of the wanted layers and tokens alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from unweave.attention_tools.errors import AttentionError, BudgetError
from unweave.attention_tools.interception import AttentionCall, intercept_attention
from unweave.attention_tools.layers import Layers, select_layers
from unweave.attention_tools.maps import AttentionMaps
from unweave.attention_tools.tokens import TokenSpans
from unweave.kernels import attention_maps, attention_with_maps

Tokens = TokenSpans | Sequence[int] | Sequence[Sequence[int]] | Tensor
MAX_BYTES = 2 << 30


@contextmanager
def capture_attention(
    pipe: Any,
    *,
    tokens: Tokens | None = None,
    layers: Layers = "cross",
    resolution: int | tuple[int, int] | None = None,
    differentiable: bool = False,
    steps: Collection[int] | None = None,
    each_step: bool = False,
    max_bytes: int = MAX_BYTES,
) -> Iterator[AttentionMaps]:
    """Record attention maps of every forward pass of the denoiser in the block.

    Passes that an update of `guide_latents` makes for itself are not among them.

    Args:
        pipe: a diffusers pipeline, or its U-Net or transformer.
        tokens: the key columns to record: positions; one list of positions a group, summed; a
            `TokenSpans`, whose words are the groups; an int64 tensor (B, C) with columns for each
            sample; None is every text token, or every image position with `layers="self"`.
        layers: "cross", "self", or a function of an `AttentionLayer`.
        resolution: only layers of this many positions a side, or (height, width).
        differentiable: keep the graph, so that losses on maps reach the latents; else detached.
        steps: only these forward passes, counted from 0; None is all.
        each_step: keep the maps of each step apart; else a running mean over steps.
        max_bytes: the most that maps may take together.

    Yields the `AttentionMaps`, filled as the passes run: probabilities of the softmax, averaged
    over heads. Under guidance only the conditional half is recorded. Layers that are not chosen
    keep their fused attention, and so do the chosen ones: maps come from its log-sum-exp.

    Raises `AttentionError` for layers, tokens or steps that cannot be, `UnsupportedLayerError`
    for processors that are not known, and `BudgetError` when `max_bytes` is passed. On exit every
    layer has the processor object that it had before.
    """
    wanted = (resolution, resolution) if isinstance(resolution, int) else resolution
    chosen, (columns, groups, names) = select_layers(pipe, layers), _columns(tokens)
    maps = AttentionMaps(names=names, each_step=each_step)

    def record(call: AttentionCall) -> Tensor:
        skipped = steps is not None and call.denoiser.step not in steps
        if skipped or call.denoiser.inner or (wanted is not None and call.grid != wanted):
            return call.proceed()
        out, own = _with_maps(call, columns, groups)
        maps.add(
            call.layer.name, call.denoiser.step, own if differentiable else own.detach(), call.grid
        )
        if maps.nbytes > max_bytes:
            raise BudgetError(
                f"maps take more than `max_bytes` = {max_bytes} at {call.layer.name}, step "
                f"{call.denoiser.step}: record fewer tokens, layers or steps, or leave `each_step`"
            )
        return out

    with intercept_attention(pipe, chosen, record):
        yield maps


class MapReader:
    """Reads differentiable maps off single forward passes, ended after the last wanted layer.

    What comes behind that layer is not computed: its output is not needed. Which layer is the last
    is learnt in the first pass at each latent size.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        tokens: Tokens | None = None,
        layers: Layers = "cross",
        resolution: int | tuple[int, int] | None = None,
    ) -> None:
        self.pipe, self.tokens = pipe, tokens
        self.layers = select_layers(pipe, layers)
        self.resolution = (resolution, resolution) if isinstance(resolution, int) else resolution
        self._last: dict[tuple[int, int], str] = {}

    def __call__(self, forward: Callable[[], Any]) -> AttentionMaps:
        """Return the maps of the one pass of the denoiser that `forward()` makes."""
        columns, groups, names = _columns(self.tokens)
        maps = AttentionMaps(names=names)

        def record(call: AttentionCall) -> Tensor:
            if self.resolution is not None and call.grid != self.resolution:
                return call.proceed()
            out, own = _with_maps(call, columns, groups)
            maps.add(call.layer.name, call.denoiser.step, own, call.grid)
            if call.layer.name == self._last.get(call.denoiser.size):
                raise _EnoughError
            return out

        with intercept_attention(self.pipe, self.layers, record) as passed:
            try:
                forward()
            except _EnoughError:
                return maps
        if maps.layers:
            self._last[passed.size] = maps.layers[-1]
        return maps


class _EnoughError(Exception):
    """Ends a forward pass after the last layer that was wanted."""


def _columns(
    tokens: Tokens | None,
) -> tuple[list[int] | Tensor | None, list[list[int]] | None, tuple[str, ...] | None]:
    """Return columns or groups of columns, and what they are called."""
    if tokens is None:
        return None, None, None
    if isinstance(tokens, TokenSpans):
        return None, [list(own) for own in tokens.positions], tokens.words
    if isinstance(tokens, Tensor):
        return tokens, None, tuple(str(place) for place in range(tokens.shape[-1]))
    if not len(tokens):
        raise AttentionError("`tokens` must name at least one position, got none")
    if all(isinstance(one, Integral) for one in tokens):
        positions = [int(one) for one in tokens]  # type: ignore[arg-type]
        return positions, None, tuple(map(str, positions))
    groups = [[int(at) for at in one] for one in tokens]  # type: ignore[union-attr]
    if not all(groups):
        raise AttentionError(f"each group of `tokens` must name a position, got {groups}")
    return None, groups, tuple(" ".join(map(str, own)) for own in groups)


def _with_maps(
    call: AttentionCall, columns: list[int] | Tensor | None, groups: list[list[int]] | None
) -> tuple[Tensor, Tensor]:
    """Return the output of attention, and the maps (B, image, tokens) of conditional samples."""
    keys = call.text if call.text is not None else call.image_keys
    wanted = _among(keys, columns, groups, call.layer.name)
    part = call.conditional
    q, k, v = call.q[part], call.k[part], call.v[part]
    mask = None if call.mask is None else call.mask.expand(call.q.shape[0], -1, -1, -1)[part]
    if not call.alone:
        maps = attention_maps(q, k, mask=mask, scale=call.scale, **wanted)
        return call.proceed(), maps[:, call.image]
    out, maps = attention_with_maps(q, k, v, mask=mask, scale=call.scale, **wanted)
    if call.denoiser.guided:
        rest = slice(0, part.start)
        other = None if call.mask is None else call.mask.expand(call.q.shape[0], -1, -1, -1)[rest]
        first = call.proceed(q=call.q[rest], k=call.k[rest], v=call.v[rest], mask=other)
        out = torch.cat([first, out])
    return out, maps[:, call.image]


def _among(
    keys: slice, columns: list[int] | Tensor | None, groups: list[list[int]] | None, layer: str
) -> dict[str, Any]:
    """Return `columns` or `groups` counted among all keys, of which the wanted begin at `keys`."""
    count = keys.stop - keys.start
    if groups is not None:
        most, least = max(map(max, groups)), min(map(min, groups))
    elif columns is not None:
        most, least = int(torch.as_tensor(columns).max()), int(torch.as_tensor(columns).min())
    else:
        most, least = count - 1, 0
    if least < 0 or most >= count:
        raise AttentionError(
            f"token positions must be from 0 to {count - 1} at {layer}, got {least} to {most}"
        )
    if groups is not None:
        return {"groups": [[keys.start + at for at in own] for own in groups]}
    if columns is None:
        return {"columns": list(range(keys.start, keys.stop))}
    if isinstance(columns, Tensor):
        return {"columns": columns + keys.start}
    return {"columns": [keys.start + at for at in columns]}
