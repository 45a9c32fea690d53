"""Where the words of a prompt stand among the tokens that a denoiser attends to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from unweave.attention_tools.errors import TokenError

Word = str | tuple[str, int] | Sequence[int]
"""A phrase of the prompt, a phrase with which of its occurrences (from 0), or token positions."""

Concepts = Sequence[Word] | Sequence[Sequence[Word]]
"""What should appear: words for all prompts alike, or one list of words for each prompt."""


@dataclass(frozen=True)
class TokenSpans:
    """The token positions of some words of a prompt.

    Positions are columns of the denoiser's text, so position 0 of a CLIP is its start token, and
    those of a second text encoder that is appended follow those of the first.
    """

    prompt: str
    tokens: tuple[str, ...]
    """All tokens of the prompt in order, special tokens included, without padding."""

    words: tuple[str, ...]
    """The names of the spans."""

    positions: tuple[tuple[int, ...], ...]
    """The positions of each."""

    def __getitem__(self, word: str) -> tuple[int, ...]:
        """Return the positions of a word. Raises `TokenError` when it is not among `words`."""
        if word not in self.words:
            raise TokenError(f"{word!r} is not among the words {list(self.words)}")
        return self.positions[self.words.index(word)]

    def __len__(self) -> int:
        """Return how many words there are."""
        return len(self.words)

    def require_distinct(self) -> TokenSpans:
        """Return itself. Raises `TokenError` when two words share a token."""
        for index, own in enumerate(self.positions):
            for other in range(index):
                shared = sorted(set(own) & set(self.positions[other]))
                if shared:
                    raise TokenError(
                        f"{self.words[other]!r} and {self.words[index]!r} share token {shared[0]} "
                        f"of {self.prompt!r}: give different words, or occurrences such as "
                        "('cat', 1)"
                    )
        return self


def find_tokens(pipe: Any, prompt: str, words: Sequence[Word]) -> TokenSpans:
    """Return the token positions of `words` in `prompt`, for a pipeline or one tokenizer.

    A phrase must be whole words of the prompt; upper and lower case are the same. All of its
    occurrences count together, unless one is chosen as in `("cat", 1)`. Pipelines whose text comes
    from two encoders in a row (Stable Diffusion 3) give the positions in both.

    Raises `TokenError` naming the word and listing the tokens when a word is not in the prompt,
    stands beyond what the tokenizer keeps, or is a position outside.
    """
    if not words:
        raise TokenError("`words` must name something in the prompt, got none")
    parts = [_Tokenized(tokenizer, prompt, at) for tokenizer, at in _tokenizers(pipe)]
    names, positions = [], []
    for word in words:
        name, occurrence = _choice(word)
        if name is None:
            found = _checked_positions([int(at) for at in word], parts)
            label = " ".join(_piece(parts, at) for at in found)
        else:
            found = [at for part in parts for at in part.find(name, occurrence)]
            label = name if occurrence is None else f"{name} {occurrence}"
        names.append(label)
        positions.append(tuple(found))
    tokens = tuple(token for part in parts for token in part.tokens)
    return TokenSpans(prompt, tokens, tuple(names), tuple(positions))


def find_concepts(
    pipe: Any, prompt: str | Sequence[str], concepts: Concepts, images_per_prompt: int = 1
) -> tuple[TokenSpans, ...]:
    """Return the tokens of the concepts for each image of a call of the pipeline.

    Raises `TokenError` for words that are not in their prompt, concepts that share a token, or
    lists that are not as many as the prompts.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    lists = _each_prompt(prompts, concepts)
    return tuple(
        spans
        for text, words in zip(prompts, lists, strict=True)
        for spans in [find_tokens(pipe, text, words).require_distinct()] * images_per_prompt
    )


def occurrences(prompt: str, phrase: str) -> list[re.Match[str]]:
    """Return where `phrase` stands in a prompt as whole words, whatever their case and spaces."""
    if not phrase.split():
        return []
    pattern = rf"(?<!\w){re.escape(' '.join(phrase.split()))}(?!\w)".replace(r"\ ", r"\s+")
    return list(re.finditer(pattern, prompt, re.IGNORECASE))


def _each_prompt(prompts: list[str], concepts: Concepts) -> list[Sequence[Word]]:
    """Return one list of words a prompt: a shared list holds words, others hold lists of words."""
    if isinstance(concepts, str):
        raise TokenError(f"`concepts` must be a list of words, got the text {concepts!r}")
    own = len(concepts) > 0 and all(
        isinstance(words, list) and words and not all(isinstance(one, int) for one in words)
        for words in concepts
    )
    if not own:
        return [cast(Sequence[Word], concepts)] * len(prompts)
    if len(concepts) != len(prompts):
        raise TokenError(
            f"`concepts` must be one list of words, or one for each of the {len(prompts)} prompts, "
            f"got {len(concepts)}"
        )
    return cast(list[Sequence[Word]], list(concepts))


class _Tokenized:
    """A prompt in the tokens of one encoder, whose columns begin at `first`."""

    def __init__(self, tokenizer: Any, prompt: str, first: int) -> None:
        self.tokenizer, self.prompt, self.first = tokenizer, prompt, first
        fast = bool(getattr(tokenizer, "is_fast", False))
        encoded = tokenizer(prompt, return_offsets_mapping=fast, truncation=False)
        self.ids: list[int] = list(encoded.input_ids)
        self.offsets = list(encoded.offset_mapping) if fast else None
        self.tokens: list[str] = [str(token) for token in tokenizer.convert_ids_to_tokens(self.ids)]
        self.window = min(int(tokenizer.model_max_length), 512)

    def find(self, phrase: str, occurrence: int | None) -> list[int]:
        matches = occurrences(self.prompt, phrase)
        if not matches:
            raise TokenError(
                f"{phrase!r} is not among the words of {self.prompt!r}, whose tokens are "
                f"{self.tokens}"
            )
        if occurrence is not None:
            if not 0 <= occurrence < len(matches):
                raise TokenError(
                    f"{phrase!r} occurs {len(matches)} times in {self.prompt!r}, got occurrence "
                    f"{occurrence} (counted from 0)"
                )
            matches = [matches[occurrence]]
        found = [at for match in matches for at in self._between(*match.span())]
        if found[-1] >= self.window - 1:
            raise TokenError(
                f"{phrase!r} stands at token {found[-1]} of {self.prompt!r}, of which "
                f"{self.window - 2} are read: shorten the prompt"
            )
        return [self.first + at for at in found]

    def _between(self, start: int, stop: int) -> list[int]:
        """Return the tokens that cover characters `start` to `stop` of the prompt."""
        if self.offsets is not None:
            covers = [first < stop and last > start for first, last in self.offsets]
            return [at for at, covered in enumerate(covers) if covered]
        before, through = (
            len(self.tokenizer(self.prompt[:end].rstrip(), add_special_tokens=False).input_ids)
            for end in (start, stop)
        )
        plain = self.tokenizer(self.prompt, add_special_tokens=False).input_ids
        special = next(at for at in range(len(self.ids)) if self.ids[at : at + len(plain)] == plain)
        return list(range(special + before, special + through))


def _tokenizers(pipe: Any) -> list[tuple[Any, int]]:
    """Return the tokenizers whose tokens are columns of the text, and where their columns begin."""
    first = getattr(pipe, "tokenizer", None)
    second, third = getattr(pipe, "tokenizer_2", None), getattr(pipe, "tokenizer_3", None)
    if first is None and second is None:
        if callable(pipe) and hasattr(pipe, "convert_ids_to_tokens"):
            return [(pipe, 0)]
        raise TokenError(f"{type(pipe).__name__} has no tokenizer: give a pipeline or a tokenizer")
    if first is not None and third is not None:
        return [(first, 0), (third, int(first.model_max_length))]
    if second is not None and getattr(pipe, "transformer", None) is not None:
        return [(second, 0)]
    return [(first if first is not None else second, 0)]


def _choice(word: Word) -> tuple[str | None, int | None]:
    """Return the phrase and its occurrence, or nothing for token positions."""
    if isinstance(word, str):
        return word, None
    if len(word) == 2 and isinstance(word[0], str):
        return word[0], int(word[1])
    return None, None


def _checked_positions(positions: list[int], parts: list[_Tokenized]) -> list[int]:
    known = [part.first + at for part in parts for at in range(len(part.tokens))]
    wrong = [at for at in positions if at not in known]
    if wrong or not positions:
        raise TokenError(
            f"token positions must be among {known[0]} to {known[-1]} of {parts[0].prompt!r}, got "
            f"{wrong or positions}"
        )
    return positions


def _piece(parts: list[_Tokenized], position: int) -> str:
    part = next(part for part in reversed(parts) if part.first <= position)
    return part.tokens[position - part.first]
