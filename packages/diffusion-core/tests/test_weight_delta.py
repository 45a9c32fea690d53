"""Claims about weight deltas: applied and undone exactly, saved whole, read only if intact."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
import random
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from unweave.diffusion_core.changes import Change, LowRank
from unweave.diffusion_core.errors import (
    ArtifactError,
    NonFiniteError,
    SelectionError,
    UnweaveError,
)
from unweave.diffusion_core.pipelines import base_model_hash
from unweave.diffusion_core.testing import tiny_pipeline
from unweave.diffusion_core.weight_delta import DeltaMeta, WeightDelta

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

Weights = dict[str, torch.Tensor]
_FC = "text_model.encoder.layers.0.mlp.fc1.weight"


def _keys_of_attention(pipe: StableDiffusionPipeline) -> list[str]:
    return [name for name, _ in pipe.unet.named_parameters() if ".attn2.to_k.weight" in name]


def _low_rank_delta(pipe: StableDiffusionPipeline, seed: int = 0) -> WeightDelta:
    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, Change] = {}
    for name in _keys_of_attention(pipe):
        width_out, width_in = pipe.unet.get_parameter(name).shape
        changes[name] = LowRank(
            torch.randn(2, width_in, generator=generator),
            torch.randn(width_out, 2, generator=generator),
        )
    text = {_FC: LowRank(torch.randn(3, 32, generator=generator), torch.ones(64, 3))}
    meta = DeltaMeta(base_model_hash(pipe), "test", {"seed": seed})
    return WeightDelta({"unet": changes, "text_encoder": text}, meta)


def _dense_delta(pipe: StableDiffusionPipeline) -> WeightDelta:
    generator = torch.Generator().manual_seed(9)
    unet = {
        "conv_in.weight": torch.randn(pipe.unet.conv_in.weight.shape, generator=generator),
        _keys_of_attention(pipe)[0]: torch.full((32, 32), 0.3),
    }
    return WeightDelta({"unet": unet}, DeltaMeta(base_model_hash(pipe), "dense"))


def _weights(pipe: StableDiffusionPipeline) -> Weights:
    named = itertools.chain(
        pipe.unet.state_dict().items(), pipe.text_encoder.state_dict(prefix="text.").items()
    )
    return {name: tensor.clone() for name, tensor in named}


def _same(first: Weights, second: Weights) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_apply_adds_the_change_times_the_strength(pipe: StableDiffusionPipeline) -> None:
    delta = _low_rank_delta(pipe)
    name = _keys_of_attention(pipe)[0]
    before = pipe.unet.get_parameter(name).detach().clone()
    delta.apply(pipe, strength=0.5)
    change = delta.deltas["unet"][name]
    assert isinstance(change, LowRank)
    expected = before + 0.5 * change.up @ change.down
    torch.testing.assert_close(pipe.unet.get_parameter(name).detach(), expected)


@pytest.mark.parametrize("strength", [1.0, 0.3, -2.0, 0.0, 1e8])
def test_revert_restores_bit_identical_weights(
    pipe: StableDiffusionPipeline, strength: float
) -> None:
    before, delta = _weights(pipe), _low_rank_delta(pipe)
    delta.apply(pipe, strength)
    assert _same(before, _weights(pipe)) == (strength == 0)
    delta.revert(pipe)
    assert _same(before, _weights(pipe))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_revert_is_bit_identical_in_half_precision(
    pipe: StableDiffusionPipeline, dtype: torch.dtype
) -> None:
    delta = _low_rank_delta(pipe)
    pipe.to(dtype)
    before = _weights(pipe)
    with pytest.raises(ArtifactError, match="same dtype"):
        delta.apply(pipe)
    delta.apply(pipe, strict=False)
    assert pipe.unet.dtype == dtype and not _same(before, _weights(pipe))
    delta.revert(pipe)
    assert _same(before, _weights(pipe))


def test_three_deltas_come_off_in_any_order(pipe: StableDiffusionPipeline) -> None:
    before = _weights(pipe)
    deltas = [_low_rank_delta(pipe, 1), _dense_delta(pipe), _low_rank_delta(pipe, 2)]
    for order in itertools.permutations(range(3)):
        for delta in deltas:
            delta.apply(pipe)
        for index in order:
            deltas[index].revert(pipe)
        assert _same(before, _weights(pipe))


def test_reverting_the_middle_delta_is_as_if_it_never_was(pipe: StableDiffusionPipeline) -> None:
    first, middle, last = _low_rank_delta(pipe, 1), _dense_delta(pipe), _low_rank_delta(pipe, 2)
    for delta in (first, last):
        delta.apply(pipe)
    expected = _weights(pipe)
    for delta in (last, first):
        delta.revert(pipe)
    for delta in (first, middle, last):
        delta.apply(pipe)
    middle.revert(pipe)
    assert _same(expected, _weights(pipe))


def test_leaving_the_block_reverts_even_after_an_error(pipe: StableDiffusionPipeline) -> None:
    before, delta = _weights(pipe), _low_rank_delta(pipe)
    with pytest.raises(KeyError), delta.apply(pipe):
        raise KeyError
    assert _same(before, _weights(pipe))
    with delta.apply(pipe) as applied:
        applied.revert()
    assert _same(before, _weights(pipe))


def test_the_base_hash_is_that_of_the_unedited_model(pipe: StableDiffusionPipeline) -> None:
    name, delta = base_model_hash(pipe), _low_rank_delta(pipe)
    with delta.apply(pipe):
        assert base_model_hash(pipe) == name


def test_two_pipelines_are_edited_independently(pipe: StableDiffusionPipeline) -> None:
    other = tiny_pipeline()
    before, delta = _weights(other), _low_rank_delta(pipe)
    delta.apply(pipe)
    assert _same(before, _weights(other)) and not delta.is_applied(other)
    delta.apply(other)
    assert _same(_weights(pipe), _weights(other))


def test_wrong_orders_of_calls_are_refused(pipe: StableDiffusionPipeline) -> None:
    delta = _low_rank_delta(pipe)
    with pytest.raises(UnweaveError, match="not applied"):
        delta.revert(pipe)
    delta.apply(pipe)
    with pytest.raises(UnweaveError, match="already applied"):
        delta.apply(pipe)
    with pytest.raises(UnweaveError, match="finite number, got nan"):
        _dense_delta(pipe).apply(pipe, float("nan"))


def test_another_base_model_is_refused_with_both_hashes(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    other = tiny_pipeline(seed=1)
    before = _weights(other)
    _low_rank_delta(pipe).save(tmp_path / "delta")
    with pytest.raises(ArtifactError) as error:
        WeightDelta.load(tmp_path / "delta").apply(other)
    assert base_model_hash(pipe) in str(error.value)
    assert base_model_hash(other) in str(error.value)
    assert _same(before, _weights(other))
    WeightDelta.load(tmp_path / "delta", strict=False).apply(other)
    assert not _same(before, _weights(other))


def test_unknown_parameters_and_shapes_change_nothing(pipe: StableDiffusionPipeline) -> None:
    before, meta = _weights(pipe), DeltaMeta(base_model_hash(pipe), "test")
    good = {"conv_in.bias": torch.ones(16)}
    for bad in ({"nothing.weight": torch.ones(1)}, {"conv_out.bias": torch.ones(7)}):
        with pytest.raises(ArtifactError, match=next(iter(bad))):
            WeightDelta({"unet": {**good, **bad}}, meta).apply(pipe)
    with pytest.raises(ArtifactError, match="'unett'"):
        WeightDelta({"unett": good}, meta).apply(pipe)
    assert _same(before, _weights(pipe))


def test_a_delta_needs_finite_changes_and_a_named_origin() -> None:
    meta = DeltaMeta("0" * 64, "test")
    with pytest.raises(SelectionError, match="got none"):
        WeightDelta({"unet": {}}, meta)
    with pytest.raises(NonFiniteError, match=r"unet\.x"):
        WeightDelta({"unet": {"x": torch.tensor([float("nan")])}}, meta)
    with pytest.raises(SelectionError, match=r"\(2, 3\) and \(4, 5\)"):
        LowRank(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(ArtifactError, match="'beef'"):
        DeltaMeta("beef", "test")
    with pytest.raises(ArtifactError, match="method"):
        DeltaMeta("0" * 64, " ")
    with pytest.raises(ArtifactError, match="JSON"):
        DeltaMeta("0" * 64, "test", {"x": object()})


def test_text_encoder_names_are_canonical_whatever_was_given(
    pipe: StableDiffusionPipeline,
) -> None:
    meta = DeltaMeta(base_model_hash(pipe), "test")
    for name in (_FC, _FC.removeprefix("text_model.")):
        delta = WeightDelta({"text_encoder": {name: torch.ones(64, 32)}}, meta)
        assert list(delta.deltas["text_encoder"]) == [_FC]
        with delta.apply(pipe):
            assert delta.is_applied(pipe)


def test_a_delta_of_training_reproduces_the_trained_weights(
    pipe: StableDiffusionPipeline,
) -> None:
    base, original = base_model_hash(pipe), _weights(pipe)
    before = {
        "unet": {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()},
        "text_encoder": {n: t.clone() for n, t in pipe.text_encoder.state_dict().items()},
    }
    name = _keys_of_attention(pipe)[0]
    with torch.no_grad():
        pipe.unet.get_parameter(name).mul_(1.7)
        next(iter(pipe.text_encoder.parameters())).add_(0.1)
    trained = _weights(pipe)
    delta = WeightDelta.from_weights(before, pipe, method="training", settings={"steps": 1})
    assert delta.meta.base_hash == base and not delta.low_rank
    assert list(delta.deltas["unet"]) == [name] and len(delta.deltas["text_encoder"]) == 1
    fresh = tiny_pipeline()
    delta.apply(fresh)
    for key, tensor in _weights(fresh).items():
        torch.testing.assert_close(tensor, trained[key], atol=1e-6, rtol=0)
    delta.revert(fresh)
    assert _same(original, _weights(fresh))


def test_merging_is_applying_both(pipe: StableDiffusionPipeline) -> None:
    first, second, dense = _low_rank_delta(pipe, 1), _low_rank_delta(pipe, 2), _dense_delta(pipe)
    assert first.merge(second).low_rank and not first.merge(dense).low_rank
    for delta in (first, second, dense):
        delta.apply(pipe)
    other = tiny_pipeline()
    first.merge(second).merge(dense).apply(other)
    merged = _weights(other)
    for name, tensor in _weights(pipe).items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-5, rtol=1e-5)
    stranger = WeightDelta({"unet": {"x": torch.ones(1)}}, DeltaMeta("0" * 64, "test"))
    with pytest.raises(ArtifactError, match="0" * 64):
        first.merge(stranger)


def test_low_rank_changes_are_a_lora_without_error(pipe: StableDiffusionPipeline) -> None:
    factors, error = _low_rank_delta(pipe).to_lora()
    assert error == 0.0
    assert set(factors["unet"]) == {
        name.removesuffix(".weight") for name in _keys_of_attention(pipe)
    }
    down, up = factors["text_encoder"][_FC.removesuffix(".weight")]
    assert down.shape == (3, 32) and up.shape == (64, 3)


def test_the_svd_error_is_that_of_the_best_approximation() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(12, 8, generator=generator)
    delta = WeightDelta({"unet": {"x.weight": dense}}, DeltaMeta("0" * 64, "test"))
    values = torch.linalg.svdvals(dense)
    for rank in (1, 3, 7):
        factors, error = delta.to_lora(rank)
        down, up = factors["unet"]["x"]
        assert down.shape == (rank, 8) and up.shape == (12, rank)
        assert error == pytest.approx((values[rank:].norm() / values.norm()).item(), rel=1e-4)
    assert delta.to_lora()[1] < 1e-6


def test_a_dense_change_of_low_rank_gets_its_own_rank() -> None:
    dense = torch.randn(12, 2) @ torch.randn(2, 8)
    delta = WeightDelta({"unet": {"x.weight": dense}}, DeltaMeta("0" * 64, "test"))
    factors, error = delta.to_lora()
    assert factors["unet"]["x"][0].shape[0] == 2 and error < 1e-5


def test_what_no_lora_can_hold_is_named() -> None:
    meta = DeltaMeta("0" * 64, "test")
    for name, shape in (("x.bias", (3,)), ("conv.weight", (2, 2, 3, 3))):
        with pytest.raises(SelectionError, match=name):
            WeightDelta({"unet": {name: torch.ones(shape)}}, meta).to_lora()
    embedding = {"embeddings.token_embedding.weight": torch.ones(4, 4)}
    with pytest.raises(SelectionError, match="token_embedding"):
        WeightDelta({"text_encoder": embedding}, meta).to_lora()


def test_a_saved_delta_comes_back_bit_identical(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    delta = _low_rank_delta(pipe).merge(_dense_delta(pipe))
    delta.save(tmp_path / "delta")
    loaded = WeightDelta.load(tmp_path / "delta")
    assert loaded.meta == delta.meta
    assert os.listdir(tmp_path) == ["delta"]
    delta.apply(pipe)
    other = tiny_pipeline()
    loaded.apply(other)
    assert _same(_weights(pipe), _weights(other))


def test_low_rank_factors_are_stored_as_factors(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    _low_rank_delta(pipe).save(tmp_path / "delta")
    loaded = WeightDelta.load(tmp_path / "delta")
    assert loaded.low_rank and loaded.meta.settings == {"seed": 0}
    assert set(loaded.meta.versions) >= {"torch", "diffusers", "transformers"}


def test_more_files_and_content_go_into_the_same_artifact(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    folder = tmp_path / "delta"
    delta = _low_rank_delta(pipe)
    delta.save(folder, extra=lambda new: (new / "more.txt").write_text("x"), content={"k": [1]})
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["k"] == [1] and set(manifest["files"]) == {"delta.safetensors", "more.txt"}
    (folder / "more.txt").write_text("y")
    with pytest.raises(ArtifactError, match=r"more\.txt"):
        WeightDelta.load(folder)
    delta.save(folder)
    assert sorted(os.listdir(folder)) == ["delta.safetensors", "manifest.json"]


@pytest.fixture
def saved(pipe: StableDiffusionPipeline, tmp_path: Path) -> Path:
    """Return the folder of a saved delta."""
    _low_rank_delta(pipe).save(tmp_path / "delta")
    return tmp_path / "delta"


@pytest.mark.parametrize("name", ["delta.safetensors", "manifest.json"])
@pytest.mark.parametrize("flips", [300, pytest.param(3000, marks=pytest.mark.stress)])
def test_every_bit_flip_is_refused_with_the_name_of_the_file(
    saved: Path, name: str, flips: int
) -> None:
    path = saved / name
    whole, chance = path.read_bytes(), random.Random(0)
    for _ in range(flips):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=name):
            WeightDelta.load(saved)
    path.write_bytes(whole)
    WeightDelta.load(saved)


@pytest.mark.parametrize("name", ["delta.safetensors", "manifest.json"])
@pytest.mark.parametrize("cuts", [300, pytest.param(10**9, marks=pytest.mark.stress)])
def test_every_truncation_is_refused_with_the_name_of_the_file(
    saved: Path, name: str, cuts: int
) -> None:
    path = saved / name
    whole = path.read_bytes()
    lengths = {*range(0, len(whole), max(1, len(whole) // cuts)), len(whole) - 1, 1, 7, 8, 9}
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match=name):
            WeightDelta.load(saved)


def test_a_damaged_tensor_file_is_refused_with_both_hashes(saved: Path) -> None:
    path = saved / "delta.safetensors"
    recorded = json.loads((saved / "manifest.json").read_text())["files"]["delta.safetensors"]
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match=rf"delta\.safetensors.*{recorded}.*[0-9a-f]{{64}}"):
        WeightDelta.load(saved)


def test_the_file_of_another_delta_is_refused(
    saved: Path, pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    _low_rank_delta(pipe, seed=5).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "delta.safetensors", saved / "delta.safetensors")
    with pytest.raises(ArtifactError, match=r"delta\.safetensors"):
        WeightDelta.load(saved)


def test_a_pickle_beside_or_instead_is_never_opened(saved: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    (saved / "delta.bin").write_bytes(pickle.dumps(Trap()))
    WeightDelta.load(saved)
    (saved / "delta.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"delta\.bin.*expected.*delta\.safetensors"):
        WeightDelta.load(saved)
    (saved / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"delta\.bin.*not opened"):
        WeightDelta.load(saved)
    assert not (tmp_path / "sprung").exists()


def test_a_failed_save_keeps_the_old_delta(
    saved: Path, pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    new = _low_rank_delta(pipe, seed=3)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ArtifactError, match="No space left"):
        new.save(saved)
    monkeypatch.undo()
    assert WeightDelta.load(saved).meta.settings == {"seed": 0}


def _save_alternately(
    folder: Path, deltas: tuple[WeightDelta, WeightDelta], times: int = 40
) -> None:
    for index in range(times):
        deltas[index % 2].save(folder)


@pytest.mark.stress
def test_four_readers_meet_whole_deltas_while_eight_write(
    pipe: StableDiffusionPipeline, saved: Path
) -> None:
    deltas = (_low_rank_delta(pipe, 0), _low_rank_delta(pipe, 1))
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_save_alternately, args=(saved, deltas, 200)) for _ in range(8)
    ] + [context.Process(target=_load_often, args=(saved, deltas, 1000)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 12


def _load_often(folder: Path, deltas: tuple[WeightDelta, WeightDelta], times: int) -> None:
    for _ in range(times):
        _load_one_of(folder, deltas)


def _load_one_of(folder: Path, deltas: tuple[WeightDelta, WeightDelta]) -> None:
    """Load a delta and see that it is one of `deltas`, whole."""
    loaded = WeightDelta.load(folder)
    expected = deltas[loaded.meta.settings["seed"]].deltas["text_encoder"][_FC]
    found = loaded.deltas["text_encoder"][_FC]
    assert isinstance(expected, LowRank) and isinstance(found, LowRank)
    assert torch.equal(found.down, expected.down)


def test_a_reader_meets_a_whole_delta_while_others_write(
    pipe: StableDiffusionPipeline, saved: Path
) -> None:
    deltas = (_low_rank_delta(pipe, 0), _low_rank_delta(pipe, 1))
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_save_alternately, args=(saved, deltas)) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        _load_one_of(saved, deltas)
    assert [writer.exitcode for writer in writers] == [0, 0]


def test_a_killed_writer_leaves_a_whole_delta(pipe: StableDiffusionPipeline, saved: Path) -> None:
    deltas = (_low_rank_delta(pipe, 0), _low_rank_delta(pipe, 1))
    chance = random.Random(0)
    for _ in range(8):
        writer = multiprocessing.get_context("fork").Process(
            target=_save_alternately, args=(saved, deltas)
        )
        writer.start()
        time.sleep(0.01 + 0.04 * chance.random())
        writer.kill()
        writer.join()
        WeightDelta.load(saved)
