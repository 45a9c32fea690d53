"""The commands, end to end on the embedded pipeline."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from unweave.attention_tools import AttentionMaps, TokenError
from unweave.attention_tools.commands import attend

PROMPT = "a cat face and a rocket on a red background"
WORDS = ("--word", "cat face", "--word", "rocket")


def run(*arguments):
    """Run a command with few steps; errors are raised as they are."""
    options = {"catch_exceptions": False, "standalone_mode": False}
    result = CliRunner().invoke(attend, [*arguments, "--steps", "2"], **options)
    if result.exception is not None:
        raise result.exception
    return result


def test_maps_are_drawn_and_kept(tmp_path):
    result = run("maps", PROMPT, *WORDS, "--out", str(tmp_path))
    assert [line.rpartition("/")[2] for line in result.stdout.splitlines()] == [
        *("image.png", "maps.png", "layers.png", "maps.npz", "report.html", "result.json"),
    ]
    assert AttentionMaps.load(tmp_path / "maps.npz").names == ("cat face", "rocket")
    told = json.loads((tmp_path / "result.json").read_text())
    assert told["words"] == ["cat face", "rocket"] and told["seed"] == 0


def test_maps_move_with_animate_and_the_report_holds_all_pictures(tmp_path):
    from PIL import Image

    run("maps", PROMPT, "--animate", "--out", str(tmp_path))
    with Image.open(tmp_path / "steps.gif") as moving:
        assert moving.n_frames == 2
    assert AttentionMaps.load(tmp_path / "maps.npz").steps == [0, 1]
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert page.count("data:image/gif;base64,") == 1
    assert "cat face and rocket" in page and PROMPT in page
    assert json.loads((tmp_path / "result.json").read_text())["words"] == ["cat face", "rocket"]


def test_without_words_the_subjects_of_the_prompt_are_composed(tmp_path):
    prompt = "a red apple and a dog face on a blue background"
    run("compose", prompt, "--samples", "1", "--out", str(tmp_path))
    told = json.loads((tmp_path / "result.json").read_text())
    assert told["words"] == ["red apple", "dog face"]
    with pytest.raises(TokenError, match="no subject was found"):
        run("compose", "in the dark", "--out", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("method", ["a-star", "attend-and-excite", "t2i-zero"])
def test_methods_are_shown_beside_the_plain_pipeline(tmp_path, method):
    from PIL import Image

    run("compose", PROMPT, *WORDS, "--method", method, "--samples", "2", "--out", str(tmp_path))
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.size == (2 * 68, 2 * 68)


def test_an_anagram_is_written_with_its_views(tmp_path):
    prompts = ("a turtle on a red background", "a cactus on a red background")
    views = ("--view", "identity", "--view", "rotate_cw")
    run("anagram", *prompts, *views, "--out", str(tmp_path))
    told = json.loads((tmp_path / "result.json").read_text())
    assert told["views"] == ["identity", "rotate_cw"] and len(told["steps"]) == 2
    assert (tmp_path / "views.png").exists()


def test_a_word_that_is_not_in_the_prompt_is_named(tmp_path):
    with pytest.raises(TokenError, match="'dog' is not among the words"):
        run("maps", PROMPT, "--word", "dog", "--out", str(tmp_path))
    assert not list(tmp_path.iterdir())
