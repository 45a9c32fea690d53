"""The subjects of a prompt, found by a rule on its words, where nobody names them.

The papers of A-STAR and Attend-and-Excite list the nouns of a prompt by hand. Taggers that tell
nouns apart need a model to be downloaded, so this is a rule with closed lists of English words:
right for prompts such as "a photo of a cat and a red car in a forest", and no parser.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from unweave.attention_tools.errors import TokenError
from unweave.attention_tools.tokens import Word, occurrences


def _listed(words: str) -> frozenset[str]:
    return frozenset(words.split())


DETERMINERS = _listed(
    "a an the this that these those my your his her its our their some any each every another both "
    "several many few no one two three four five six seven eight nine ten"
)
"""A phrase begins after these."""

JOINING = _listed(
    "and or plus with without beside besides near next to facing is are was has have wearing "
    "holding carrying riding eating drinking driving chasing watching playing hugging pulling "
    "pushing fighting meeting"
)
"""A phrase ends before these, and what follows is another subject."""

PLACING = _listed(
    "in on at by inside outside under over above below behind before against across along through "
    "into onto from during around between among beyond while"
)
"""What follows these is where the subjects are, until a word that joins or a comma."""

ENDING = _listed(
    "of for as like sitting standing lying sleeping walking running jumping flying swimming "
    "looking smiling dancing"
)
"""A phrase ends before these, and what follows is what it was before."""

DESCRIBING = _listed(
    "red orange yellow green blue purple violet pink brown black white grey gray golden silver "
    "dark bright colourful colorful big small large little tiny huge giant tall short long "
    "old new young ancient modern cute beautiful pretty ugly happy sad angry funny realistic "
    "fluffy furry wooden metal shiny striped spotted round square single lone"
)
"""Left out at the beginning of a phrase."""

NO_SUBJECTS = _listed(
    "photo photograph picture image painting drawing sketch illustration portrait render rendering "
    "scene view background foreground style left right front top bottom side middle center centre "
    "close-up closeup shot quality detail resolution lighting 4k 8k hd"
)
"""A phrase that ends in one of these is none."""


def find_subjects(prompt: str, known: Sequence[str] = ()) -> tuple[Word, ...]:
    """Return the subjects of an English prompt, in order, as `find_tokens` takes them.

    A subject is a phrase between determiners, commas, joining words and prepositions, without
    adjectives of a short list at its beginning. What follows "in", "on" and the like is a place. A
    name of `known` inside a phrase stands for the phrase. A subject whose words occur more than
    once comes with its occurrence, as ("cat", 1).

    Raises `TokenError` when the rule finds none: name them yourself then.

    >>> find_subjects("a photo of a cat face and a big red car on a green background")
    ('cat face', 'car')
    >>> find_subjects("a red apple and a cat", known=["red apple"])
    ('red apple', 'cat')
    """
    subjects = [
        own for start, stop in _phrases(prompt) for own in _named(prompt, start, stop, known)
    ]
    if not subjects:
        raise TokenError(f"no subject was found in {prompt!r}: give the words that name them")
    return tuple(_word(prompt, start, stop) for start, stop in subjects)


def _phrases(prompt: str) -> Iterator[tuple[int, int]]:
    """Return the first and the last character of each phrase that is no place."""
    words: list[re.Match[str]] = []
    placing = False
    for word in [*re.finditer(r"\w+(?:['\u2019-]\w+)*|[^\w\s]", prompt), None]:
        text = "," if word is None else word[0].lower()
        mark = not re.match(r"\w", text)
        ends = mark or text.isdigit() or text in DETERMINERS | JOINING | PLACING | ENDING
        if word is not None and not ends:
            words.append(word)
            continue
        if words and not placing and words[-1][0].lower() not in NO_SUBJECTS:
            yield words[0].start(), words[-1].end()
        words = []
        if text in PLACING:
            placing = True
        elif mark or text in JOINING:
            placing = False


def _named(prompt: str, start: int, stop: int, known: Sequence[str]) -> list[tuple[int, int]]:
    """Return where the names of `known` in a phrase are, or the phrase without its adjectives."""
    found: list[tuple[int, int]] = []
    for name in sorted(known, key=len, reverse=True):
        for match in occurrences(prompt[start:stop], name):
            first, last = start + match.start(), start + match.end()
            if all(last <= other[0] or first >= other[1] for other in found):
                found.append((first, last))
    if found:
        return sorted(found)
    words = list(re.finditer(r"\S+", prompt[start:stop]))
    while len(words) > 1 and words[0][0].lower() in DESCRIBING:
        words.pop(0)
    return [(start + words[0].start(), stop)]


def _word(prompt: str, start: int, stop: int) -> Word:
    phrase = prompt[start:stop]
    places = [match.start() for match in occurrences(prompt, phrase)]
    return phrase if len(places) == 1 else (phrase, places.index(start))
