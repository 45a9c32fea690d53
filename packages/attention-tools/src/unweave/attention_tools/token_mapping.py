"""Which tokens of two prompts stand for one another, for prompt-to-prompt (arXiv 2208.01626)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from unweave.attention_tools.errors import AttentionError
from unweave.attention_tools.tokens import find_tokens

Edit = Literal["replace", "refine"]


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
