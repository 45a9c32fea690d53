"""The CLIP tokenizer of the world: one token for each of its words, bytes for any other text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from unweave.emoji_world.scenes import CAPTION_TEMPLATES
from unweave.emoji_world.world import World

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_TOKENS = 32
COMMON_WORDS = (
    "a an the of in on with and or by at to from photo picture painting drawing image illustration "
    "rendering sketch art artwork style background small large big close up cropped clean dirty "
    "bright dark good bad nice two three many one nothing left right above below next scene icon "
    "emoji cute old new , ."
)


def world_words() -> list[str]:
    """Every word of the world's captions, names and synonyms, sorted."""
    texts = [COMMON_WORDS, *World.styles, *World.backgrounds, *CAPTION_TEMPLATES, "stripes dots"]
    for concept in World.table.values():
        texts += [concept.name, concept.category, *concept.synonyms]
    plain = " ".join(texts).replace("{", " ").replace("}", " ").replace(",", " , ")
    return sorted(set(plain.split()))


def build_tokenizer() -> CLIPTokenizer:
    """Learns the byte-pair merges that turn each of `world_words` into one token."""
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainer = trainers.BpeTrainer(
        vocab_size=20_000,
        min_frequency=1,
        end_of_word_suffix="</w>",
        show_progress=False,
        initial_alphabet=alphabet,
    )
    learner.train_from_iterator([[word] for word in world_words()], trainer)
    pairs = json.loads(learner.to_str())["model"]["merges"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in pairs]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)
