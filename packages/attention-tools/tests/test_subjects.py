"""Subjects of prompts by the rule: what it finds, and where it is known to be wrong."""

from __future__ import annotations

import pytest

from unweave.attention_tools import TokenError, find_subjects, find_tokens
from unweave.emoji_world import World


@pytest.mark.parametrize(
    ("prompt", "subjects"),
    [
        ("a cat and a dog", ("cat", "dog")),
        ("a cat face and a rocket on a red background", ("cat face", "rocket")),
        ("A photo of an elephant with a crown", ("elephant", "crown")),
        ("a red car and white sheep", ("car", "sheep")),
        ("a pizza, a guitar and two small turtles in the park", ("pizza", "guitar", "turtles")),
        ("a bear wearing a hat next to a bowl of soup", ("bear", "hat", "bowl", "soup")),
        ("a dog in front of a house, and a frog", ("dog", "frog")),
        ("a turtle to the left of a lion", ("turtle", "lion")),
        ("a frog; oil painting, 4k", ("frog",)),
        ("an ice-cream and 3 light bulbs", ("ice-cream", "light bulbs")),
        ("red", ("red",)),
    ],
)
def test_subjects_of_usual_prompts(prompt, subjects):
    assert find_subjects(prompt) == subjects


def test_known_names_stand_for_their_phrase():
    prompt = "a shiny red apple and a very old cat face"
    assert find_subjects(prompt) == ("apple", "very old cat face")
    known = ["apple", "red apple", "cat face", "cat"]
    assert find_subjects(prompt, known) == ("red apple", "cat face")


def test_one_word_twice_comes_with_its_occurrences(pipe):
    words = find_subjects("a cat, a dog and a cat face")
    assert words == (("cat", 0), "dog", "cat face")
    assert find_subjects("a cat and a cat") == (("cat", 0), ("cat", 1))
    assert len(find_tokens(pipe, "a cat, a dog and a cat face", words).require_distinct()) == 3


def test_all_pairs_of_the_embedded_world_are_found(pipe):
    names = World.concepts
    for first, second in zip(names, (*names[7:], *names[:7]), strict=True):
        prompt = f"{World.phrase(first)} and {World.phrase(second)} on a red background"
        assert find_subjects(prompt, names) == (first, second)
        find_tokens(pipe, prompt, find_subjects(prompt)).require_distinct()


def test_places_are_no_subjects_even_where_one_would_call_them_so():
    """The rule cannot tell a sofa that is seen from a background that is not."""
    assert find_subjects("a cat on a sofa") == ("cat",)


@pytest.mark.parametrize("prompt", ["", "in the dark", "a photo of the", ", , ."])
def test_prompts_without_a_subject_are_named(prompt):
    with pytest.raises(TokenError, match="no subject was found"):
        find_subjects(prompt)
