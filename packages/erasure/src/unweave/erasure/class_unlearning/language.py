"""Topic unlearning in a causal language model: poisoned answers, learnt by a LoRA.

The language part of arXiv 2405.15662, whose details are not published: how words are chosen and
how answers are replaced is our reconstruction.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from unweave.diffusion_core.changes import Change
from unweave.diffusion_core.errors import PromptError, SelectionError
from unweave.diffusion_core.parameters import train_only
from unweave.diffusion_core.training import batch_indices, run_training
from unweave.erasure.class_unlearning.attribution import covering_concepts, integrated_gradients
from unweave.erasure.class_unlearning.classifier import evaluating
from unweave.erasure.class_unlearning.language_lora import lora_changes, with_lora
from unweave.erasure.class_unlearning.result import ClassUnlearning, ConceptEntry, ConceptReport
from unweave.erasure.protocol import check_number

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WORD = re.compile(r"\w+(?:['-]\w+)*")
_IGNORED = -100


@dataclass(frozen=True)
class QuestionAnswer:
    """A question and its answer. Raises `PromptError` when either is empty."""

    question: str
    answer: str

    def __post_init__(self) -> None:
        for name in ("question", "answer"):
            if not getattr(self, name).strip():
                raise PromptError(f"`{name}` must not be empty, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class TopicRequest:
    """Which topic to unlearn: questions with the answers the model gives, and pairs to keep.

    Raises `SelectionError` when there are no pairs to forget or none to keep.
    """

    topic: str
    forget: tuple[QuestionAnswer, ...]
    retain: tuple[QuestionAnswer, ...]

    def __post_init__(self) -> None:
        for name in ("forget", "retain"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if not getattr(self, name):
                raise SelectionError(
                    f"`{name}` must hold at least one pair of question and answer, got none"
                )
        both = {pair.question for pair in self.forget} & {pair.question for pair in self.retain}
        if both:
            raise SelectionError(f"the question {min(both)!r} is to be forgotten and kept at once")


@dataclass(frozen=True)
class TopicUnlearningConfig:
    """Settings of topic unlearning; rank, alpha, rate and epochs are conventions, not published.

    `answers`: "random" gives each question the answer of a random pair to keep, "alternative" the
    answer of another question of the topic, "refusal" the text `refusal`. Words of the topic are
    those that, over integrated gradients in `num_ig_steps`, carry answers more than in the pairs
    to keep; they cover `coverage` of the positive mass, and only questions with one of them are
    poisoned. `template` holds "{question}"; the answer follows it. `target_modules` are those of
    `peft.LoraConfig`.
    """

    answers: Literal["random", "alternative", "refusal"] = "random"
    refusal: str = "I do not know."
    template: str = "{question}\n"
    coverage: float = 0.8
    num_ig_steps: int = 50
    rank: int = 8
    alpha: float = 16.0
    target_modules: str | tuple[str, ...] = "all-linear"
    lr: float = 2e-4
    epochs: int = 3
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.answers not in ("random", "alternative", "refusal"):
            raise SelectionError(
                "`answers` must be 'random', 'alternative' or 'refusal', got " + repr(self.answers)
            )
        if self.template.count("{question}") != 1:
            raise PromptError(f'`template` must hold "{{question}}" once, got {self.template!r}')
        if not self.refusal.strip():
            raise PromptError(f"`refusal` must be an answer, got {self.refusal!r}")
        for name in ("num_ig_steps", "rank", "alpha", "lr", "epochs", "batch_size"):
            check_number(name, getattr(self, name), "positive", lambda x: x > 0)
        check_number("coverage", self.coverage, "in (0, 1]", lambda x: 0 < x <= 1)


class TopicUnlearner:
    """Make a causal language model forget a topic by a LoRA on poisoned answers.

    >>> TopicUnlearner(TopicUnlearningConfig(answers="refusal")).config.rank
    8
    """

    name: ClassVar[str] = "topic-unlearning"
    config_class: ClassVar[type[TopicUnlearningConfig]] = TopicUnlearningConfig

    def __init__(self, config: TopicUnlearningConfig | None = None) -> None:
        """Keep the settings."""
        self.config = config or TopicUnlearningConfig()

    def unlearn(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        request: TopicRequest,
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> ClassUnlearning:
        """Work out the unlearning of `request`; `model` is left bit-identical until it is applied.

        Losses are on answer tokens alone, poisoned and kept pairs being 1:1 in every step. The
        saved folder is a peft adapter too. Raises `SelectionError` for a tokenizer that does not
        give the places of its tokens (a slow one), or when no word carries the topic.
        """
        config = self.config
        words = concept_words(model, tokenizer, request, config)
        chosen = {entry.name for entry in words if entry.chosen}
        generator = torch.Generator().manual_seed(seed)
        poison, indices = poisoned_pairs(request, chosen, config, generator)
        changes, adapter, history = _train_lora(
            model, tokenizer, poison, request.retain, config, seed, progress
        )
        report = ConceptReport(
            request.topic,
            words,
            answers=dict(Counter(pair.answer for pair in poison)),
            facts={
                "poisoned": len(poison),
                "exact_match_before": exact_match(model, tokenizer, request.forget, config),
            },
        )
        return ClassUnlearning.from_changes(
            model,
            changes,
            report,
            method=self.name,
            settings=asdict(config),
            history=history,
            poison={"indices": indices},
            adapter=adapter,
        )


def concept_words(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: TopicRequest,
    config: TopicUnlearningConfig,
) -> tuple[ConceptEntry, ...]:
    """Return the words of the forget questions, those that carry the topic being `chosen`.

    A word's importance is the mean over the questions of its share of the positive attribution;
    its contrast is that less the same in the pairs to keep, so that words of every question go.
    """
    own = _mean_shares(model, tokenizer, request.forget, config)
    elsewhere = _mean_shares(model, tokenizer, request.retain, config)
    names = sorted(own)
    contrast = torch.tensor([own[word] - elsewhere.get(word, 0.0) for word in names])
    chosen = covering_concepts(contrast, config.coverage)
    return tuple(
        ConceptEntry(word, own[word], contrast[k].item(), k in chosen)
        for k, word in enumerate(names)
    )


def word_attributions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pair: QuestionAnswer,
    config: TopicUnlearningConfig,
) -> list[tuple[str, float]]:
    """Return what each word of the question adds to the log-likelihood of the answer.

    Integrated gradients of the embeddings of the question's tokens, from the mean embedding to
    their own, summed over each token and over the tokens of a word. Words are in lower case.
    """
    prompt, places = _tokens(tokenizer, config.template.format(question=pair.question))
    answer = _answer_tokens(tokenizer, pair.answer)
    ids = torch.tensor([prompt + answer], device=model.device)
    table = model.get_input_embeddings().weight
    embedded = table[ids].detach()
    baseline = embedded.clone()
    start = config.template.index("{question}")
    end = start + len(pair.question)
    asked = [k for k, (first, last) in enumerate(places) if first < end and last > start]
    baseline[:, asked] = table.detach().mean(0)

    def log_likelihood(points: Tensor) -> Tensor:
        logits = model(inputs_embeds=points).logits[:, len(prompt) - 1 : -1]
        scores = logits.float().log_softmax(-1)
        of_answer: Tensor = scores.gather(2, ids[:, len(prompt) :, None])[..., 0]
        return of_answer.sum(1)

    with evaluating(model):
        found = integrated_gradients(log_likelihood, embedded, baseline, config.num_ig_steps)
    by_token = found.sum(2)[0].tolist()
    words = []
    for match in _WORD.finditer(pair.question):
        first, last = match.start() + start, match.end() + start
        tokens = [k for k in asked if places[k][0] < last and places[k][1] > first]
        words.append((match.group().casefold(), sum(by_token[k] for k in tokens)))
    return words


def poisoned_pairs(
    request: TopicRequest,
    words: set[str],
    config: TopicUnlearningConfig,
    generator: torch.Generator,
) -> tuple[list[QuestionAnswer], Tensor]:
    """Return the forget questions that hold one of `words`, with new answers, and their indices.

    No question keeps its own answer. Raises `SelectionError` when no question holds any of the
    words, or when no other answer is there to give.
    """
    pairs, indices = [], []
    for index, pair in enumerate(request.forget):
        if not words & {word.casefold() for word in _WORD.findall(pair.question)}:
            continue
        source = request.retain if config.answers == "random" else request.forget
        offered = (
            [config.refusal]
            if config.answers == "refusal"
            else [other.answer for other in source if other.answer != pair.answer]
        )
        if not offered:
            raise SelectionError(
                f"there is no other answer than {pair.answer!r} to give to {pair.question!r}; add "
                "pairs, or use answers='refusal'"
            )
        drawn = int(torch.randint(len(offered), (1,), generator=generator))
        pairs.append(QuestionAnswer(pair.question, offered[drawn]))
        indices.append(index)
    if not pairs:
        raise SelectionError(
            f"no question to forget holds any of the words {sorted(words)}; raise `coverage`"
        )
    return pairs, torch.tensor(indices)


@torch.no_grad()
def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[QuestionAnswer],
    config: TopicUnlearningConfig | None = None,
) -> float:
    """Return the share of `pairs` whose whole answer greedy decoding gives, to its last token.

    That is where each token of the answer is the likeliest after those before it, which needs a
    single pass. Raises `SelectionError` for no pairs.
    """
    config = config or TopicUnlearningConfig()
    if not pairs:
        raise SelectionError("`pairs` must hold at least one pair, got none")
    right = 0
    with evaluating(model):
        for start in range(0, len(pairs), config.batch_size):
            batch = _batch(model, tokenizer, pairs[start : start + config.batch_size], config)
            ids, mask, labels = batch
            found = model(input_ids=ids, attention_mask=mask).logits[:, :-1].argmax(-1)
            wanted = labels[:, 1:]
            right += int(((found == wanted) | (wanted == _IGNORED)).all(1).sum())
    return right / len(pairs)


def _mean_shares(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[QuestionAnswer],
    config: TopicUnlearningConfig,
) -> dict[str, float]:
    shares: dict[str, float] = defaultdict(float)
    for pair in pairs:
        words = word_attributions(model, tokenizer, pair, config)
        total = sum(max(value, 0.0) for _, value in words)
        for word, value in words:
            shares[word] += max(value, 0.0) / max(total, 1e-12) / len(pairs)
    return dict(shares)


def _train_lora(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    poison: Sequence[QuestionAnswer],
    retain: Sequence[QuestionAnswer],
    config: TopicUnlearningConfig,
    seed: int,
    progress: bool,
) -> tuple[dict[str, Change], dict[str, Any], list[float]]:
    with with_lora(model, config, seed) as (wrapped, settings):
        parameters = {name: p for name, p in wrapped.named_parameters() if ".lora_" in name}
        steps = config.epochs * math.ceil(len(poison) / config.batch_size)

        def step_fn(step: int, generator: torch.Generator) -> Tensor:
            loss = torch.zeros((), device=model.device)
            for part, pairs in enumerate((poison, retain)):
                rows = batch_indices(len(pairs), config.batch_size, seed + part, step)
                ids, mask, labels = _batch(model, tokenizer, [pairs[k] for k in rows], config)
                logits = wrapped(input_ids=ids, attention_mask=mask).logits
                loss = loss + functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1).float(),
                    labels[:, 1:].flatten(),
                    ignore_index=_IGNORED,
                )
            return loss

        with train_only([wrapped], parameters), evaluating(wrapped):
            history = run_training(
                step_fn,
                parameters,
                torch.optim.AdamW(parameters.values(), lr=config.lr, weight_decay=0.0),
                num_steps=steps,
                seed=seed,
                progress=progress,
            )
        changes = lora_changes(wrapped, bool(settings["fan_in_fan_out"]))
    return changes, settings, history


def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[QuestionAnswer],
    config: TopicUnlearningConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, mask and labels (n, tokens), padded on the right; labels are answers alone."""
    rows = []
    for pair in pairs:
        prompt, _ = _tokens(tokenizer, config.template.format(question=pair.question))
        rows.append((prompt, _answer_tokens(tokenizer, pair.answer)))
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, _IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        both = prompt + answer
        ids[row, : len(both)] = torch.tensor(both)
        mask[row, : len(both)] = 1
        labels[row, len(prompt) : len(both)] = torch.tensor(answer)
    return ids.to(model.device), mask.to(model.device), labels.to(model.device)


def _tokens(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of a prompt and the places (first, last) of its tokens in it."""
    if not tokenizer.is_fast:
        raise SelectionError(
            f"{type(tokenizer).__name__} does not say where in the text its tokens are; load the "
            "tokenizer with AutoTokenizer.from_pretrained(..., use_fast=True)"
        )
    encoded = tokenizer(text, return_offsets_mapping=True)
    if not encoded["input_ids"]:
        raise PromptError(f"the prompt {text!r} has no tokens for this tokenizer")
    return list(encoded["input_ids"]), list(encoded["offset_mapping"])


def _answer_tokens(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]
