"""Claims about prompts: encoded as the pipeline does it, and phrases found as whole words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from unweave.diffusion_core.errors import PromptError
from unweave.diffusion_core.prompts import (
    OBJECT_TEMPLATES,
    STYLE_TEMPLATES,
    encode_prompts,
    fill,
    subject_token_positions,
)
from unweave.diffusion_core.testing import byte_tokenizer
from unweave.diffusion_core.tokens import add_tokens

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def test_there_are_27_object_and_19_style_templates_all_different_and_fillable() -> None:
    assert len(set(OBJECT_TEMPLATES)) == 27
    assert len(set(STYLE_TEMPLATES)) == 19
    for template in (*OBJECT_TEMPLATES, *STYLE_TEMPLATES):
        assert "cat face" in fill(template, "cat face")


def test_a_concept_with_braces_is_put_in_as_it_is() -> None:
    assert fill("a {} {x}", "{0} {}") == "a {0} {} {x}"


@pytest.mark.parametrize(
    ("template", "concept"), [("a cat", "dog"), ("{} and {}", "dog"), ("a {}", " ")]
)
def test_an_unusable_template_or_concept_is_refused(template: str, concept: str) -> None:
    with pytest.raises(PromptError):
        fill(template, concept)


def test_states_are_those_of_the_pipeline(pipe: StableDiffusionPipeline) -> None:
    prompts = ["a cat", "", "a dog and a rocket", "x" * 200]
    states = encode_prompts(pipe, prompts)
    tokens = pipe.tokenizer(
        prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    assert states.shape == (4, 77, 32)
    assert torch.equal(states, pipe.text_encoder(tokens.input_ids)[0])
    assert torch.equal(states, pipe.encode_prompt(prompts, "cpu", 1, False)[0])


def test_states_are_differentiable_unless_gradients_are_off(pipe: StableDiffusionPipeline) -> None:
    encode_prompts(pipe, ["a cat"]).sum().backward()
    assert all(parameter.grad is not None for parameter in pipe.text_encoder.parameters())
    with torch.no_grad():
        assert not encode_prompts(pipe, ["a cat"]).requires_grad


@pytest.mark.parametrize("prompts", ["a cat", [], [3], [None]])
def test_a_bad_list_of_prompts_is_refused(pipe: StableDiffusionPipeline, prompts: object) -> None:
    with pytest.raises(PromptError):
        encode_prompts(pipe, prompts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "phrase", "positions"),
    [
        ("a cat", "cat", [2, 3, 4]),
        ("cat", "cat", [1, 2, 3]),
        ("A  Cat face!", "cat face", [2, 3, 4, 5, 6, 7, 8]),
        ("concat a cat", "cat", [8, 9, 10]),
        ("a cat, a cat", "cat", [2, 3, 4]),
        ("cats cat", "cat", [5, 6, 7]),
    ],
)
def test_a_phrase_is_found_where_it_first_stands_as_whole_words(
    prompt: str, phrase: str, positions: list[int]
) -> None:
    assert subject_token_positions(byte_tokenizer(), prompt, phrase) == positions


@pytest.mark.parametrize("phrase", ["edral", "cath", "dog", "", "  ", "cathedral x"])
def test_a_phrase_that_is_not_there_is_named(phrase: str) -> None:
    with pytest.raises(PromptError) as error:
        subject_token_positions(byte_tokenizer(), "a cathedral", phrase)
    assert repr(phrase) in str(error.value)


def test_a_phrase_beyond_the_length_that_is_read_is_an_error() -> None:
    tokenizer = byte_tokenizer()
    assert subject_token_positions(tokenizer, "x" * 72 + " cat", "cat") == [73, 74, 75]
    with pytest.raises(PromptError, match="75 are read"):
        subject_token_positions(tokenizer, "x" * 73 + " cat", "cat")


def test_a_learned_token_of_two_vectors_has_two_positions(pipe: StableDiffusionPipeline) -> None:
    add_tokens(pipe, ["<cat>", "<cat>_1"])
    assert subject_token_positions(pipe.tokenizer, "a <cat> b", "<cat>") == [2, 3]
    assert subject_token_positions(pipe.tokenizer, "a <cat> b", "b") == [4]
