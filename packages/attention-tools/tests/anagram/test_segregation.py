"""Anti-segregation: the loss by hand, its steps on a tiny U-Net, and where concepts stand."""

from __future__ import annotations

import pytest
import torch

from unweave.attention_tools import MapError
from unweave.attention_tools.segregation import (
    anti_segregation_loss,
    concept_maps,
    concept_reader,
    concept_spans,
    desegregated,
    last_word,
)
from unweave.attention_tools.views import get_view

PROMPTS = ("a painting of a red fox", "a painting of an old tree")
SIDE = 32


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_loss_of_equal_disjoint_and_wanted_maps():
    equal = torch.rand(1, 4, 4, generator=seeded(0)).expand(2, 4, 4)
    assert float(anti_segregation_loss(equal)) == pytest.approx(0.05)
    apart = torch.tensor([[[1.0, 0.0]], [[0.0, 3.0]]])
    assert float(anti_segregation_loss(apart)) == pytest.approx(0.45)
    wanted = torch.tensor([[[0.9, 0.1]], [[1.0, 0.0]]])
    assert float(anti_segregation_loss(wanted)) == pytest.approx(0, abs=1e-6)
    three = torch.eye(3).reshape(3, 1, 3)
    assert float(anti_segregation_loss(three)) == pytest.approx(0.40)


def test_gradient_changes_sign_across_the_target():
    def slope(share: float) -> float:
        at = torch.tensor(share, dtype=torch.float64, requires_grad=True)
        maps = torch.stack([torch.stack([at, 1 - at]), torch.tensor([1.0, 0.0]).double()])
        anti_segregation_loss(maps[:, None]).backward()
        return float(at.grad)

    assert slope(0.85) < 0 < slope(0.95)


def test_loss_agrees_with_finite_differences():
    maps = torch.rand(2, 3, 4, 4, generator=seeded(0), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(anti_segregation_loss, maps)


def test_one_map_is_refused():
    with pytest.raises(MapError, match="two views or more"):
        anti_segregation_loss(torch.ones(1, 4, 4))


@pytest.fixture(scope="module")
def overlaps(pixel_pipe):
    """The loss of x under the tiny pipeline, as a function that counts for gradients."""
    views = [get_view("identity"), get_view("rotate_cw")]
    reader = concept_reader(pixel_pipe, PROMPTS, ("fox", "tree"), (SIDE // 2, SIDE // 2))
    text, _ = pixel_pipe.encode_prompt(list(PROMPTS), False, device="cpu")

    def maps(x):
        return concept_maps(pixel_pipe.unet, x, torch.tensor(500), text, views, reader)

    return maps


def test_one_step_is_that_of_gradient_descent():
    x = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    moved, before = desegregated(x, lambda x: x.square().sum(1), 0.1)
    torch.testing.assert_close(moved, 0.8 * x)
    torch.testing.assert_close(before, torch.tensor([5.0, 9.25]).double())
    twice, _ = desegregated(x, lambda x: x.square().sum(1), 0.1, inner_steps=2)
    torch.testing.assert_close(twice, 0.64 * x)


@torch.no_grad()
def test_one_step_lowers_the_loss(overlaps):
    def loss(x):
        return anti_segregation_loss(overlaps(x))

    x = torch.randn(20, 3, SIDE, SIDE, generator=seeded(0), dtype=torch.float64)
    moved, before = desegregated(x, loss, 5.0)
    assert (loss(moved) < before).sum() >= 18


@torch.no_grad()
def test_ten_steps_close_a_fifth_of_the_gap_of_segregated_maps(overlaps):
    def loss(x):
        return anti_segregation_loss(overlaps(x))

    x = torch.randn(4, 3, SIDE, SIDE, generator=seeded(0), dtype=torch.float64)
    segregated, overlap = desegregated(x, lambda x: 0.45 - loss(x), 20.0, 12)
    moved, before = desegregated(segregated, loss, 5.0, 10)
    after = loss(moved)
    assert (before > 0.45 - overlap).all()
    assert (after < before).all()
    assert after.mean() <= 0.8 * before.mean()


def test_spans_of_capitals_punctuation_and_pieces(pixel_pipe, tokenizer):
    prompts = ["A painting of a SUNFLOWER!", "a Red fox, painting", "a old tree."]
    spans = concept_spans(pixel_pipe, prompts, ["Sunflower", "red FOX", last_word(prompts[2])])
    texts = []
    for prompt, span in zip(prompts, spans, strict=True):
        ids = tokenizer(prompt.lower()).input_ids
        texts.append(tokenizer.decode([ids[at] for at in span]).strip(" ,.!"))
    assert texts == ["sunflower", "red fox", "tree"]
    assert len(spans[0]) > 1
