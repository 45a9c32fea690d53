"""Claims about the leaderboard: hand-computed scores, and erasers ranked on the toy world."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from unweave.diffusion_core.errors import PromptError, UnweaveError
from unweave.diffusion_core.parameters import fingerprint
from unweave.diffusion_core.toy_world import BACKGROUNDS
from unweave.erasure import make_eraser
from unweave.erasure.bench_command import erase_bench
from unweave.erasure.leaderboard import (
    Canvas,
    CanvasScores,
    Leaderboard,
    Row,
    canvas_scores,
    harmonic_mean,
    rank_erasers,
    save_leaderboard,
)

COLOURS = torch.tensor(list(BACKGROUNDS.values()))


@pytest.fixture(scope="module")
def canvas(toy_world):
    def object_judge(images, name):
        return toy_world.classify(images) == toy_world.concepts.index(name)

    def style_judge(images, name):
        nearest = torch.cdist(images.mean((2, 3)), COLOURS).argmin(1)
        return nearest == toy_world.backgrounds.index(name)

    return Canvas(
        toy_world.concepts,
        toy_world.backgrounds,
        {"object": object_judge, "style": style_judge},
        template="a {object} on {style}",
        seeds=(1, 2, 3),
        settings={"num_inference_steps": 12, "guidance_scale": 3.0, "batch_size": 96},
    )


@pytest.fixture(scope="module")
def board(toy_world, canvas):
    pipe = toy_world.pipeline()
    before = fingerprint(pipe.unet)
    uce = make_eraser("uce", templates=("a {}", "a photo of a {}"))
    weak = make_eraser("uce", regularisation=1e6)
    erasers = {"uce": {"object": uce, "style": uce}, "weak": {"object": weak, "style": weak}}
    targets = [("cat", "object"), ("dog", "object"), ("tree", "object")]
    result = rank_erasers(pipe, erasers, targets, canvas, progress=False)
    assert fingerprint(pipe.unet) == before
    return result


def test_scores_of_a_hand_made_canvas():
    objects = torch.ones(3, 2, 2, dtype=torch.bool)
    styles = torch.ones(3, 2, 2, dtype=torch.bool)
    objects[0, :, 0] = False
    objects[1, 0, 0] = False
    styles[0] = False
    styles[2, 1, 1] = False
    scores = canvas_scores({"object": objects, "style": styles}, 0, "object")
    assert (scores.ua, scores.ira, scores.cra) == (0.5, 7 / 8, 7 / 8)
    scores = canvas_scores({"object": objects, "style": styles}, 1, "style")
    assert scores.ua == pytest.approx(1 - 3 / 6)
    assert scores.ira == pytest.approx(4 / 6)
    assert scores.cra == pytest.approx(4 / 6)


def test_harmonic_mean_of_mace_computed_by_hand():
    assert harmonic_mean((0.9, 0.6, 0.45)) == pytest.approx(3 / (1 / 0.9 + 1 / 0.6 + 1 / 0.45))
    with pytest.raises(UnweaveError, match=r"1\.2"):
        harmonic_mean((1.2,))


def test_the_untouched_toy_is_recognised(board):
    for scores in board.before.values():
        assert scores.ua < 0.4 and scores.ira > 0.6 and scores.cra > 0.4


def test_an_eraser_that_erases_is_above_one_that_does_not(board):
    assert board.methods() == ["uce", "weak"]
    assert board.mean("uce", "ua")[0] > 0.6 > 0.2 > board.mean("weak", "ua")[0]
    assert board.mean("uce", "cra")[0] > 0.5


def test_saved_files_hold_every_row(board, tmp_path):
    save_leaderboard(board, tmp_path)
    stored = json.loads((tmp_path / "leaderboard.json").read_text())
    assert len(stored["rows"]) == 6 and set(stored["means"]) == {"uce", "weak"}
    table = (tmp_path / "leaderboard.md").read_text().splitlines()
    assert table[2].startswith("| `uce` |") and len(table) == 4
    assert (tmp_path / "leaderboard.png").read_bytes().startswith(b"\x89PNG")


def test_ties_keep_the_order_and_unknown_methods_are_named():
    row = Row("esd", "cat", "object", CanvasScores(1, 1, 1), 1.0, 10)
    board = Leaderboard((row,), {}, {})
    assert board.mean("esd", "stored_bytes") == (10.0, None)
    with pytest.raises(UnweaveError, match="'spm'"):
        board.mean("spm", "ua")


def test_targets_must_be_on_the_canvas(toy_world, canvas):
    with pytest.raises(PromptError, match="'zebra' is no object"):
        rank_erasers(toy_world.pipeline(), {}, [("zebra", "object")], canvas)
    with pytest.raises(PromptError, match="template"):
        Canvas(("a", "b"), ("c", "d"), {}, template="{object}")


def test_the_command_writes_a_leaderboard_of_the_embedded_model(tmp_path):
    world = pytest.importorskip("unweave.emoji_world").World
    app = typer.Typer()
    app.command()(erase_bench)
    arguments = ["--method", "uce", "--target", "panda", "--objects", "2", "--json"]
    arguments += ["--style", world.styles[0], "--out", str(tmp_path / "board")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed == json.loads((tmp_path / "board" / "leaderboard.json").read_text())
    assert [(row["target"], row["kind"]) for row in printed["rows"]] == [
        ("panda", "object"),
        (world.styles[0], "style"),
    ]
    again = CliRunner().invoke(app, arguments)
    assert "exists already" in str(again.exception)
