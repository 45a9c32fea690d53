import numpy as np
import pytest
import torch

from unweave.emoji_world import (
    Overlay,
    SceneDataset,
    SceneObject,
    SceneSpec,
    World,
    compose,
    crossed_specs,
)
from unweave.emoji_world.world import BACKGROUNDS


def two_objects(distance: float) -> SceneSpec:
    return SceneSpec(
        (
            SceneObject("pizza", center=(0.5 - distance / 2, 0.5), size=0.4),
            SceneObject("rocket", center=(0.5 + distance / 2, 0.5), size=0.4),
        ),
        background="blue",
    )


def test_pixels_outside_every_mask_are_background() -> None:
    scene = compose(two_objects(0.5), 128)
    far = ~np.pad(scene.masks.any(0), 3)
    for dy in range(-3, 4):
        for dx in range(-3, 4):
            far &= ~np.roll(np.pad(scene.masks.any(0), 3), (dy, dx), (0, 1))
    assert (scene.image[far[3:-3, 3:-3]] == BACKGROUNDS["blue"]).all()


def test_masks_never_overlap_and_later_objects_cover_earlier_ones() -> None:
    alone = compose(SceneSpec(two_objects(0.1).objects[:1], background="blue"))
    scene = compose(two_objects(0.1))
    assert scene.masks.sum(0).max() == 1
    assert scene.masks[0].sum() < alone.masks[0].sum()


def test_boxes_are_tight_around_masks() -> None:
    scene = compose(two_objects(0.5))
    for mask, (x0, y0, x1, y1) in zip(scene.masks, scene.boxes, strict=True):
        assert mask[y0:y1, x0:x1].sum() == mask.sum()
        assert mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()


def test_an_object_outside_the_frame_has_an_empty_box() -> None:
    scene = compose(SceneSpec((SceneObject("pizza", center=(5.0, 5.0)),)))
    assert not scene.masks.any() and (scene.boxes == 0).all()


def test_a_scene_without_objects_is_only_background() -> None:
    scene = compose(SceneSpec((), background="red"))
    assert scene.masks.shape == (0, 64, 64) and scene.boxes.shape == (0, 4)
    assert (scene.image == BACKGROUNDS["red"]).all()


def test_items_depend_on_seed_and_index_only() -> None:
    first, again = SceneDataset(50, seed=3), SceneDataset(50, seed=3)
    assert torch.equal(first[7]["image"], again[7]["image"])  # type: ignore[arg-type]
    assert first[7]["caption"] == again[7]["caption"]
    assert any(SceneDataset(50, seed=4)[i]["caption"] != first[i]["caption"] for i in range(5))


def test_a_filter_holds_pairs_out() -> None:
    def apart(spec: SceneSpec) -> bool:
        return not {"cat face", "dog face"} <= {item.concept for item in spec.objects}

    data = SceneDataset(100, concepts=("cat face", "dog face", "fox"), counts=(0, 0, 1), keep=apart)
    assert all(apart(data.scene(i).spec) for i in range(100))
    with pytest.raises(ValueError, match="rejected 1000"):
        SceneDataset(1, keep=lambda spec: False).scene(0)


def test_crossed_specs_hold_every_combination_once() -> None:
    specs = crossed_specs(concept=World.concepts[:3], style=World.styles, x=(0.4, 0.6))
    assert len(set(specs)) == 3 * 4 * 2
    with pytest.raises(ValueError, match="colour"):
        crossed_specs(colour=("red",))


@pytest.mark.parametrize("kind", ["watermark", "qr", "caption"])
def test_an_overlay_changes_the_picture(kind: str) -> None:
    plain = SceneSpec((SceneObject("pizza"),))
    marked = SceneSpec((SceneObject("pizza"),), overlay=Overlay(kind, "hello"))  # type: ignore[arg-type]
    assert (compose(plain).image != compose(marked).image).any()


def test_bad_settings_name_the_value() -> None:
    with pytest.raises(KeyError, match="unicorm"):
        SceneObject("unicorm")
    with pytest.raises(ValueError, match="ukiyo-e"):
        SceneObject("pizza", style="ukiyo-e")
    with pytest.raises(ValueError, match="mauve"):
        SceneSpec((), background="mauve")
    with pytest.raises(ValueError, match=r"1\.5"):
        SceneObject("pizza", size=1.5)
