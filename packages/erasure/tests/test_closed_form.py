import math

import pytest
import torch

from unweave.diffusion_core.errors import NonFiniteError, SelectionError, UnweaveError
from unweave.erasure.closed_form import (
    closed_form_edit,
    rows_times_inverse_dense,
    rows_times_inverse_woodbury,
)

WIDTH, CLIP_NORM = 64, 28.0


def states(count, seed, width=WIDTH):
    """Random states of CLIP's norm around a common direction, as text states are."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(width, generator=torch.Generator().manual_seed(77), dtype=torch.float64)
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64) + common
    return CLIP_NORM * rows / rows.norm(dim=1, keepdim=True)


def matrix(seed=5, out=48):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, WIDTH, generator=generator, dtype=torch.float64) / 8


def edited(weight, *arguments, **settings):
    return weight + closed_form_edit(*arguments, **settings).low_rank(weight).dense()


def relative(difference, reference):
    return (difference.norm(dim=1) / reference.norm(dim=1)).mean().item()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("num_preserved", [0, 10, 100])
def test_edit_equals_brute_force_least_squares(seed, num_preserved):
    weight, c, guide = matrix(), states(3, seed), states(3, seed + 10)
    kept = states(num_preserved, seed + 20)
    found = edited(weight, c, guide, kept, regularisation=0.5, edit_scale=1.5, preserve_scale=0.7)
    inputs = torch.cat(
        [math.sqrt(1.5) * c, math.sqrt(0.7) * kept, math.sqrt(0.5) * torch.eye(WIDTH).double()]
    )
    outputs = torch.cat(
        [
            math.sqrt(1.5) * guide @ weight.T,
            math.sqrt(0.7) * kept @ weight.T,
            math.sqrt(0.5) * weight.T,
        ]
    )
    expected = torch.linalg.lstsq(inputs, outputs).solution.T
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_error_falls_as_erase_scale_over_lambda_grows():
    weight, c, guide = matrix(), states(1, 0), states(1, 1)
    errors = [
        relative(
            c @ edited(weight, c, guide, edit_scale=scale, regularisation=500.0).T
            - guide @ weight.T,
            guide @ weight.T,
        )
        for scale in (0.1, 1.0, 10.0, 100.0)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 * errors[0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_preservation_protects_listed_and_unseen_concepts(seed):
    weight, c, guide = matrix(), states(1, seed), states(1, seed + 10)
    kept, unseen = states(10, seed + 20), states(10, seed + 30)
    free, bound = edited(weight, c, guide), edited(weight, c, guide, kept)

    def drift(edit, inputs):
        return relative(inputs @ (edit - weight).T, inputs @ weight.T)

    assert drift(bound, kept) < 0.05 * drift(free, kept)
    assert drift(bound, unseen) < 0.5 * drift(free, unseen)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("num_rows", [1, 12, WIDTH, 100])
def test_woodbury_and_dense_paths_agree(seed, num_rows):
    rows = states(num_rows, seed)
    count = min(num_rows, 5)
    dense = rows_times_inverse_dense(rows, count, 0.5)
    woodbury = rows_times_inverse_woodbury(rows, count, 0.5)
    assert (dense - woodbury).norm() / dense.norm() < 1e-5


def test_no_edits_change_nothing():
    weight = matrix().float()
    assert torch.equal(edited(weight, states(0, 0), states(0, 0), states(10, 1)), weight)


def test_rows_that_are_their_own_target_cost_no_rank():
    c = states(4, 0)
    targets = c.clone()
    targets[1] = c[0]
    edit = closed_form_edit(c, targets)
    assert edit.low_rank(matrix()).rank == 1
    kept = c[[0, 2, 3]]
    same = closed_form_edit(c[1:2], targets[1:2], kept)
    torch.testing.assert_close(edit.down, same.down)


def test_down_factor_is_shared_by_all_matrices():
    edit = closed_form_edit(states(2, 0), states(2, 1))
    assert torch.equal(edit.low_rank(matrix(1)).down, edit.low_rank(matrix(2, out=16)).down)


def test_bad_inputs_are_named():
    c = states(2, 0)
    with pytest.raises(SelectionError, match="equal shapes"):
        closed_form_edit(c, c[:1])
    with pytest.raises(UnweaveError, match="`regularisation` must be positive, got 0"):
        closed_form_edit(c, c, regularisation=0)
    with pytest.raises(NonFiniteError, match="`targets`"):
        closed_form_edit(c, c * math.inf)
    with pytest.raises(SelectionError, match="weight"):
        closed_form_edit(c, states(2, 1)).low_rank(torch.zeros(3, 5))
