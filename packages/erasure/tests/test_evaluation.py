"""Evaluation compares the same images before and after, and never leaves a trace in the pipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave.diffusion_core.errors import PromptError, UnweaveError
from unweave.diffusion_core.pipelines import base_model_hash
from unweave.diffusion_core.testing import tiny_pipeline
from unweave.diffusion_core.weight_delta import DeltaMeta, WeightDelta
from unweave.erasure.evaluation import (
    NEUTRAL_PROMPTS,
    evaluate_erasure,
    pooled_pixels,
    recogniser_judge,
)
from unweave.erasure.evaluation_result import ErasureEvaluation, Rate
from unweave.erasure.protocol import Erasure, ErasureRequest

Judge = Callable[[Tensor, str], Tensor]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline()


@pytest.fixture(autouse=True)
def pipe_stays_as_it_was(pipe: Any) -> Iterator[None]:
    weights = copied_weights(pipe)
    yield
    for name, value in copied_weights(pipe).items():
        assert torch.equal(value, weights[name]), name


@pytest.fixture
def erasure(pipe: Any) -> Erasure:
    return make_erasure(pipe, size=0.3, seed=0)


def make_erasure(pipe: Any, size: float, seed: int) -> Erasure:
    name = "conv_out.weight"
    weight = dict(pipe.unet.named_parameters())[name]
    generator = torch.Generator().manual_seed(seed)
    change = size * torch.randn(weight.shape, generator=generator)
    meta = DeltaMeta(base_hash=base_model_hash(pipe), method="few-shot")
    return Erasure(WeightDelta({"unet": {name: change}}, meta), ErasureRequest("cat"))


def copied_weights(pipe: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in pipe.unet.named_parameters()}


def judge_that_knows(pipe: Any, erasure: Erasure, loses: tuple[str, ...] = ("cat",)) -> Judge:
    """Sees every concept, except those of `loses` while the erasure is applied."""

    def judge(images: Tensor, concept: str) -> Tensor:
        gone = concept in loses and erasure.delta.is_applied(pipe)
        return torch.full((len(images),), not gone)

    return judge


def evaluate(pipe: Any, erasure: Erasure, judge: Judge, **changes: Any) -> ErasureEvaluation:
    settings: dict[str, Any] = {
        "target": "cat",
        "preserve": ("dog", "rocket"),
        "neutral_prompts": ("a house", "a tree"),
        "seeds": range(3),
        "num_inference_steps": 2,
    }
    return evaluate_erasure(pipe, erasure, judge, **{**settings, **changes})


def test_rates_before_and_after_are_those_of_the_judge(pipe: Any, erasure: Erasure) -> None:
    judge = judge_that_knows(pipe, erasure, loses=("cat", "rocket", "lion"))
    result = evaluate(pipe, erasure, judge, related=("lion",))
    assert result.target_rate.before == Rate(3, 3)
    assert result.target_rate.after == Rate(0, 3)
    assert result.target_rate.drop == 1
    assert [rate.drop for rate in result.preserved.values()] == [0, 1]
    assert result.related["lion"].after.value == 0
    assert result.mean_preserved_drop == pytest.approx(0.5)
    low, high = result.mean_preserved_drop_interval or (0, 0)
    assert 0 <= low < 0.5 < high <= 1


def test_a_rate_shows_its_wilson_interval() -> None:
    low, high = Rate(5, 10).interval
    assert (low, high) == (pytest.approx(0.236593, abs=1e-5), pytest.approx(0.763407, abs=1e-5))
    assert str(Rate(5, 10)) == "50 % [24, 76] (5/10)"


def test_before_and_after_use_the_same_seeds_and_only_the_weights_differ(
    pipe: Any, erasure: Erasure
) -> None:
    judge = judge_that_knows(pipe, erasure)
    result = evaluate(pipe, erasure, judge)
    assert not torch.equal(result.examples["dog"].before, result.examples["dog"].after)
    unchanged = evaluate(pipe, erasure, judge, strength=0.0)
    for pair in unchanged.examples.values():
        assert torch.equal(pair.before, pair.after)
    assert torch.equal(unchanged.examples["dog"].before, result.examples["dog"].before)


def test_drift_is_zero_without_change_and_grows_with_strength(pipe: Any, erasure: Erasure) -> None:
    judge = judge_that_knows(pipe, erasure)
    drifts = [
        evaluate(pipe, erasure, judge, strength=strength, preserve=()).drift_kid
        for strength in (0.0, 0.2, 1.0)
    ]
    assert drifts[0] == 0.0
    assert drifts[1] is not None and drifts[2] is not None
    assert 0 < drifts[1] < drifts[2]


def test_drift_uses_the_features_it_is_given(pipe: Any, erasure: Erasure) -> None:
    def constant(images: Tensor) -> Tensor:
        return torch.ones(len(images), 4)

    result = evaluate(pipe, erasure, judge_that_knows(pipe, erasure), features=constant)
    assert result.drift_kid == pytest.approx(0)
    assert result.settings["features"] == "constant"


def test_an_unapplied_erasure_stays_unapplied(pipe: Any, erasure: Erasure) -> None:
    evaluate(pipe, erasure, judge_that_knows(pipe, erasure))
    assert not erasure.delta.is_applied(pipe)


def test_an_applied_erasure_is_taken_out_for_before_and_put_back_bit_identical(
    pipe: Any, erasure: Erasure
) -> None:
    judge = judge_that_knows(pipe, erasure)
    expected = evaluate(pipe, erasure, judge)
    other = make_erasure(pipe, size=0.1, seed=1)
    with erasure.apply(pipe, strength=0.7), other.apply(pipe):
        found = copied_weights(pipe)
        evaluate(pipe, erasure, judge)
        assert erasure.delta.is_applied(pipe)
        for name, value in copied_weights(pipe).items():
            assert torch.equal(value, found[name]), name
    with erasure.apply(pipe, strength=0.7):
        result = evaluate(pipe, erasure, judge)
    assert torch.equal(result.examples["cat"].before, expected.examples["cat"].before)
    assert torch.equal(result.examples["cat"].after, expected.examples["cat"].after)


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("failing_call", [1, 5])
def test_an_exception_in_the_judge_leaves_the_pipe_as_it_was_found(
    pipe: Any, erasure: Erasure, applied: bool, failing_call: int
) -> None:
    calls = []

    def judge(images: Tensor, concept: str) -> Tensor:
        calls.append(concept)
        if len(calls) == failing_call:
            raise KeyboardInterrupt
        return torch.ones(len(images), dtype=torch.bool)

    if applied:
        erasure.apply(pipe, strength=0.5)
    found = copied_weights(pipe)
    with pytest.raises(KeyboardInterrupt):
        evaluate(pipe, erasure, judge)
    assert erasure.delta.is_applied(pipe) == applied
    for name, value in copied_weights(pipe).items():
        assert torch.equal(value, found[name]), name
    if applied:
        erasure.revert(pipe)


def test_prompts_combine_templates_and_styles_with_every_seed(pipe: Any, erasure: Erasure) -> None:
    result = evaluate(
        pipe,
        erasure,
        judge_that_knows(pipe, erasure),
        preserve=(),
        templates=("a {}", "a {} at night"),
        styles=("noto", "fluent"),
        seeds=(4,),
        num_examples=3,
    )
    assert result.settings["prompts"]["cat"] == [
        "a cat, noto style",
        "a cat, fluent style",
        "a cat at night, noto style",
        "a cat at night, fluent style",
    ]
    assert result.target_rate.before.total == 4
    assert result.examples["cat"].labels[0] == "a cat, noto style (seed 4)"
    assert len(result.examples["cat"].before) == len(result.examples["cat"].labels) == 3
    assert result.mean_preserved_drop is None


def test_the_neutral_examples_show_different_prompts(pipe: Any, erasure: Erasure) -> None:
    examples = evaluate(pipe, erasure, judge_that_knows(pipe, erasure)).examples["neutral"]
    assert examples.labels == ("a house", "a tree")
    assert len(examples.before) == 2
    assert not torch.equal(examples.before[0], examples.before[1])


def test_without_neutral_prompts_there_is_no_drift(pipe: Any, erasure: Erasure) -> None:
    result = evaluate(pipe, erasure, judge_that_knows(pipe, erasure), neutral_prompts=())
    assert result.drift_kid is None
    assert "neutral" not in result.examples
    json.loads(result.to_json())


def test_the_default_neutral_prompts_leave_out_the_target(pipe: Any, erasure: Erasure) -> None:
    result = evaluate(
        pipe,
        erasure,
        judge_that_knows(pipe, erasure),
        target="car",
        preserve=(),
        seeds=(0,),
        num_inference_steps=1,
        neutral_prompts=NEUTRAL_PROMPTS,
    )
    assert set(NEUTRAL_PROMPTS) - set(result.settings["neutral_prompts"]) == {"a car"}


def test_json_holds_rates_intervals_and_settings(pipe: Any, erasure: Erasure) -> None:
    numbers = json.loads(evaluate(pipe, erasure, judge_that_knows(pipe, erasure)).to_json())
    assert numbers["target"]["cat"]["before"]["rate"] == 1
    assert numbers["target"]["cat"]["after"]["interval"][0] == 0
    assert set(numbers["preserved"]) == {"dog", "rocket"}
    assert numbers["settings"]["method"] == "few-shot"
    assert numbers["settings"]["seeds"] == [0, 1, 2]


def test_the_report_is_one_page_with_before_and_after_images(
    pipe: Any, erasure: Erasure, tmp_path: Any
) -> None:
    result = evaluate(pipe, erasure, judge_that_knows(pipe, erasure))
    path = result.to_report(tmp_path / "report")
    page = path.read_text(encoding="utf-8")
    # Three images of each of three concepts and two neutral ones, each before and after.
    assert page.count('src="data:image/png;base64,') == 2 * (3 * 3 + 2)
    for text in ("cat: before", "cat: after", "0 % [0, 56] (0/3)", "Preserved concepts lose"):
        assert text in page
    assert json.loads((path.parent / "numbers.json").read_text()) == result.to_dict()
    assert (path.parent / "grid.png").is_file()


def test_the_report_warns_when_the_judge_misses_the_target_before(
    pipe: Any, erasure: Erasure, tmp_path: Any
) -> None:
    result = evaluate(pipe, erasure, lambda images, _: torch.zeros(len(images), dtype=torch.bool))
    assert "check the prompts and the judge" in result.to_report(tmp_path).read_text()


def test_the_example_grid_shows_before_above_after(pipe: Any, erasure: Erasure) -> None:
    result = evaluate(pipe, erasure, judge_that_knows(pipe, erasure))
    assert result.example_grid("cat", scale=1).size == (3 * 34 + 2, 2 * 34 + 2)
    with pytest.raises(UnweaveError, match=r"no examples of 'lion'; .*cat, dog"):
        result.example_grid("lion")


def test_two_runs_give_equal_numbers(pipe: Any, erasure: Erasure) -> None:
    judge = judge_that_knows(pipe, erasure)
    first, second = evaluate(pipe, erasure, judge), evaluate(pipe, erasure, judge)
    assert first.to_json() == second.to_json()


@pytest.mark.parametrize(
    "answer", [torch.ones(2, dtype=torch.bool), torch.ones(3), [True, True, True]]
)
def test_a_judge_of_the_wrong_shape_or_type_is_refused(
    pipe: Any, erasure: Erasure, answer: Any
) -> None:
    with pytest.raises(UnweaveError, match=r"`judge` must return a bool Tensor of shape \(3,\)"):
        evaluate(pipe, erasure, lambda images, concept: answer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preserve": ("cat",)}, "'cat' is given more than once"),
        ({"preserve": "dog"}, "`preserve` must be a sequence"),
        ({"preserve": (" ",)}, "every concept needs a name"),
        ({"preserve": ("neutral",)}, "call the concept differently"),
        ({"templates": ("a cat",)}, "`template` must contain"),
        ({"templates": "a {}"}, "`templates` must be a sequence"),
        ({"neutral_prompts": ("a Cat in a house",)}, "must not name the target 'cat'"),
    ],
)
def test_unusable_prompts_are_refused_before_any_image_is_made(
    pipe: Any, erasure: Erasure, changes: dict[str, Any], message: str
) -> None:
    def judge(images: Tensor, concept: str) -> Tensor:
        raise AssertionError("no image should be judged")

    with pytest.raises(PromptError, match=message):
        evaluate(pipe, erasure, judge, **changes)


def test_no_seeds_are_refused(pipe: Any, erasure: Erasure) -> None:
    with pytest.raises(UnweaveError, match="at least one seed"):
        evaluate(pipe, erasure, judge_that_knows(pipe, erasure), seeds=())


def test_a_recogniser_becomes_a_judge_of_its_concepts() -> None:
    recogniser = SimpleNamespace(
        concepts=("cat", "dog"),
        detect=lambda images: torch.tensor([[True, False]]).expand(len(images), 2),
    )
    judge = recogniser_judge(recogniser)
    images = torch.zeros(3, 3, 8, 8)
    assert judge(images, "cat").tolist() == [True] * 3
    assert judge(images, "dog").tolist() == [False] * 3
    with pytest.raises(UnweaveError, match="does not know 'lion'; it knows cat, dog"):
        judge(images, "lion")


def test_pooled_pixels_are_the_mean_colours_of_an_8_by_8_grid() -> None:
    images = torch.rand(2, 3, 32, 32)
    features = pooled_pixels(images)
    assert features.shape == (2, 192)
    torch.testing.assert_close(features[0, 0], images[0, 0, :4, :4].mean())
