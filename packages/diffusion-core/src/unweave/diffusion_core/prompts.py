"""Prompts: templates to put a concept in, their text states, and where a phrase is in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from unweave.diffusion_core.errors import PromptError
from unweave.diffusion_core.pipelines import Pipeline

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

OBJECT_TEMPLATES: tuple[str, ...] = (
    "a picture of a {}",
    "a photo of one {}",
    "a photo of my {}",
    "a photo of this {}",
    "an image of a {}",
    "an image showing the {}",
    "a snapshot of a {}",
    "a portrait of a {}",
    "a close picture of a {}",
    "a close photo of the {}",
    "a {} seen from near",
    "a {} seen from afar",
    "a small {} in a picture",
    "a large {} in a picture",
    "a sharp photo of a {}",
    "a blurred photo of a {}",
    "a bright picture of the {}",
    "a dark picture of the {}",
    "a cropped picture of a {}",
    "a clean photo of a {}",
    "a dirty photo of a {}",
    "a good picture of the {}",
    "a poor picture of the {}",
    "a nice {} in a photo",
    "a strange {} in a photo",
    "a detailed illustration of a {}",
    "a simple illustration of a {}",
)
"""Templates for objects: 27, like the list of textual inversion (arXiv 2208.01618)."""

STYLE_TEMPLATES: tuple[str, ...] = (
    "a picture in the style of {}",
    "an artwork in the style of {}",
    "a drawing in the style of {}",
    "a sketch in the style of {}",
    "an illustration in the style of {}",
    "a small picture in the style of {}",
    "a large picture in the style of {}",
    "a bright artwork in the style of {}",
    "a dark artwork in the style of {}",
    "a clean artwork in the style of {}",
    "a rough drawing in the style of {}",
    "a detailed drawing in the style of {}",
    "a simple drawing in the style of {}",
    "a close view painted in the style of {}",
    "a wide view painted in the style of {}",
    "a nice image in the style of {}",
    "a strange image in the style of {}",
    "a cropped image in the style of {}",
    "one more image in the style of {}",
)
"""Templates for styles: 19, like the list of textual inversion (arXiv 2208.01618)."""

_END_OF_WORD = "</w>"


def fill(template: str, concept: str) -> str:
    """Put `concept` in the place of the one "{}" of `template`; other braces mean themselves.

    >>> fill("a picture of a {}", "cat face")
    'a picture of a cat face'
    """
    if template.count("{}") != 1:
        raise PromptError(f'`template` must contain "{{}}" once, got {template!r}')
    if not concept.strip():
        raise PromptError(f"`concept` must not be empty, got {concept!r}")
    return template.replace("{}", concept)


def mentions(prompt: str, concept: str) -> bool:
    """Say whether `prompt` has `concept` as whole words, in any case.

    >>> mentions("A Car on red", "car"), mentions("a carrot", "car")
    (True, False)
    """
    words = rf"(?<!\w){re.escape(concept.strip())}(?!\w)"
    return re.search(words, prompt, re.IGNORECASE) is not None


@dataclass(frozen=True)
class PromptStates:
    """What a U-Net reads of n prompts: a state for each token and, in XL, one pooled state.

    `hidden_states` is (n, tokens, width); `pooled` is (n, width of the pooled state), None for
    Stable Diffusion 1.x and 2.x. Raises `PromptError` for other shapes.

    >>> states = PromptStates(torch.zeros(1, 77, 56), torch.zeros(1, 24)).expand(3)
    >>> states.hidden_states.shape, states.pooled.shape
    (torch.Size([3, 77, 56]), torch.Size([3, 24]))
    """

    hidden_states: Tensor
    pooled: Tensor | None = None

    def __post_init__(self) -> None:
        """Check that the two fit each other."""
        pooled = None if self.pooled is None else tuple(self.pooled.shape)
        fits = pooled is None or (len(pooled) == 2 and pooled[0] == len(self.hidden_states))
        if self.hidden_states.ndim != 3 or not fits:
            raise PromptError(
                "`hidden_states` must be (n, tokens, width) and `pooled` (n, width) or None, got "
                f"{tuple(self.hidden_states.shape)} and {pooled}"
            )

    @classmethod
    def of(cls, states: Tensor | PromptStates) -> PromptStates:
        """Return `states` themselves, or hidden states (n, tokens, width) without pooled ones."""
        return states if isinstance(states, PromptStates) else cls(states)

    @classmethod
    def cat(cls, parts: Sequence[PromptStates]) -> PromptStates:
        """Return the states of all `parts` after one another; pooled if all of them are."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return cls(
            torch.cat([part.hidden_states for part in parts]),
            torch.cat(pooled) if len(pooled) == len(parts) else None,
        )

    def expand(self, count: int) -> PromptStates:
        """Return the states of one prompt `count` times, or those of `count` prompts as they are.

        Memory is shared, not copied.
        """
        pooled = None if self.pooled is None else self.pooled.expand(count, -1)
        return PromptStates(self.hidden_states.expand(count, -1, -1), pooled)

    def select(self, rows: Tensor) -> PromptStates:
        """Return the states of the prompts with numbers `rows` (k,), which may repeat."""
        rows = rows.to(self.hidden_states.device)
        pooled = None if self.pooled is None else self.pooled[rows]
        return PromptStates(self.hidden_states[rows], pooled)


def encode_prompts(pipe: Pipeline, prompts: Sequence[str]) -> Tensor:
    """Return the hidden states of `prompts`, (n, tokens, width), as the pipeline makes them.

    They are those of `encode_conditions`, which has the pooled states of XL beside them.
    """
    return encode_conditions(pipe, prompts).hidden_states


def encode_conditions(pipe: Pipeline, prompts: Sequence[str]) -> PromptStates:
    """Return what the U-Net of `pipe` reads of n `prompts`, as the pipeline makes it.

    For Stable Diffusion 1.x and 2.x these are the last hidden states of the text encoder; for XL
    the last but one of both text encoders, side by side, and the pooled state of the second.
    Prompts are padded and cut to the tokenizer's length, and learned tokens of several vectors are
    spelled out. Gradients flow to the text encoders unless the caller turns them off. The empty
    prompt is encoded as any other, although an XL pipeline without negative prompt may take zeros
    for it (`force_zeros_for_empty_prompt`). Raises `PromptError` for an empty list.

    >>> from unweave.diffusion_core.testing import tiny_pipeline
    >>> encode_conditions(tiny_pipeline(), ["a cat", ""]).hidden_states.shape
    torch.Size([2, 77, 32])
    """
    if isinstance(prompts, str) or not prompts:
        raise PromptError(f"`prompts` must be a list of at least one prompt, got {prompts!r}")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise PromptError(f"every prompt must be text, got {prompt!r}")
    hidden_states, _, *pooled = pipe.encode_prompt(
        list(prompts),
        device=pipe.text_encoder.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    return PromptStates(hidden_states, pooled[0] if pooled else None)


def subject_token_positions(tokenizer: CLIPTokenizer, prompt: str, phrase: str) -> list[int]:
    """Return where the tokens of `phrase` first stand in the encoded `prompt`.

    Position 0 is the start token. The phrase must be whole words. Raises `PromptError` when the
    phrase is empty, is not in the prompt, or stands beyond the length that the tokenizer keeps.

    >>> from unweave.diffusion_core.testing import byte_tokenizer
    >>> subject_token_positions(byte_tokenizer(), "a cat", "cat")
    [2, 3, 4]
    """
    wanted = _token_ids(tokenizer, phrase)
    if not wanted:
        raise PromptError(f"`phrase` must name something in the prompt, got {phrase!r}")
    token_ids = _token_ids(tokenizer, prompt)
    for start in range(len(token_ids) - len(wanted) + 1):
        stop = start + len(wanted)
        if token_ids[start:stop] == wanted and _begins_word(tokenizer, token_ids, start):
            if stop > tokenizer.model_max_length - 2:
                raise PromptError(
                    f"{phrase!r} ends at token {stop} of the prompt {prompt!r}, of which "
                    f"{tokenizer.model_max_length - 2} are read: shorten the prompt"
                )
            return list(range(start + 1, stop + 1))
    raise PromptError(
        f"the prompt {prompt!r} does not contain {phrase!r} as whole words: give a phrase of the "
        "prompt, spelled as it is there"
    )


def _token_ids(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin

    spelled_out = TextualInversionLoaderMixin().maybe_convert_prompt(text, tokenizer)
    return cast("list[int]", tokenizer(spelled_out, add_special_tokens=False).input_ids)


def _begins_word(tokenizer: CLIPTokenizer, token_ids: Sequence[int], start: int) -> bool:
    if start == 0:
        return True
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    if token_ids[start] in added or token_ids[start - 1] in added:
        return True
    piece = tokenizer.convert_ids_to_tokens(token_ids[start - 1])
    return str(piece).endswith(_END_OF_WORD)
