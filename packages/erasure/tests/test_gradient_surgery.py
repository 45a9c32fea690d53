"""The algebra of DoCo's gradient surgery, against closed forms in float64."""

import pytest
import torch

from unweave.diffusion_core.errors import SelectionError
from unweave.erasure.gradient_surgery import clip_norm, remove_conflict, with_gradients


def random_pair(seed, sign, norm=None):
    """Two lists of tensors of which each pair has an inner product of the given sign."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(8, 5), (3,), (2, 4, 6)]
    first = [torch.randn(shape, generator=generator) for shape in shapes]
    second = [torch.randn(shape, generator=generator) for shape in shapes]
    second = [b if sign * torch.sum(a * b) > 0 else -b for a, b in zip(first, second, strict=True)]
    return clip_norm(first, norm) if norm else first, second


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).double()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scope", ["per_tensor", "global"])
def test_conflict_is_projected_away_exactly(scope, seed):
    gradients, preserving = random_pair(seed, -1)
    groups = [([g], [r]) for g, r in zip(gradients, preserving, strict=True)]
    groups = groups if scope == "per_tensor" else [(gradients, preserving)]
    result = remove_conflict(gradients, preserving, scope=scope)
    expected = []
    for group, kept in groups:
        g, r = flat(group), flat(kept)
        expected.append(g - (g @ r) / (r @ r) * r)
    torch.testing.assert_close(flat(result), torch.cat(expected), rtol=0, atol=1e-5)
    pairs = [(flat([g]), flat([r])) for g, r in zip(result, preserving, strict=True)]
    pairs = pairs if scope == "per_tensor" else [(flat(result), flat(preserving))]
    for after, r in pairs:
        assert abs(after @ r) < 1e-6 * flat(gradients).norm() * r.norm()


@pytest.mark.parametrize("scope", ["per_tensor", "global"])
@pytest.mark.parametrize("legacy_scale", [False, True])
def test_agreeing_gradients_stay_bit_identical(scope, legacy_scale):
    gradients, preserving = random_pair(0, 1)
    result = remove_conflict(gradients, preserving, scope=scope, legacy_scale=legacy_scale)
    assert all(torch.equal(a, b) for a, b in zip(result, gradients, strict=True))


def test_tensors_are_judged_alone_or_together():
    gradients = [torch.tensor([1.0]), torch.tensor([-1.0])]
    preserving = [torch.tensor([3.0]), torch.tensor([1.0])]
    assert remove_conflict(gradients, preserving) == [torch.tensor([1.0]), torch.tensor([0.0])]
    assert remove_conflict(gradients, preserving, scope="global") == gradients


def test_legacy_scale_overshoots_for_small_gradients():
    """The authors' code lacks a factor ||g||: for ||g|| = 0.16 the sign along r flips."""
    gradient, preserving = torch.tensor([0.1597, -0.01]), torch.tensor([0.0, 0.16])
    before = (gradient @ preserving).item()
    exact = remove_conflict([gradient], [preserving])[0] @ preserving
    legacy = remove_conflict([gradient], [preserving], legacy_scale=True)[0] @ preserving
    assert before == pytest.approx(-0.0016)
    assert abs(exact) < 1e-9
    assert legacy.item() == pytest.approx(-0.0016 + 0.0016 / gradient.norm().item(), rel=1e-5)
    assert legacy > 0.005


@pytest.mark.parametrize("seed", range(5))
def test_legacy_scale_fails_the_test_of_orthogonality(seed):
    gradients, preserving = random_pair(seed, -1, norm=0.16)
    result = remove_conflict(gradients, preserving, legacy_scale=True)
    for before, after, r in zip(gradients, result, preserving, strict=True):
        product = flat([after]) @ flat([r])
        assert product > 1e-3 * flat([before]).norm() * flat([r]).norm()


def test_strength_scales_the_correction():
    gradients, preserving = random_pair(1, -1)
    whole, half = (remove_conflict(gradients, preserving, strength=x) for x in (1.0, 0.5))
    for g, full, part in zip(gradients, whole, half, strict=True):
        torch.testing.assert_close(part - g, 0.5 * (full - g))


def test_zero_preserving_gradient_changes_nothing():
    gradients, _ = random_pair(0, 1)
    result = remove_conflict(gradients, [torch.zeros_like(g) for g in gradients])
    assert all(torch.equal(a, b) for a, b in zip(result, gradients, strict=True))


def test_clipping_keeps_short_gradients_and_shortens_long_ones():
    gradients, _ = random_pair(0, 1)
    assert flat(clip_norm(gradients, 1.0)).norm().item() == pytest.approx(1.0)
    short = [0.01 * g for g in gradients]
    assert all(torch.equal(a, b) for a, b in zip(clip_norm(short, 1.0), short, strict=True))
    assert not flat(clip_norm([torch.zeros(3)], 1.0)).any()


def test_surrogate_has_the_value_and_the_gradients_it_is_given():
    gradients, parameters = random_pair(3, 1)
    parameters = [p.requires_grad_() for p in parameters]
    loss = with_gradients(torch.tensor(0.3), parameters, gradients)
    loss.backward()
    assert loss.item() == torch.tensor(0.3).item()
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, gradients, strict=True))


def test_lists_that_do_not_match_are_refused():
    with pytest.raises(SelectionError, match="equal shapes"):
        remove_conflict([torch.ones(2)], [torch.ones(3)])
    with pytest.raises(SelectionError, match="equal shapes"):
        remove_conflict([], [])
    with pytest.raises(SelectionError, match="`scope`"):
        remove_conflict([torch.ones(2)], [torch.ones(2)], scope="tensor")
