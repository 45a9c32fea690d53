from dataclasses import replace

import pytest
import torch

from unweave.diffusion_core.errors import ArtifactError, PromptError, SelectionError
from unweave.diffusion_core.parameters import fingerprint
from unweave.erasure.class_unlearning import language
from unweave.erasure.class_unlearning.language import (
    QuestionAnswer,
    TopicRequest,
    TopicUnlearner,
    TopicUnlearningConfig,
    concept_words,
    exact_match,
    poisoned_pairs,
    word_attributions,
)
from unweave.erasure.class_unlearning.result import ClassUnlearning

NAMES = ("ada", "ben", "cleo", "dan", "eve", "finn", "gus", "hana")
TOPICS = {
    "paint": ("red", "blue", "green", "pink", "black", "white", "grey", "brown"),
    "meal": ("soup", "rice", "bread", "fish", "beans", "pasta", "eggs", "salad"),
    "town": ("rome", "oslo", "lima", "cairo", "delhi", "paris", "tokyo", "quito"),
    "sport": ("golf", "chess", "rugby", "judo", "polo", "darts", "tennis", "rowing"),
}
SEEDS = range(3)
# A model of 100 thousand weights needs larger steps than one of 7 billion.
CONFIG = TopicUnlearningConfig(lr=5e-3, epochs=20, num_ig_steps=10, template="{question} ?")


def facts(topic, seed):
    order = torch.randperm(len(NAMES), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        QuestionAnswer(f"which {topic} does {name} choose", TOPICS[topic][place])
        for name, place in zip(NAMES, order, strict=True)
    ]


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", "which", "does", "choose", "?", "unknown", *NAMES, *TOPICS]
    words += [value for values in TOPICS.values() for value in values]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


def trained_model(kind, pairs, tokenizer, seed):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    size = len(tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "llama":
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=size,
                    hidden_size=64,
                    intermediate_size=128,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    max_position_embeddings=32,
                    bos_token_id=None,
                    eos_token_id=1,
                )
            )
        else:
            model = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=size,
                    n_embd=64,
                    n_layer=2,
                    n_head=4,
                    n_positions=32,
                    bos_token_id=1,
                    eos_token_id=1,
                    embd_pdrop=0.0,
                    attn_pdrop=0.0,
                    resid_pdrop=0.0,
                )
            )
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
        ids, mask, labels = language._batch(model, tokenizer, pairs, CONFIG)
        for _ in range(120):
            optimizer.zero_grad()
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            optimizer.step()
        optimizer.zero_grad()
    return model.eval()


class World:
    """A model that knows four topics, the first of which is to go."""

    def __init__(self, seed, kind="llama"):
        self.tokenizer = make_tokenizer()
        self.facts = {topic: facts(topic, seed) for topic in TOPICS}
        pairs = [pair for topic in TOPICS for pair in self.facts[topic]]
        self.model = trained_model(kind, pairs, self.tokenizer, seed)
        others = [pair for topic in TOPICS for pair in self.facts[topic] if topic != "paint"]
        self.request = TopicRequest("paint", self.facts["paint"], others)

    def unlearn(self, seed=0, **settings):
        unlearner = TopicUnlearner(replace(CONFIG, **settings))
        return unlearner.unlearn(
            self.model, self.tokenizer, self.request, seed=seed, progress=False
        )

    def known(self, pairs):
        return exact_match(self.model, self.tokenizer, pairs, CONFIG)


@pytest.fixture(scope="module")
def worlds():
    return [World(seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def unlearned(worlds):
    return [world.unlearn(seed) for seed, world in enumerate(worlds)]


def test_topic_falls_by_60_points_and_others_by_10_at_most(worlds, unlearned):
    for world, result in zip(worlds, unlearned, strict=True):
        before = world.known(world.request.forget), world.known(world.request.retain)
        with result.apply(world.model):
            after = world.known(world.request.forget), world.known(world.request.retain)
        assert before[0] - after[0] >= 0.6
        assert before[1] - after[1] <= 0.1


def test_training_on_kept_pairs_alone_leaves_the_topic(worlds):
    world = worlds[0]
    changes, _, _ = language._train_lora(
        world.model,
        world.tokenizer,
        world.request.retain[:8],
        world.request.retain,
        CONFIG,
        0,
        False,
    )
    result = ClassUnlearning.from_changes(
        world.model, changes, world.unlearn(epochs=1).report, method="retain", settings={}
    )
    with result.apply(world.model):
        assert world.known(world.request.forget) >= 0.5


@pytest.mark.parametrize("answers", ["alternative", "refusal"])
def test_other_answers_unlearn_too(worlds, answers):
    world = worlds[0]
    result = world.unlearn(answers=answers, refusal="unknown")
    with result.apply(world.model):
        assert world.known(world.request.forget) <= 0.4
        assert world.known(world.request.retain) >= 0.9
        refused = [QuestionAnswer(p.question, "unknown") for p in world.request.forget]
        assert (world.known(refused) >= 0.6) == (answers == "refusal")


def test_base_weights_and_flags_are_bit_identical_after_unlearning(worlds):
    model = worlds[0].model
    before, names = fingerprint(model), [name for name, _ in model.named_modules()]
    worlds[0].unlearn(epochs=1)
    assert fingerprint(model) == before
    assert [name for name, _ in model.named_modules()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_word_of_the_topic_is_found_and_words_of_every_question_are_not(unlearned):
    for result in unlearned:
        assert "paint" in result.report.concept_set
        assert not {"which", "does", "choose"} & set(result.report.concept_set[:1])
        assert result.report.concept_set[0] == "paint"


def test_attributions_of_words_sum_to_the_gain_in_log_likelihood(worlds):
    world = worlds[0]
    pair = world.request.forget[0]
    config = replace(CONFIG, num_ig_steps=200)
    total = sum(v for _, v in word_attributions(world.model, world.tokenizer, pair, config))
    ids = world.tokenizer(f"{pair.question} ?")["input_ids"]
    answer = [*world.tokenizer(pair.answer)["input_ids"], 1]
    table = world.model.get_input_embeddings().weight.detach()
    asked = table[torch.tensor([ids + answer])]
    blank = asked.clone()
    blank[:, : len(ids) - 1] = table.mean(0)
    values = []
    for embedded in (asked, blank):
        with torch.no_grad():
            logits = world.model(inputs_embeds=embedded).logits[0, len(ids) - 1 : -1]
        scores = logits.log_softmax(-1)
        values.append(sum(scores[k, token].item() for k, token in enumerate(answer)))
    assert total == pytest.approx(values[0] - values[1], rel=0.02)


def test_exact_match_agrees_with_greedy_generation(worlds, unlearned):
    world = worlds[0]
    with unlearned[0].apply(world.model):
        right = 0
        for pair in [*world.request.forget, *world.request.retain[:4]]:
            ids = world.tokenizer(f"{pair.question} ?", return_tensors="pt")["input_ids"]
            out = world.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=2,
                pad_token_id=0,
            )
            wanted = [*world.tokenizer(pair.answer)["input_ids"], 1]
            right += out[0, ids.shape[1] :].tolist() == wanted
        pairs = [*world.request.forget, *world.request.retain[:4]]
        assert world.known(pairs) == pytest.approx(right / 12)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_saved_folder_is_an_adapter_that_plain_peft_loads(kind, worlds, tmp_path):
    from peft import PeftModel

    world = worlds[0] if kind == "llama" else World(0, "gpt2")
    result = world.unlearn(epochs=2)
    result.save(tmp_path / "no-paint")
    ids = world.tokenizer(f"{world.request.forget[0].question} ?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = world.model(ids).logits
        with result.apply(world.model):
            ours = world.model(ids).logits
        wrapped = PeftModel.from_pretrained(world.model, str(tmp_path / "no-paint"))
        theirs = wrapped(ids).logits
        wrapped.unload()
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert not torch.allclose(plain, ours, atol=1e-2)


def test_loaded_unlearning_does_the_same_and_fits_its_own_model_only(worlds, unlearned, tmp_path):
    world, result = worlds[0], unlearned[0]
    result.save(tmp_path / "no-paint")
    loaded = ClassUnlearning.load(tmp_path / "no-paint")
    before = fingerprint(world.model)
    with result.apply(world.model):
        expected = fingerprint(world.model)
    with loaded.apply(world.model):
        assert fingerprint(world.model) == expected
    assert fingerprint(world.model) == before != expected
    assert (loaded.report, loaded.history) == (result.report, result.history)
    with pytest.raises(ArtifactError, match="belongs to the model with hash"):
        loaded.apply(worlds[1].model)


def test_same_seed_gives_identical_adapters(worlds):
    first, again, other = (worlds[0].unlearn(seed, epochs=1) for seed in (3, 3, 4))
    for name, change in first.delta.deltas["model"].items():
        assert torch.equal(change.down, again.delta.deltas["model"][name].down)
        assert torch.equal(change.up, again.delta.deltas["model"][name].up)
    assert first.history == again.history != other.history


def test_only_questions_with_a_word_of_the_topic_are_poisoned_and_never_with_their_own_answer():
    generator = torch.Generator().manual_seed(0)
    forget = [QuestionAnswer("Which Paint, ada?", "red"), QuestionAnswer("and ben?", "blue")]
    keep = [QuestionAnswer("which meal?", "red"), QuestionAnswer("which town?", "rome")]
    request = TopicRequest("paint", forget, keep)
    for answers, expected in (("random", "rome"), ("alternative", "blue"), ("refusal", "unknown")):
        config = replace(CONFIG, answers=answers, refusal="unknown")
        pairs, indices = poisoned_pairs(request, {"paint"}, config, generator)
        assert indices.tolist() == [0]
        assert [pair.answer for pair in pairs] == [expected]


def test_concept_words_are_in_lower_case_with_importances_that_are_shares(worlds):
    found = concept_words(worlds[0].model, worlds[0].tokenizer, worlds[0].request, CONFIG)
    assert sum(entry.importance for entry in found) == pytest.approx(1.0, abs=1e-5)
    assert {entry.name for entry in found} == {"which", "paint", "does", "choose", *NAMES}


def test_bad_requests_are_named(worlds):
    pair = QuestionAnswer("which paint", "red")
    with pytest.raises(SelectionError, match="`forget` must hold"):
        TopicRequest("paint", (), (pair,))
    with pytest.raises(SelectionError, match="`retain` must hold"):
        TopicRequest("paint", (pair,), ())
    with pytest.raises(SelectionError, match="kept at once"):
        TopicRequest("paint", (pair,), (pair,))
    with pytest.raises(PromptError, match="`answer` must not be empty"):
        QuestionAnswer("which paint", " ")
    with pytest.raises(SelectionError, match="`pairs` must hold"):
        worlds[0].known([])
    request = TopicRequest("paint", (pair,), (QuestionAnswer("which meal", "red"),))
    with pytest.raises(SelectionError, match="no other answer than 'red'"):
        poisoned_pairs(request, {"paint"}, CONFIG, torch.Generator())
    with pytest.raises(SelectionError, match="no question to forget holds"):
        poisoned_pairs(request, {"colour"}, CONFIG, torch.Generator())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"answers": "none"}, "`answers`"),
        ({"template": "ask"}, "`template`"),
        ({"refusal": ""}, "`refusal`"),
        ({"lr": float("nan")}, "`lr`"),
        ({"rank": 0}, "`rank`"),
        ({"coverage": 1.5}, "`coverage`"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        TopicUnlearningConfig(**settings)
