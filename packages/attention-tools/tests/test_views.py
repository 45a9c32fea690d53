"""Views keep noise noise, and their inverses undo them to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from unweave.attention_tools.views import (
    VIEWS,
    View,
    ViewError,
    get_view,
    jigsaw_index,
    permutation_view,
)

SIZES = (16, 32, 64, 128, 256)
TURNS_COLOURS = ("negate",)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def enlarged(images: torch.Tensor) -> torch.Tensor:
    return interpolate(images, scale_factor=4, mode="nearest")


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("size", SIZES)
def test_inverse_undoes_the_view_exactly(name, size):
    x = noise(2, 3, size, size)
    view = get_view(name)
    assert torch.equal(view.inverse_view(view.view(x)), x)
    assert torch.equal(view.view(view.inverse_view(x)), x)


@pytest.mark.parametrize("name", VIEWS)
def test_inverse_undoes_the_view_of_the_last_stage(name):
    x, view = noise(1, 1024, 1024), get_view(name)
    assert torch.equal(view.inverse_view(view.view(x)), x)


@pytest.mark.parametrize("name", [name for name in VIEWS if name != "identity"])
@pytest.mark.parametrize("size", SIZES)
def test_view_changes_the_image(name, size):
    x = noise(1, size, size)
    assert not torch.equal(get_view(name).view(x), x)


@pytest.mark.parametrize("name", VIEWS)
def test_view_of_noise_has_variance_one(name):
    seen = get_view(name).view(noise(16, 3, 64, 64))
    assert abs(float(seen.var()) - 1) < 0.02


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("size", (32, 64))
def test_covariance_of_viewed_noise_is_the_identity(name, size):
    # The matrix of the view has one entry of +-1 in each row and column, so V V^T = 1.
    pixels = size * size
    places = torch.arange(1.0, pixels + 1).reshape(1, size, size)
    seen = get_view(name).view(places)
    assert torch.equal(seen.abs().flatten().sort().values, places.flatten())


@pytest.mark.parametrize("name", VIEWS)
def test_maps_move_with_the_pixels_and_stay_non_negative(name):
    view = get_view(name)
    maps = noise(2, 32, 32).abs()
    back = view.inverse_map(maps)
    assert (back >= 0).all()
    torch.testing.assert_close(back.sum(), maps.sum())
    if name not in TURNS_COLOURS:
        assert torch.equal(back, view.inverse_view(maps[:, None])[:, 0])


def test_negate_leaves_maps_as_they_are():
    maps = noise(2, 8, 8)
    assert torch.equal(get_view("negate").inverse_map(maps, (16, 16)), maps)


@pytest.mark.parametrize("name", VIEWS)
def test_coarse_map_is_that_of_the_moved_fine_map(name):
    view = get_view(name)
    fine = noise(1, 64, 64).abs()
    coarse = torch.nn.functional.avg_pool2d(fine, 2)
    spread = coarse.repeat_interleave(2, -1).repeat_interleave(2, -2)
    wanted = torch.nn.functional.avg_pool2d(view.inverse_map(spread), 2)
    torch.testing.assert_close(view.inverse_map(coarse, (64, 64)), wanted)


@pytest.mark.parametrize("name", ("flip", "rotate_cw", "patch_permute"))
def test_coarse_map_of_a_blockwise_view_is_moved_exactly(name):
    view, maps = get_view(name), noise(2, 16, 16).abs()
    torch.testing.assert_close(view.inverse_map(maps, (64, 64)), view.inverse_map(maps))


def test_maps_are_differentiable():
    maps = noise(1, 8, 8).abs().requires_grad_()
    get_view("jigsaw").inverse_map(maps, (16, 16)).sum().backward()
    torch.testing.assert_close(maps.grad, torch.ones(1, 8, 8))


@pytest.mark.parametrize("name", ("flip", "rotate_cw", "rotate_180", "patch_permute", "jigsaw"))
def test_view_of_latents_is_the_view_of_enlarged_pixels(name):
    view, small = get_view(name), noise(1, 16, 16)
    large = small.repeat_interleave(4, -1).repeat_interleave(4, -2)
    seen = view.view(small).repeat_interleave(4, -1).repeat_interleave(4, -2)
    alike = (view.view(large) == seen).float().mean()
    assert alike == 1 if name != "jigsaw" else alike > 0.8


@pytest.mark.parametrize("name", VIEWS)
def test_view_of_an_enlarged_image_is_about_the_enlarged_view(name):
    # Stages of 64 and 256 pixels show one picture; skewed and hinged to the next pixel of each.
    view = get_view(name)
    smooth = interpolate(noise(1, 3, 8, 8), (64, 64), mode="bicubic")
    both = view.view(enlarged(smooth)), enlarged(view.view(smooth))
    correlation = torch.corrcoef(torch.stack([one.flatten() for one in both]))[0, 1]
    assert correlation > 0.9
    if name not in ("skew", "jigsaw", "inner_circle", "square_hinge"):
        assert torch.equal(*both)


def test_rotations_and_flip_turn_the_right_way():
    image = torch.tensor([[[1, 2], [3, 4]]])
    seen = {
        name: get_view(name).view(image)[0].tolist()
        for name in ("flip", "rotate_cw", "rotate_ccw", "rotate_180")
    }
    assert seen == {
        "flip": [[3, 4], [1, 2]],
        "rotate_cw": [[3, 1], [4, 2]],
        "rotate_ccw": [[2, 4], [1, 3]],
        "rotate_180": [[4, 3], [2, 1]],
    }


@pytest.mark.parametrize("seed", range(10))
def test_jigsaw_is_a_permutation_for_every_seed(seed):
    for side in (16, 32, 64, 96):
        index = jigsaw_index(side, seed)
        assert torch.equal(index.sort().values, torch.arange(side * side))


def test_own_view_by_a_function_and_its_inverse():
    mirror = View("mirror", lambda x: x.flip(-1), lambda x: x.flip(-1))
    assert get_view(mirror) is mirror
    red = noise(3, 8, 8)
    assert torch.equal(mirror.view(red), red.flip(-1))


def test_own_view_that_mixes_colours_tells_how_maps_move():
    swap = View("swap", lambda x: x[:, [2, 1, 0]], lambda x: x[:, [2, 1, 0]], lambda maps: maps)
    maps = noise(2, 4, 4).abs()
    assert torch.equal(swap.inverse_map(maps), maps)
    with pytest.raises(ViewError, match=r"'swap'.*`spatial_inverse`"):
        View("swap", lambda x: x[:, [2, 1, 0]], lambda x: x[:, [2, 1, 0]])


@pytest.mark.parametrize(
    ("function", "inverse", "why"),
    [
        (lambda x: x.flip(-1), lambda x: x, "does not undo"),
        (lambda x: 2 * x, lambda x: x / 2, "norm"),
        (lambda x: x + 1, lambda x: x - 1, "not linear"),
        (lambda x: x[..., ::2], lambda x: x, "keep the shape"),
        (lambda x: x @ torch.ones(3, 3), lambda x: x, "failed"),
    ],
)
def test_wrong_view_is_named(function, inverse, why):
    with pytest.raises(ViewError, match=f"'mine'.*{why}"):
        View("mine", function, inverse)


def test_wrong_permutation_is_named():
    with pytest.raises(ViewError, match="'twice'"):
        permutation_view("twice", lambda side: torch.zeros(side * side, dtype=torch.int64))


def test_view_that_fits_no_such_size_is_named():
    with pytest.raises(ViewError, match=r"'rotate_cw'.*square"):
        get_view("rotate_cw").view(noise(3, 4, 6))
    with pytest.raises(ViewError, match=r"'patch_permute'.*multiples of 8"):
        get_view("patch_permute").view(noise(3, 12, 12))
    with pytest.raises(ViewError, match=r"'jigsaw'.*multiples of 4"):
        get_view("jigsaw").view(noise(3, 18, 18))


def test_unknown_view_lists_the_known():
    with pytest.raises(ViewError, match="no view 'spin'; there are identity, flip"):
        get_view("spin")
