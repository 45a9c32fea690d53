"""Words found among tokens: CLIP, T5, and pipelines with several text encoders."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

from unweave.attention_tools import find_tokens
from unweave.attention_tools.errors import TokenError
from unweave.attention_tools.tokens import find_concepts

PROMPT = "a cat face and a rocket on a red background"
PAIR = "a cat face and a rocket"


@pytest.fixture(scope="module")
def t5():
    """A tokenizer as T5 has: Unigram pieces with their space, no start token, an end token."""
    pieces = ["▁a", "▁cat", "▁dog", "▁and", "▁the", "▁rock", "et", "▁", "s", ",", "▁Cat"]
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    vocabulary += [(piece, -2.0 - at / 100) for at, piece in enumerate(pieces)]
    vocabulary += [(letter, -8.0) for letter in letters if letter != "s"]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=16,
    )


def words_of(spans, word):
    return [spans.tokens[at] for at in spans[word]]


def test_clip_words_and_phrases(pipe):
    spans = find_tokens(pipe, PROMPT, ["cat face", "rocket", "red background"])
    assert spans.words == ("cat face", "rocket", "red background")
    assert spans.positions == ((2, 3), (6,), (9, 10))
    assert words_of(spans, "cat face") == ["cat</w>", "face</w>"]
    assert len(spans) == 3
    assert spans.require_distinct() is spans


def test_a_tokenizer_alone_will_do(pipe):
    assert find_tokens(pipe.tokenizer, PROMPT, ["rocket"])["rocket"] == (6,)


def test_case_and_spaces_do_not_matter(pipe):
    spans = find_tokens(pipe, "A  Cat   FACE, and a rocket", ["cat  face", "Rocket"])
    assert words_of(spans, "cat  face") == ["cat</w>", "face</w>"]
    assert words_of(spans, "Rocket") == ["rocket</w>"]


def test_parts_of_words_do_not_count(pipe):
    with pytest.raises(TokenError, match="'rock' is not among the words"):
        find_tokens(pipe, PROMPT, ["rock"])
    with pytest.raises(TokenError):
        find_tokens(pipe, PROMPT, ["at face"])


def test_all_pieces_of_a_word_count(pipe):
    prompt = "a xylophonist and a rocket"
    spans = find_tokens(pipe, prompt, ["xylophonist", "rocket"])
    pieces = words_of(spans, "xylophonist")
    assert len(pieces) > 1
    assert "".join(pieces).replace("</w>", "") == "xylophonist"
    assert words_of(spans, "rocket") == ["rocket</w>"]


def test_repeated_words_count_together_or_one_by_one(pipe):
    prompt = "a cat face and a cat face"
    spans = find_tokens(pipe, prompt, ["cat face", ("cat face", 0), ("cat face", 1)])
    assert spans.words == ("cat face", "cat face 0", "cat face 1")
    assert spans.positions == ((2, 3, 6, 7), (2, 3), (6, 7))
    with pytest.raises(TokenError, match="occurs 2 times"):
        find_tokens(pipe, prompt, [("cat face", 2)])
    with pytest.raises(TokenError, match="occurs 2 times"):
        find_tokens(pipe, prompt, [("cat face", -1)])


def test_positions_are_words_too(pipe):
    spans = find_tokens(pipe, PROMPT, [[2, 3], "rocket"])
    assert spans.words == ("cat</w> face</w>", "rocket")
    assert spans.positions == ((2, 3), (6,))
    with pytest.raises(TokenError, match="0 to 11"):
        find_tokens(pipe, PROMPT, [[12]])
    with pytest.raises(TokenError, match="positions"):
        find_tokens(pipe, PROMPT, [[]])


def test_punctuation_and_accents(pipe):
    spans = find_tokens(pipe, "a cat's face; (a red rocket!)", ["cat", "rocket", "red"])
    assert words_of(spans, "rocket") == ["rocket</w>"]
    assert words_of(spans, "cat")[0].startswith("cat")


def test_missing_words_list_the_tokens(pipe):
    with pytest.raises(TokenError) as caught:
        find_tokens(pipe, PROMPT, ["dog"])
    assert "'dog'" in str(caught.value)
    assert "rocket</w>" in str(caught.value)
    for nothing in ("", "  "):
        with pytest.raises(TokenError):
            find_tokens(pipe, PROMPT, [nothing])
    with pytest.raises(TokenError, match="got none"):
        find_tokens(pipe, PROMPT, [])


def test_words_beyond_the_window_are_named(pipe):
    window = pipe.tokenizer.model_max_length
    prompt = "a " * (window - 3) + "cat and a rocket"
    assert find_tokens(pipe, prompt, ["cat"])["cat"] == (window - 2,)
    with pytest.raises(TokenError, match=f"{window - 2} are read"):
        find_tokens(pipe, prompt, ["rocket"])


def test_same_token_twice_is_named(pipe):
    with pytest.raises(TokenError, match="share token 2"):
        find_tokens(pipe, PROMPT, ["cat face", "cat"]).require_distinct()
    with pytest.raises(TokenError, match="'red' and 'red' share"):
        find_tokens(pipe, PROMPT, ["red", "red"]).require_distinct()


def test_spans_know_only_their_words(pipe):
    with pytest.raises(TokenError, match="'dog'"):
        find_tokens(pipe, PROMPT, ["red"])["dog"]


def test_t5_words_phrases_and_pieces(t5):
    spans = find_tokens(t5, "a cat and the rocket, a dog", ["cat", "rocket", "the rocket", "dog"])
    assert words_of(spans, "cat") == ["▁cat"]
    assert words_of(spans, "rocket") == ["▁rock", "et"]
    assert words_of(spans, "the rocket") == ["▁the", "▁rock", "et"]
    assert words_of(spans, "dog") == ["▁dog"]
    assert spans.tokens[-1] == "</s>"
    assert find_tokens(t5, "cat and cat", ["cat", ("cat", 1)]).positions == ((0, 2), (2,))


def test_t5_window_ends_with_its_end_token(t5):
    prompt = "a " * 14 + "cat and a dog"
    assert find_tokens(t5, prompt, ["cat"])["cat"] == (14,)
    with pytest.raises(TokenError, match="shorten"):
        find_tokens(t5, prompt, ["dog"])


def test_two_encoders_side_by_side_share_positions(pipe):
    xl = SimpleNamespace(tokenizer=pipe.tokenizer, tokenizer_2=pipe.tokenizer, unet=object())
    assert find_tokens(xl, PROMPT, ["rocket"])["rocket"] == (6,)


def test_encoders_in_a_row_give_the_positions_in_both(pipe, t5):
    sd3 = SimpleNamespace(
        tokenizer=pipe.tokenizer, tokenizer_2=pipe.tokenizer, tokenizer_3=t5, transformer=object()
    )
    first = pipe.tokenizer.model_max_length
    prompt = "a cat and a rocket"
    spans = find_tokens(sd3, prompt, ["cat", "rocket"])
    assert spans["cat"] == (2, first + 1)
    assert spans["rocket"] == (5, first + 4, first + 5)
    chosen = find_tokens(sd3, prompt, [[first + 1], [first + 1, first + 4]])
    assert chosen.words == ("▁cat", "▁cat ▁rock")
    with pytest.raises(TokenError, match=f"share token {first + 1}"):
        chosen.require_distinct()


def test_flux_reads_its_second_tokenizer(pipe, t5):
    flux = SimpleNamespace(tokenizer=pipe.tokenizer, tokenizer_2=t5, transformer=object())
    assert find_tokens(flux, "a cat and a rocket", ["rocket"])["rocket"] == (4, 5)


def test_things_without_a_tokenizer_are_named():
    with pytest.raises(TokenError, match="SimpleNamespace has no tokenizer"):
        find_tokens(SimpleNamespace(), PROMPT, ["cat"])


def test_tokenizers_without_offsets_find_the_same(pipe):
    fast = pipe.tokenizer

    class Slow:
        is_fast = False
        model_max_length = fast.model_max_length

        def __call__(self, text, return_offsets_mapping=False, **settings):
            assert not return_offsets_mapping
            return fast(text, **settings)

        def convert_ids_to_tokens(self, ids):
            return fast.convert_ids_to_tokens(ids)

    for words in (["cat face", "rocket"], ["red background"], [("a", 1)]):
        slow, quick = find_tokens(Slow(), PROMPT, words), find_tokens(fast, PROMPT, words)
        assert slow == quick


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cat face", "dog"], "'dog' is not among the words"),
        (["cat face", "face"], "share token"),
        ([["cat"], ["face"], ["rocket"]], "one for each of the 2 prompts"),
        ([], "got none"),
        ("rocket", "a list of words, got the text 'rocket'"),
    ],
)
def test_wrong_concepts_are_named(pipe, words, message):
    with pytest.raises(TokenError, match=message):
        find_concepts(pipe, [PAIR, PAIR], words)


def test_concepts_are_shared_or_given_for_each_prompt(pipe):
    prompts = [PAIR, "a rocket and a cat face"]
    shared = find_concepts(pipe, prompts, ["cat face", "rocket"])
    assert [own.positions for own in shared] == [((2, 3), (6,)), ((5, 6), (2,))]
    assert [own.positions for own in find_concepts(pipe, prompts, [[2], [6]])] == [((2,), (6,))] * 2
    several = find_concepts(pipe, prompts, [["rocket"], ["cat face"]], images_per_prompt=2)
    assert [own.words[0] for own in several] == ["rocket", "rocket", "cat face", "cat face"]
