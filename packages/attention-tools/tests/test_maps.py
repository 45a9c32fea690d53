"""Recorded maps: chosen, averaged, stored."""

from __future__ import annotations

import pytest
import torch

from unweave.attention_tools import AttentionMaps
from unweave.attention_tools.errors import MapError


@pytest.fixture
def maps():
    recorded = AttentionMaps(names=("cat", "dog", "red"), each_step=True)
    generator = torch.Generator().manual_seed(0)
    for step in (2, 5):
        recorded.add("down_blocks.0", step, torch.rand(2, 24, 3, generator=generator), (4, 6))
        recorded.add("up_blocks.1", step, torch.rand(2, 6, 3, generator=generator), (2, 3))
    return recorded


def test_select_by_token(maps):
    dog = maps.select(token="dog")
    assert dog.names == ("dog",)
    assert dog.values["up_blocks.1", 2].equal(maps.values["up_blocks.1", 2][..., [1]])
    both = maps.select(token=["red", 0])
    assert both.names == ("red", "cat")
    assert both.values["down_blocks.0", 5].equal(maps.values["down_blocks.0", 5][..., [2, 0]])
    assert maps.select(token=-1).names == ("red",)


def test_select_by_layer_step_and_resolution(maps):
    assert maps.select(layer="up_blocks").layers == ["up_blocks.1"]
    assert maps.select(layer=lambda name: name.endswith("0")).layers == ["down_blocks.0"]
    assert maps.select(step=5).steps == [5]
    assert maps.select(step=[2, 5]).steps == [2, 5]
    assert maps.select(resolution=(2, 3)).layers == ["up_blocks.1"]
    assert len(maps.select(layer="down", step=2).values) == 1
    assert maps.values.keys() == maps.select().values.keys()


def test_aggregate_counts_each_layer_and_step_once(maps):
    mean = maps.aggregate()
    assert mean.shape == (2, 3, 4, 6)
    parts = []
    for step in (2, 5):
        parts.append(maps.values["down_blocks.0", step].transpose(1, 2).reshape(2, 3, 4, 6))
        small = maps.values["up_blocks.1", step].transpose(1, 2).reshape(2, 3, 2, 3)
        parts.append(torch.nn.functional.interpolate(small, (4, 6), mode="bilinear"))
    assert torch.allclose(mean, torch.stack(parts).mean(0))
    assert maps.aggregate((8, 12)).shape == (2, 3, 8, 12)
    assert maps.select(layer="up").aggregate(8).shape == (2, 3, 8, 8)


def test_running_mean_over_steps_is_the_mean():
    own, values = AttentionMaps(), torch.rand(5, 1, 4, 2, dtype=torch.float64)
    for step, one in enumerate(values):
        own.add("layer", step, one, (2, 2))
    assert own.steps == [-1]
    assert own.counts == {("layer", -1): 5}
    assert torch.allclose(own.values["layer", -1], values.mean(0))


def test_half_precision_is_kept_in_float32():
    own = AttentionMaps()
    own.add("layer", 0, torch.rand(1, 4, 2).bfloat16(), (2, 2))
    assert own.values["layer", -1].dtype == torch.float32
    assert own.nbytes == 4 * 8


def test_mask_of_each_token(maps):
    masks = maps.to_mask("relative", 0.5, resolution=(8, 12))
    assert masks.shape == (2, 3, 8, 12)
    assert masks.dtype == torch.bool
    mean = maps.aggregate((8, 12))
    assert masks.equal(mean >= 0.5 * mean.amax((2, 3), keepdim=True))


def test_save_and_load_round_trip(maps, tmp_path):
    path = maps.save(tmp_path / "maps")
    assert path == tmp_path / "maps.npz"
    back = AttentionMaps.load(path)
    assert (back.names, back.each_step, back.grids) == (maps.names, True, maps.grids)
    assert back.counts == maps.counts
    assert list(back.values) == list(maps.values)
    assert all(back.values[key].equal(maps.values[key]) for key in maps.values)
    assert [one.name for one in tmp_path.iterdir()] == ["maps.npz"]
    nameless = AttentionMaps()
    assert AttentionMaps.load(nameless.save(tmp_path / "empty.npz")).names is None


def test_names_with_dots_keep_their_file(maps, tmp_path):
    assert maps.save(tmp_path / "run-0.5").name == "run-0.5.npz"
    assert maps.save(tmp_path / "run-0.6.npz").name == "run-0.6.npz"


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut short"])
def test_corrupt_file_is_named(tmp_path, content):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(MapError, match=r"bad\.npz"):
        AttentionMaps.load(tmp_path / "bad.npz")


def test_cut_and_foreign_files_are_named(maps, tmp_path):
    import numpy as np

    whole = maps.save(tmp_path / "whole").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    broken = bytearray(whole)
    broken[len(broken) // 3] ^= 0xFF
    (tmp_path / "flipped.npz").write_bytes(broken)
    np.savez(tmp_path / "foreign.npz", values=np.zeros(3))
    np.save(tmp_path / "single.npy", np.zeros(3))
    for name in ("cut.npz", "flipped.npz", "foreign.npz", "single.npy", "missing.npz"):
        with pytest.raises(MapError, match=name):
            AttentionMaps.load(tmp_path / name)


def test_bad_selections_are_named(maps):
    with pytest.raises(MapError, match="bird"):
        maps.select(token="bird")
    with pytest.raises(MapError, match="3"):
        maps.select(token=3)
    with pytest.raises(MapError, match="middle"):
        maps.select(layer="middle")
    with pytest.raises(MapError, match="step 4"):
        maps.select(step=4)
    with pytest.raises(MapError, match="no maps were recorded"):
        AttentionMaps().aggregate()
    with pytest.raises(MapError, match="sizes that differ"):
        own = AttentionMaps()
        own.add("layer", 0, torch.rand(1, 4, 2), (2, 2))
        own.add("layer", 1, torch.rand(2, 4, 2), (2, 2))
