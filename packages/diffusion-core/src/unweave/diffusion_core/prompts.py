"""Prompts: templates to put a concept in, their text states, and where a phrase is in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from unweave.diffusion_core.errors import PromptError

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
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


def encode_prompts(pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """Return the last hidden states of `prompts`, (n, tokens, width), as the pipeline makes them.

    Prompts are padded and cut to the tokenizer's length, and learned tokens of several vectors are
    spelled out. Gradients flow to the text encoder unless the caller turns them off. The empty
    prompt is allowed; an empty list is a `PromptError`.
    """
    if isinstance(prompts, str) or not prompts:
        raise PromptError(f"`prompts` must be a list of at least one prompt, got {prompts!r}")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise PromptError(f"every prompt must be text, got {prompt!r}")
    states, _ = pipe.encode_prompt(list(prompts), pipe.text_encoder.device, 1, False)
    return cast(Tensor, states)


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
