"""Attention inside a denoiser, intercepted: handlers see queries, keys and values of each call.

A processor of diffusers projects, then calls `scaled_dot_product_attention`. Handlers stand in for
that one call, so whatever else a processor does (LoRA, rotary embeddings, norms, adapters) stays.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from unweave.attention_tools.errors import AttentionError, UnsupportedLayerError
from unweave.attention_tools.layers import EQUAL, AttentionLayer, denoiser_of

_depth: ContextVar[int] = ContextVar("unweave_attention_depth", default=0)
inner_pass: ContextVar[bool] = ContextVar("unweave_inner_pass", default=False)
"""Whether the pass under way is one that an update of the latents makes for itself."""


@dataclass
class DenoiserCall:
    """What is known of the forward pass that is under way."""

    step: int = -1
    """How many forward passes there were before in this context."""

    batch: int = 0
    """The samples of the pass, both halves of guidance counted."""

    guided: bool = False
    """Whether the first half of the batch is the unconditional one."""

    size: tuple[int, int] = (0, 0)
    """Height and width of the latents."""

    text: int = 0
    """Text tokens."""

    inner: bool = False
    """Whether an update of `guide_latents` makes the pass for itself, which is no step."""


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention: `q` (B, H, Q, d), `k` (B, H, K, d), `v` (B, H, K, e)."""

    layer: AttentionLayer
    denoiser: DenoiserCall
    q: Tensor = field(repr=False)
    k: Tensor = field(repr=False)
    v: Tensor = field(repr=False)
    mask: Tensor | None = field(repr=False)
    scale: float | None
    text: slice | None
    """Which keys are text, if any."""

    image: slice
    """Which queries are image."""

    image_keys: slice
    """Which keys are image, empty where there are none."""

    alone: bool
    """Whether no other handler follows."""

    @property
    def conditional(self) -> slice:
        """The samples of the batch that have the prompt: the second half under guidance."""
        half = self.q.shape[0] // 2
        return slice(half, None) if self.denoiser.guided else slice(0, None)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the image queries.

        Raises `AttentionError` when their number does not come from halving the latents.
        """
        stop = self.q.shape[2] if self.image.stop is None else self.image.stop
        return grid_of(stop - self.image.start, self.denoiser.size, self.layer.name)

    def proceed(self, **changes: Any) -> Tensor:
        """Return the output of attention, after `changes` of `q`, `k`, `v`, `mask` or `scale`."""
        call = replace(self, **changes) if changes else self
        return scaled_dot_product_attention(
            call.q, call.k, call.v, attn_mask=call.mask, scale=call.scale
        )


Handler = Callable[[AttentionCall], Tensor]
"""Returns the output of attention (B, H, Q, e), usually through `AttentionCall.proceed`."""


@contextmanager
def intercept_attention(
    pipe: Any, layers: Sequence[AttentionLayer], handler: Handler
) -> Iterator[DenoiserCall]:
    """Let `handler` stand in for the attention of `layers` while the block runs.

    Blocks nest: the handler of the outer block comes first, and its `proceed` calls the next. On
    exit, also by an exception, every layer has the very processor object that it had before.
    """
    denoiser, call = denoiser_of(pipe), DenoiserCall()
    with ExitStack() as stack:
        for layer in layers:
            module: Any = layer.module
            original = module.processor
            stack.callback(module.set_processor, original)
            module.set_processor(_Intercepted(original, layer, handler, call))
        watch = denoiser.register_forward_pre_hook(
            lambda _, args, kwargs: _begin(call, pipe, denoiser, args, kwargs), with_kwargs=True
        )
        stack.callback(watch.remove)
        yield call


def grid_of(tokens: int, size: tuple[int, int], name: str = "the layer") -> tuple[int, int]:
    """Return height and width of `tokens` positions over latents of `size`, halved as they are.

    >>> grid_of(6, (8, 12))
    (2, 3)
    """
    height, width = size
    while height * width > tokens and height * width > 1:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != tokens:
        raise AttentionError(
            f"{name} has {tokens} image tokens, which no halving of latents {size[0]}x{size[1]} "
            "gives"
        )
    return height, width


class _Intercepted:
    """Stands in for a processor: runs it, with its call of attention going to the handler."""

    def __init__(
        self, original: Any, layer: AttentionLayer, handler: Handler, call: DenoiserCall
    ) -> None:
        self.original, self.layer, self.handler, self.call = original, layer, handler, call
        self.run = _fused(original)
        # Attention modules pass on only what the signature of the processor lists.
        listed = lambda *args, **kwargs: self(*args, **kwargs)  # noqa: E731
        listed.__signature__ = inspect.signature(original.__call__)  # type: ignore[attr-defined]
        self.__dict__["__call__"] = listed

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        text = encoder_hidden_states
        text = text[0] if isinstance(text, tuple) else text
        depth = _depth.get()
        token = _depth.set(depth + 1)
        mode = _Attending(self, None if text is None else text.shape[1], alone=depth == 0)
        try:
            with mode:
                out = self.run(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        finally:
            _depth.reset(token)
        if not mode.seen:
            raise UnsupportedLayerError(
                f"{self.layer.name} ({self.layer.processor}) made no call of torch's "
                "scaled_dot_product_attention; choose the native attention backend"
            )
        return out


class _Attending(TorchFunctionMode):
    def __init__(self, owner: _Intercepted, text: int | None, alone: bool) -> None:
        super().__init__()
        self.owner, self.text, self.alone, self.seen = owner, text, alone, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or self.seen:
            return func(*args, **kwargs)
        self.seen = True
        return self.owner.handler(self._call(*args, **kwargs))

    def _call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> AttentionCall:
        layer = self.owner.layer
        if dropout_p or is_causal or enable_gqa:
            raise UnsupportedLayerError(
                f"{layer.name} ({layer.processor}) uses dropout, a causal mask or grouped queries"
            )
        text, image, image_keys = self._places(query.shape[2], key.shape[2])
        return AttentionCall(
            layer=layer,
            denoiser=self.owner.call,
            q=query,
            k=key,
            v=value,
            mask=attn_mask,
            scale=scale,
            text=text,
            image=image,
            image_keys=image_keys,
            alone=self.alone,
        )

    def _places(self, queries: int, keys: int) -> tuple[slice | None, slice, slice]:
        """Return which keys are text, which queries are image and which keys are image."""
        layer, everything, nothing = self.owner.layer, slice(0, queries), slice(0, 0)
        if layer.kind == "self":
            return None, everything, slice(0, keys)
        text = self.owner.call.text if self.text is None else self.text
        if layer.order == "beside" or keys == text:
            return slice(0, text), everything, nothing
        joint = queries == keys
        if layer.order == "text first":
            return slice(0, text), slice(text if joint else 0, queries), slice(text, keys)
        return slice(keys - text, keys), slice(0, queries - text), slice(0, keys - text)


def _fused(original: Any) -> Any:
    """Return the processor, or the one that gives its output through fused attention."""
    equal = EQUAL.get(type(original).__name__)
    if equal is None:
        return original
    from diffusers.models import attention_processor

    return getattr(attention_processor, equal)()


def _begin(
    call: DenoiserCall, pipe: Any, denoiser: nn.Module, args: tuple[Any, ...], kwargs: Any
) -> None:
    given = inspect.signature(denoiser.forward).bind(*args, **kwargs).arguments
    sample = given.get("sample", given.get("hidden_states"))
    text = given.get("encoder_hidden_states")
    if not isinstance(sample, Tensor) or sample.dim() not in (3, 4):
        shape = tuple(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
        raise AttentionError(
            f"the latents of {type(denoiser).__name__} must be (B, C, H, W) or packed (B, N, C), "
            f"got {shape}; video models are not supported"
        )
    call.inner = inner_pass.get()
    call.step += not call.inner
    call.batch = sample.shape[0]
    call.text = text.shape[1] if isinstance(text, Tensor) else 0
    call.guided = not call.inner and is_guided(pipe, sample)
    if sample.dim() == 4:
        call.size = sample.shape[2], sample.shape[3]
    else:
        places = given["img_ids"].reshape(-1, 3).amax(0)
        call.size = int(places[1]) + 1, int(places[2]) + 1


def is_guided(pipe: Any, sample: Tensor) -> bool:
    """Return whether `sample` holds the unconditional half before the conditional one.

    It does when the two halves are the same, unless `pipe.do_classifier_free_guidance` is false.
    """
    half = sample.shape[0] // 2
    if sample.shape[0] % 2 or not half:
        return False
    known = getattr(pipe, "do_classifier_free_guidance", True)
    return bool(known) and torch.equal(sample[:half], sample[half:])
