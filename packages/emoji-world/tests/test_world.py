import numpy as np
import pytest

from unweave.emoji_world import World
from unweave.emoji_world.world import sprite


def test_the_world_has_enough_concepts_and_keeps_some_unseen() -> None:
    assert len(World.concepts) >= 80
    assert len(World.trained) >= 40
    assert len(World.held_out) >= 12
    assert not set(World.held_out) & set(World.concepts)


@pytest.mark.parametrize("style", World.styles)
def test_every_concept_is_drawn_in_every_style(style: str) -> None:
    for concept in World.table:
        drawing = sprite(concept, style, 24)
        assert drawing.shape == (24, 24, 4)
        assert (drawing[..., 3] > 127).mean() > 0.05, concept


def test_the_four_styles_of_a_concept_differ() -> None:
    drawings = [sprite("cat face", style, 32).astype(float) for style in World.styles]
    for index, one in enumerate(drawings):
        for other in drawings[index + 1 :]:
            assert np.abs(one - other).mean() > 3


def test_synonyms_lead_to_the_concept_and_typos_to_suggestions() -> None:
    assert World.find("puppy").name == "dog face"
    with pytest.raises(KeyError, match="hamburger"):
        World.find("hamburgr")
