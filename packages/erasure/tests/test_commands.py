"""The commands erase, show what they did, and refuse bad input on one line before any damage."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from unweave.diffusion_core import pipelines
from unweave.diffusion_core.pipelines import base_model_hash
from unweave.diffusion_core.testing import tiny_pipeline
from unweave.erasure import Erasure, commands, erase_run

cli = pytest.importorskip("unweave.cli")
emoji_world = pytest.importorskip("unweave.emoji_world")

QUICK = ("--seeds", "2", "--steps", "2")
ERASE_CAT = ("erase", "cat face", "--method", "uce", *QUICK)
RESULT_KEYS = {"method", "target", "seconds", "target_rate", "preserved", "files"}


@pytest.fixture
def unweave(tmp_path, monkeypatch):
    """Return a function that runs a command line in an empty folder."""
    app = typer.Typer(cls=cli.CommandGroup)
    app.callback()(lambda: None)
    for function in (commands.erase, commands.generate, commands.methods, commands.models):
        app.command(function.__name__)(function)
    monkeypatch.chdir(tmp_path)

    def run(*args: object):
        return CliRunner().invoke(app, [str(arg) for arg in args])

    return run


@pytest.fixture
def shipped(monkeypatch):
    """Put a tiny pipeline and a judge of brightness in the place of emoji-world's."""
    monkeypatch.setattr(pipelines, "load_pipeline", lambda *_, **__: tiny_pipeline())
    monkeypatch.setattr(erase_run, "load_judge", lambda kind: bright)


@pytest.fixture(scope="session")
def saved_pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def saved_erasure(unweave, shipped, tmp_path) -> Path:
    succeed(unweave(*ERASE_CAT, "--replacement", "rocket", "--out", "runs/cat"))
    return tmp_path / "runs/cat"


def bright(images: torch.Tensor, concept: str) -> torch.Tensor:
    return images.mean((1, 2, 3)) > 0.5


def succeed(result):
    assert result.exit_code == 0, result.output
    return result


def refused(result, *named: str) -> None:
    """Check for status 2, nothing on stdout and one line on stderr with the named parts."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    for part in named:
        assert part in line


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.mark.parametrize("method", ["few-shot", "uce"])
def test_erase_writes_report_grid_and_weights(unweave, shipped, tmp_path, method):
    result = succeed(
        unweave("erase", "cat face", "--method", method, "--preserve", "dog face",
                "--preserve", "pizza", "--out", "runs/cat", "--json", *QUICK)
    )  # fmt: skip
    found = json.loads(result.stdout)
    assert set(found) == RESULT_KEYS
    assert (found["method"], found["target"]) == (method, "cat face")
    assert set(found["preserved"]) == {"dog face", "pizza"}
    for rate in (found["target_rate"], *found["preserved"].values()):
        assert 0 <= rate["before"] <= 1 and 0 <= rate["after"] <= 1
    files = {name: tmp_path / path for name, path in found["files"].items()}
    assert "data:image/png" in files["report"].read_text()
    assert files["grid"].read_bytes().startswith(b"\x89PNG")
    erasure = Erasure.load(files["weights"])
    assert erasure.request.preserve == ("dog face", "pizza")
    pipe = tiny_pipeline()
    before = base_model_hash(pipe)
    with erasure.apply(pipe):
        pass
    assert base_model_hash(pipe) == before


def test_json_is_the_only_thing_on_stdout_even_when_a_library_prints(unweave, shipped, monkeypatch):
    def talkative(*_, **__):
        print("a library says hello")
        return tiny_pipeline()

    monkeypatch.setattr(pipelines, "load_pipeline", talkative)
    result = succeed(unweave(*ERASE_CAT, "--json"))
    assert result.stdout.count("\n") == 1
    json.loads(result.stdout)
    assert "a library says hello" in result.stderr


def test_without_json_a_table_and_the_paths_are_printed(unweave, shipped):
    result = succeed(unweave(*ERASE_CAT, "--preserve", "rocket"))
    for part in ("cat face", "rocket", "runs/cat-face/report.html", "runs/cat-face/grid.png"):
        assert part in result.stdout.replace(os.sep, "/")


def test_the_same_seed_gives_the_same_weights(unweave, shipped, tmp_path):
    for out in ("first", "second"):
        succeed(unweave("erase", "cat face", "--out", out, "--seed", "3", *QUICK))
    first, second = (digests(tmp_path / out / "weights") for out in ("first", "second"))
    assert first == second


def test_an_earlier_output_is_replaced(unweave, saved_erasure):
    succeed(unweave(*ERASE_CAT, "--preserve", "pizza", "--out", saved_erasure))
    assert Erasure.load(saved_erasure / "weights").request.preserve == ("pizza",)


def test_styles_are_judged_as_styles(unweave, shipped, monkeypatch):
    class Recogniser:
        concepts = ("cat face",)

        def styles(self, images):
            return torch.full((len(images),), emoji_world.World.styles.index("twemoji"))

    monkeypatch.undo()
    monkeypatch.setattr(emoji_world, "load_recogniser", Recogniser)
    judge = erase_run.load_judge("style")
    images = torch.zeros(3, 3, 64, 64)
    assert judge(images, "twemoji").tolist() == [True] * 3
    assert judge(images, "noto").tolist() == [False] * 3


def test_erasing_a_style_uses_prompts_in_that_style(unweave, shipped, tmp_path):
    succeed(
        unweave("erase", "noto", "--kind", "style", "--method", "uce", "--preserve", "twemoji",
                "--out", "runs/noto", *QUICK)
    )  # fmt: skip
    numbers = json.loads((tmp_path / "runs/noto/numbers.json").read_text())
    assert "a rocket, noto style" in numbers["settings"]["prompts"]["noto"]


def test_images_to_judge_share_no_seed_with_images_to_learn_from(unweave, shipped, tmp_path):
    succeed(unweave(*ERASE_CAT, "--seed", "5", "--out", "runs/cat"))
    numbers = json.loads((tmp_path / "runs/cat/numbers.json").read_text())
    assert numbers["settings"]["seeds"] == [1005, 1006]


def test_options_may_come_from_a_file_and_the_command_line_wins(unweave, shipped, tmp_path):
    (tmp_path / "run.toml").write_text(
        'method = "uce"\npreserve = "dog face"\nsteps = 9\nseeds = 3\n'
        "[settings]\nregularisation = 0.25\n"
    )
    result = succeed(
        unweave("erase", "cat face", "--config", "run.toml", "--steps", "2", "--dry-run", "--json")
    )
    plan = json.loads(result.stdout)
    assert (plan["method"], plan["preserve"]) == ("uce", ["dog face"])
    assert (plan["steps"], plan["seeds"]) == (2, 3)
    assert plan["settings"] == {"regularisation": 0.25}


def test_a_dry_run_writes_nothing(unweave, shipped, tmp_path):
    result = succeed(unweave(*ERASE_CAT, "--dry-run"))
    assert "nothing was written" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_finds_what_a_run_would_refuse(unweave, shipped):
    refused(unweave("erase", "cat fase", "--dry-run"), "cat fase", "cat face")


def test_another_model_without_a_judge_gets_pictures_and_no_rates(
    unweave, saved_pipeline, tmp_path
):
    result = succeed(
        unweave(*ERASE_CAT, "--preserve", "a dog", "--model", saved_pipeline, "--judge", "none",
                "--out", "runs/cat", "--json")
    )  # fmt: skip
    found = json.loads(result.stdout)
    assert set(found) == RESULT_KEYS
    assert found["target_rate"] == {"before": None, "after": None}
    assert found["preserved"] == {"a dog": {"before": None, "after": None}}
    assert "no rates were measured" in result.stderr
    assert all((tmp_path / path).exists() for path in found["files"].values())


def test_the_weights_change_a_plain_diffusers_pipeline_as_generate_does(
    unweave, saved_pipeline, tmp_path
):
    model = ("--model", saved_pipeline)
    succeed(unweave(*ERASE_CAT, *model, "--judge", "none", "--out", "cat"))
    succeed(unweave("generate", "a cat", *model, "--apply", "cat", "--steps", "2", "--out", "a"))
    script = (
        "import sys, torch\n"
        "from diffusers import StableDiffusionPipeline\n"
        "pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], use_safetensors=True,\n"
        "    local_files_only=True, safety_checker=None, requires_safety_checker=False)\n"
        "name = 'pytorch_lora_weights.safetensors'\n"
        "pipe.load_lora_weights('cat/weights', weight_name=name, use_safetensors=True)\n"
        "image = pipe('a cat', num_inference_steps=2, guidance_scale=7.5,\n"
        "    generator=torch.Generator().manual_seed(0)).images[0]\n"
        "image.save('plain.png')\n"
        "assert not [m for m in sys.modules if m.startswith('unweave')]\n"
    )
    subprocess.run([sys.executable, "-c", script, str(saved_pipeline)], check=True, cwd=tmp_path)
    first, second = pixels(tmp_path / "a/a-cat-0.png"), pixels(tmp_path / "plain.png")
    assert (first - second).abs().max() <= 1


def pixels(path: Path) -> torch.Tensor:
    import numpy as np
    from PIL import Image

    return torch.tensor(np.asarray(Image.open(path).convert("RGB")).astype(int))


def test_generate_prints_the_paths_of_images_that_depend_on_their_seed_only(
    unweave, shipped, tmp_path
):
    quick = ("generate", "A cat!", "--steps", "2")
    result = succeed(unweave(*quick, "--seed", "4", "--count", "2", "--out", "two"))
    assert result.stdout.split() == [str(Path("two/a-cat-4.png")), str(Path("two/a-cat-5.png"))]
    succeed(unweave(*quick, "--seed", "5", "--out", "one"))
    alone, beside = pixels(tmp_path / "one/a-cat-5.png"), pixels(tmp_path / "two/a-cat-5.png")
    assert (alone - beside).abs().max() <= 1


def test_generate_applies_an_erasure_with_its_strength(unweave, saved_erasure, tmp_path):
    quick = ("generate", "a cat face", "--steps", "2", "--out")
    succeed(unweave(*quick, "plain"))
    for strength in ("0", "1"):
        apply = ("--apply", saved_erasure, "--strength", strength)
        succeed(unweave(*quick, f"strength-{strength}", *apply))
    plain, none, whole = (
        pixels(tmp_path / folder / "a-cat-face-0.png")
        for folder in ("plain", "strength-0", "strength-1")
    )
    assert torch.equal(plain, none)
    assert not torch.equal(plain, whole)


def test_methods_and_models_are_listed(unweave):
    assert {"few-shot", "uce", "esd"} <= set(json.loads(unweave("methods", "--json").stdout))
    assert "few-shot" in succeed(unweave("methods")).stdout
    assert "emoji-world" in json.loads(unweave("models", "--json").stdout)
    assert "emoji-world" in succeed(unweave("models")).stdout


@pytest.mark.parametrize("command", ["erase", "generate"])
@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_prompt_is_refused(unweave, shipped, command, text):
    refused(unweave(command, text), repr(text))


def test_an_unknown_concept_is_refused_with_the_closest(unweave, shipped):
    refused(unweave("erase", "cat fce"), "'cat fce'", "'cat face'")
    refused(unweave("erase", "cat face", "--preserve", "rockett"), "'rockett'", "'rocket'")
    refused(unweave("erase", "nooto", "--kind", "style"), "'nooto'", "'noto'")


def test_an_unknown_method_or_setting_is_refused(unweave, shipped, tmp_path):
    refused(unweave("erase", "cat face", "--method", "magic"), "'magic'", "few-shot")
    (tmp_path / "run.toml").write_text("[settings]\nlrr = 1\n")
    refused(unweave("erase", "cat face", "--config", "run.toml"), "'lrr'", "'lr'")


@pytest.mark.parametrize(
    ("text", "named"),
    [("methd = 'uce'", "'method'"), ("[", "no TOML"), ("settings = 1", "table")],
)
def test_a_bad_config_file_is_refused(unweave, shipped, tmp_path, text, named):
    (tmp_path / "run.toml").write_text(text)
    refused(unweave("erase", "cat face", "--config", "run.toml"), "run.toml", named)


def test_a_missing_config_file_is_refused(unweave, shipped):
    refused(unweave("erase", "cat face", "--config", "none.toml"), "none.toml")


def test_a_wrong_model_path_is_refused(unweave, tmp_path):
    refused(unweave(*ERASE_CAT, "--model", "./nowhere", "--judge", "none"), "./nowhere")
    refused(unweave("generate", "a cat", "--model", "./nowhere"), "./nowhere")
    (tmp_path / "empty").mkdir()
    refused(unweave("generate", "a cat", "--model", "empty"), "empty", "model_index.json")


def test_another_model_needs_the_choice_of_no_judge(unweave, saved_pipeline):
    refused(unweave(*ERASE_CAT, "--model", saved_pipeline), "--judge none")
    refused(unweave(*ERASE_CAT, "--judge", "me"), "'me'", "recogniser")


def test_a_corrupt_or_missing_delta_is_refused(unweave, saved_erasure):
    path = saved_erasure / "weights/delta.safetensors"
    data = bytearray(path.read_bytes())
    for damaged in (data[:-5], data[:-1] + bytes([data[-1] ^ 1])):
        path.write_bytes(damaged)
        refused(unweave("generate", "a cat", "--apply", saved_erasure), "delta.safetensors")
    path.unlink()
    refused(unweave("generate", "a cat", "--apply", saved_erasure), "delta.safetensors")
    refused(unweave("generate", "a cat", "--apply", "nowhere"), "'nowhere'")


def test_a_delta_of_another_base_model_is_refused(unweave, saved_erasure, monkeypatch, tmp_path):
    other = tiny_pipeline(seed=1)
    monkeypatch.setattr(pipelines, "load_pipeline", lambda *_, **__: other)
    refused(unweave("generate", "a cat", "--apply", saved_erasure), base_model_hash(other))
    assert not (tmp_path / "runs/images").exists()


def test_images_that_are_no_images_are_refused(unweave, shipped, tmp_path):
    folder = tmp_path / "images"
    few_shot = ("erase", "cat face", "--images")
    refused(unweave(*few_shot, folder), "images", "does not exist")
    folder.mkdir()
    refused(unweave(*few_shot, folder), "holds no files")
    (folder / "cat.png").write_text("meow")
    refused(unweave(*few_shot, folder), "cat.png")
    refused(unweave(*few_shot, folder, "--method", "uce"), "--images", "few-shot")


def test_few_shot_learns_from_a_folder_of_images(unweave, shipped, tmp_path, images):
    folder = tmp_path / "images"
    folder.mkdir()
    for index, image in enumerate(images):
        image.save(folder / f"{index}.png")
    succeed(unweave("erase", "cat face", "--images", folder, "--out", "runs/cat", *QUICK))
    settings = Erasure.load(tmp_path / "runs/cat/weights").delta.meta.settings
    assert settings["image_source"] == "given"


def test_a_folder_with_other_files_is_never_replaced(unweave, shipped, tmp_path, saved_erasure):
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("years of work")
    refused(unweave(*ERASE_CAT, "--out", foreign), "thesis")
    refused(unweave(*ERASE_CAT, "--out", foreign / "chapter.txt"), "chapter.txt")
    (saved_erasure / "notes.txt").write_text("mine")
    refused(unweave(*ERASE_CAT, "--out", saved_erasure), "notes.txt")
    assert (foreign / "chapter.txt").read_text() == "years of work"
    assert (saved_erasure / "notes.txt").read_text() == "mine"


def test_generate_overwrites_no_image(unweave, shipped, tmp_path):
    quick = ("generate", "a cat", "--steps", "2", "--out", "images")
    succeed(unweave(*quick))
    before = digests(tmp_path)
    refused(unweave(*quick, "--guidance", "1"), "a-cat-0.png")
    assert digests(tmp_path) == before


def test_a_full_disk_is_told_and_keeps_what_was_saved(unweave, saved_erasure, monkeypatch):
    before = digests(saved_erasure.parent)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = unweave(*ERASE_CAT, "--preserve", "pizza", "--out", saved_erasure)
    refused(result, "No space left on device", "free some space")
    refused(unweave("generate", "a cat", "--steps", "1"), "No space left", "a-cat-0.png")
    monkeypatch.undo()
    assert digests(saved_erasure.parent) == before | digests(saved_erasure.parent)
    assert {path.name for path in saved_erasure.parent.iterdir()} <= {"cat", "images"}
    assert Erasure.load(saved_erasure / "weights").request.preserve == ()


def test_a_failing_judge_leaves_the_earlier_output(unweave, saved_erasure, monkeypatch):
    before = digests(saved_erasure)
    monkeypatch.setattr(erase_run, "load_judge", lambda kind: lambda images, concept: images)
    refused(unweave(*ERASE_CAT, "--out", saved_erasure), "`judge`")
    assert digests(saved_erasure) == before


def test_an_output_folder_in_use_is_refused(unweave, shipped, tmp_path):
    from unweave.diffusion_core.files import folder_lock

    with folder_lock(tmp_path / "busy"):
        refused(unweave(*ERASE_CAT, "--out", "busy"), "busy", str(os.getpid()))


def test_a_model_that_is_not_shipped_says_how_to_make_it(unweave, monkeypatch):
    from unweave.emoji_world import models

    monkeypatch.setattr(models, "MODELS_PATH", Path("nowhere"))
    models.load_recogniser.cache_clear()
    refused(unweave(*ERASE_CAT), "recogniser")


def test_importing_the_package_does_not_import_typer():
    script = "import sys, unweave.erasure; sys.exit('typer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
