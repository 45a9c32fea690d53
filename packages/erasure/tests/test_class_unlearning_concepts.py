import pytest
import torch

from unweave.diffusion_core.errors import NonFiniteError, SelectionError
from unweave.erasure.class_unlearning.attribution import (
    attribution_scores,
    class_importance,
    concept_attributions,
    contrast,
    covering_concepts,
    integrated_gradients,
)
from unweave.erasure.class_unlearning.bottleneck import ConceptBottleneck, fit_bottleneck
from unweave.erasure.class_unlearning.concept_bank import (
    ConceptBank,
    ConceptSamples,
    fit_concept_bank,
    text_concept_bank,
)
from unweave.erasure.class_unlearning.measures import (
    ClassScores,
    kl_from_retrained,
    probe_accuracy,
    relearning_steps,
    share_called_non_member,
)
from unweave.erasure.class_unlearning.poisoning import (
    blended_with_retain,
    counterfactual_labels,
    highest,
    random_labels,
    targeted_label,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def bank():
    return ConceptBank(("a", "b", "c"), 2 * torch.eye(3, 5), torch.tensor([0.0, 1.0, -2.0]))


@pytest.fixture
def bottleneck(bank):
    return ConceptBottleneck(bank, normal(4, 3), normal(4, seed=1), torch.ones(3))


def test_margins_are_distances_from_the_hyperplane(bank):
    features = torch.tensor([[1.0, 2.0, 3.0, 9.0, 9.0]])
    assert bank.margins(features).tolist() == [[1.0, 2.5, 2.0]]


def test_svm_finds_the_direction_that_separates_and_drops_what_is_noise():
    positive, negative = normal(60, 4), normal(60, 4, seed=1)
    positive[:, 2] += 6
    noise = ConceptSamples(normal(60, 4, seed=2), normal(60, 4, seed=3))
    other = ConceptSamples(negative - 6 * torch.eye(4)[0], negative + 6 * torch.eye(4)[0])
    bank = fit_concept_bank(
        {"real": ConceptSamples(positive, negative), "noise": noise, "other": other}
    )
    assert bank.names == ("real", "other")
    assert list(bank.dropped) == ["noise"] and bank.dropped["noise"] < 0.7
    direction = bank.weights[0] / bank.weights[0].norm()
    assert direction[2] > 0.9
    quality = bank.quality[0]
    assert quality.accuracy >= 0.98 and quality.svm_c in (0.001, 0.01, 0.1, 1.0, 10.0)
    found = bank.margins(positive)[:, 0]
    assert quality.margins["positive_mean"] == pytest.approx(found.mean().item(), abs=1e-4)
    assert quality.margins["positive_max"] == pytest.approx(found.max().item(), abs=1e-4)
    assert quality.margins["negative_count"] == 60


def test_text_bank_has_no_intercepts_and_no_accuracies():
    bank = text_concept_bank(["round", "red"], torch.eye(2))
    assert bank.intercepts.tolist() == [0.0, 0.0] and bank.quality == ()


def test_midpoint_rule_agrees_with_a_fine_integral():
    def function(points):
        return points.pow(3).sum(1) + points.prod(1)

    inputs, baseline = normal(5, 3).double(), normal(3, seed=1).double()
    fine = torch.zeros_like(inputs)
    for step in range(1000):
        point = (baseline + (step + 0.5) / 1000 * (inputs - baseline)).requires_grad_()
        (gradient,) = torch.autograd.grad(function(point).sum(), point)
        fine += gradient / 1000
    found = integrated_gradients(function, inputs, baseline, 50)
    torch.testing.assert_close(found, (inputs - baseline) * fine, rtol=0, atol=2e-3)


def test_attributions_of_the_probability_are_complete_within_0_01(bottleneck):
    margins, baseline = 2 * normal(50, 3, seed=2), normal(3, seed=3)
    for index in range(4):
        found = concept_attributions(bottleneck, margins, baseline, index).sum(1)
        before = bottleneck.logits(baseline[None]).softmax(1)[:, index]
        expected = bottleneck.logits(margins).softmax(1)[:, index] - before
        assert (found - expected).abs().max() < 0.01


def test_attributions_of_the_logit_are_exact_and_agree_with_the_general_rule(bottleneck):
    margins, baseline = normal(20, 3, seed=2), normal(3, seed=3)
    found = concept_attributions(bottleneck, margins, baseline, 1, of="logit")
    gain = bottleneck.logits(margins)[:, 1] - bottleneck.logits(baseline[None])[:, 1]
    assert (found.sum(1) - gain).abs().max() < 1e-5
    general = integrated_gradients(lambda m: bottleneck.logits(m)[:, 1], margins, baseline, 3)
    torch.testing.assert_close(found, general)


def test_importance_is_the_mean_over_samples_of_each_class(bottleneck):
    margins, baseline = normal(40, 3, seed=2), normal(3, seed=3)
    labels = torch.arange(4).repeat(10)
    importance = class_importance(bottleneck, margins, labels, baseline)
    for index in range(4):
        own = concept_attributions(bottleneck, margins[labels == index], baseline, index)
        torch.testing.assert_close(importance[index], own.mean(0))
    expected = importance[2] - importance[[0, 1, 3]].max(0).values
    assert torch.equal(contrast(importance, 2), expected)


def test_covering_concepts_are_the_fewest():
    assert covering_concepts(torch.tensor([0.5, 0.3, 0.2]), 0.8) == (0, 1)
    assert covering_concepts(torch.tensor([0.5, 0.3, 0.2]), 0.81) == (0, 1, 2)
    assert covering_concepts(torch.tensor([-9.0, 1.0]), 1.0) == (1,)
    with pytest.raises(SelectionError, match="no concept speaks for the class"):
        covering_concepts(torch.tensor([-1.0, 0.0]))


def test_scores_sum_over_the_chosen_concepts():
    attributions = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    assert attribution_scores(attributions, (0, 2)).tolist() == [5.0, 40.0]
    assert highest(torch.tensor([1.0, 3.0, 2.0, 0.0]), 0.01).tolist() == [1]


def test_bottleneck_of_complete_concepts_is_as_accurate_as_the_classes_are_apart(bank):
    labels = torch.arange(3).repeat(60)
    features = 0.1 * normal(180, 5) + torch.eye(3, 5)[labels]
    layer = fit_bottleneck(bank, features, labels, 3)
    assert layer.accuracy(features, labels) == 1.0
    assert layer.weight.argmax(1).tolist() == [0, 1, 2]
    torch.testing.assert_close(layer.scale, bank.margins(features).std(0))


def test_residual_finds_what_the_concepts_lack(bank):
    labels = torch.arange(3).repeat(60)
    features = 0.1 * normal(180, 5) + torch.eye(5)[[0, 3, 4]][labels]
    plain = fit_bottleneck(bank, features, labels, 3)
    hybrid = fit_bottleneck(bank, features, labels, 3, hybrid=True)
    assert plain.accuracy(features, labels) < 0.9
    assert hybrid.accuracy(features, labels) == 1.0
    assert torch.equal(hybrid.weight, plain.weight)


def test_random_labels_are_never_the_class_and_even_among_others():
    labels = random_labels(4000, 2, 5, torch.Generator().manual_seed(0))
    counts = labels.bincount(minlength=5)
    assert counts[2] == 0
    assert counts[[0, 1, 3, 4]].min() > 900


def test_target_is_the_class_alike_outside_the_own_concepts_in_standardised_weights(bank):
    weight = torch.tensor([[9.0, 1.0, 0.1], [-9.0, 1.0, -0.1], [9.0, -1.0, 0.1]])
    layer = ConceptBottleneck(bank, weight, torch.zeros(3), torch.ones(3))
    assert targeted_label(layer, 0, (0,)) == 1
    spread = ConceptBottleneck(bank, weight, torch.zeros(3), torch.tensor([1.0, 1.0, 100.0]))
    assert targeted_label(spread, 0, (0,)) == 2
    with pytest.raises(SelectionError, match="no concept is left"):
        targeted_label(layer, 0, (0, 1, 2))


def test_counterfactual_labels_are_the_best_others_without_the_concepts(bank):
    weight = torch.tensor([[5.0, 0.0, 0.0], [4.0, 1.0, 0.0], [0.0, 0.5, 0.0]])
    layer = ConceptBottleneck(bank, weight, torch.tensor([0.0, -1.0, 0.0]), torch.ones(3))
    margins = torch.tensor([[1.0, 1.0, 0.0], [1.0, 3.0, 0.0]])
    found = counterfactual_labels(layer, margins, torch.zeros(3), 0, (0,))
    assert found.tolist() == [2, 1]


def test_blending_keeps_the_pixels_that_carry_the_concept():
    inputs, backgrounds = 2 + normal(2, 3, 4, 4).abs(), torch.zeros(2, 3, 4, 4)

    def corner(images):
        return images[:, :, :2, :2].sum((1, 2, 3))

    found = blended_with_retain(corner, inputs, backgrounds, keep=0.25, num_steps=3)
    assert torch.equal(found[:, :, :2, :2], inputs[:, :, :2, :2])
    assert (found != 0).any(1).sum() == 8
    with pytest.raises(SelectionError, match="images"):
        blended_with_retain(corner, torch.zeros(2, 3), torch.zeros(2, 3), keep=0.5, num_steps=1)


class Table(torch.nn.Module):
    """Gives its parameter, scaled by the input, as logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits_row = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, inputs):
        return inputs @ self.logits_row[None]


def test_divergence_is_the_hand_computed_one():
    first, second = Table([0.0, 0.0]), Table([0.0, torch.log(torch.tensor(3.0)).item()])
    expected = 0.5 * torch.log(torch.tensor(0.5 / 0.25)) + 0.5 * torch.log(torch.tensor(0.5 / 0.75))
    found = kl_from_retrained(first, second, torch.ones(4, 1))
    assert found == pytest.approx(expected.item(), abs=1e-6)


def test_membership_attack_tells_confident_from_unsure_samples():
    model = Table([1.0, 0.0, 0.0])
    sure, unsure = 8 + normal(80, 1).abs(), 0.3 * normal(80, 1).abs()
    assert share_called_non_member(model, sure, unsure, 9 + torch.zeros(10, 1)) == 0.0
    assert share_called_non_member(model, sure, unsure, torch.zeros(10, 1)) == 1.0


def test_probe_is_at_chance_for_one_cloud_and_perfect_for_two():
    cloud = normal(400, 3)
    assert probe_accuracy(cloud[:200], cloud[200:]) == pytest.approx(0.5, abs=0.1)
    assert probe_accuracy(cloud[:200] + 9, cloud[200:]) == 1.0
    with pytest.raises(SelectionError, match="at least 2 samples"):
        probe_accuracy(cloud[:1], cloud)


def test_relearning_counts_steps_and_leaves_the_model():
    model = Table([3.0, 0.0])
    inputs, labels = torch.ones(6, 1), torch.ones(6, dtype=torch.long)
    before = model.logits_row.detach().clone()
    steps = relearning_steps(model, inputs, labels, class_index=1, lr=0.5)
    slow = relearning_steps(model, inputs, labels, class_index=1, lr=0.05)
    assert 0 < steps < slow
    assert torch.equal(model.logits_row, before)
    assert relearning_steps(model, inputs, 1 - labels, class_index=0) == 0
    assert relearning_steps(model, inputs, labels, class_index=1, lr=1e-6, max_steps=3) == 3


def test_gap_is_the_mean_absolute_difference():
    first, second = ClassScores(0.0, 0.0, 1.0, 1.0, 0.5), ClassScores(0.5, 0.0, 0.5, 1.0, 1.0)
    assert first.gap(second) == pytest.approx(0.3)


def test_bad_concepts_and_features_are_named(bank):
    good, bad = normal(8, 3), torch.full((8, 3), torch.inf)
    with pytest.raises(SelectionError, match="at least 4 negative samples"):
        fit_concept_bank({"a": ConceptSamples(good, good[:2])})
    with pytest.raises(NonFiniteError, match="the positive samples of 'a'"):
        fit_concept_bank({"a": ConceptSamples(bad, good)})
    with pytest.raises(SelectionError, match="at least 2 concepts"):
        text_concept_bank(["a", "a"], torch.eye(2))
    with pytest.raises(SelectionError, match="a row of zeros"):
        text_concept_bank(["a", "b"], torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(SelectionError, match=r"\[2\] have no sample"):
        fit_bottleneck(bank, normal(4, 5), torch.tensor([0, 1, 0, 1]), 3)
    with pytest.raises(SelectionError, match="one label for each"):
        fit_bottleneck(bank, normal(4, 5), torch.tensor([0, 1]), 3)
    with pytest.raises(SelectionError, match="`num_steps`"):
        integrated_gradients(lambda x: x.sum(1), good, good[0], 0)
