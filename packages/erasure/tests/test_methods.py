import pytest

from unweave.diffusion_core.errors import ArtifactError, PromptError, SelectionError
from unweave.diffusion_core.parameters import fingerprint
from unweave.diffusion_core.testing import tiny_pipeline
from unweave.erasure import METHODS, RECIPES, Erasure, ErasureRequest, make_eraser

STEPS = {"num_inference_steps": 2, "num_steps": 2}
SETTINGS = {
    "few-shot": {"lr": 1e-3, "epochs": 2, "num_inference_steps": 2},
    "doco": {"num_images": 4, "warm_up": 1, "batch_size": 2, "views": 1, **STEPS},
    "all-but-one": {"num_trajectories": 2, **STEPS},
    "esd": {"lr": 1e-3, **STEPS},
    "uce": {},
    "rece": {},
    "concept-ablation": {"num_images": 4, "batch_size": 2, "views": 1, **STEPS},
    "spm": {"num_trajectories": 2, **STEPS},
    "mace": {"num_images": 2, "batch_size": 2, **STEPS},
}
"""All methods but co-erasing, which needs an IP-Adapter and has these tests of its own."""

REQUEST = ErasureRequest("cat", replacement="dog", preserve=("rocket",))


def prints(pipe):
    return [fingerprint(module) for module in (pipe.unet, pipe.text_encoder, pipe.vae)]


@pytest.mark.parametrize("name", SETTINGS)
def test_revert_restores_bit_identical_weights(pipe, name, tmp_path):
    before = prints(pipe)
    erasure = make_eraser(name, **SETTINGS[name]).erase(pipe, REQUEST, progress=False)
    assert prints(pipe) == before
    erasure.apply(pipe, strength=0.7)
    assert prints(pipe) != before
    erasure.revert(pipe)
    assert prints(pipe) == before
    erasure.save(tmp_path / "erasure")
    with Erasure.load(tmp_path / "erasure").apply(pipe):
        assert prints(pipe) != before
    assert prints(pipe) == before


@pytest.mark.parametrize("name", SETTINGS)
def test_erasing_restores_what_requires_gradients(pipe, name):
    modules = (pipe.unet, pipe.text_encoder, pipe.vae)
    flags = [[p.requires_grad for p in module.parameters()] for module in modules]
    make_eraser(name, **SETTINGS[name]).erase(pipe, REQUEST, progress=False)
    assert [[p.requires_grad for p in module.parameters()] for module in modules] == flags
    assert all(p.grad is None for module in modules for p in module.parameters())


@pytest.mark.parametrize("name", SETTINGS)
def test_round_trip_keeps_request_history_and_method(pipe, name, tmp_path):
    erasure = make_eraser(name, **SETTINGS[name]).erase(pipe, REQUEST, progress=False)
    erasure.save(tmp_path / "erasure")
    loaded = Erasure.load(tmp_path / "erasure")
    assert loaded.request == REQUEST
    assert loaded.history == erasure.history
    assert loaded.delta.meta.method == name
    loaded.save(tmp_path / "again")
    assert (loaded.text_encoder() is None) == (name != "few-shot")


def test_every_method_is_tested_here_or_says_why_not():
    assert METHODS.keys() - SETTINGS.keys() == {"co-erasing"}


def test_erasures_of_two_methods_add_up_and_come_off_in_any_order(pipe):
    before = prints(pipe)
    first = make_eraser("uce").erase(pipe, REQUEST)
    first.apply(pipe)
    second = make_eraser("esd", **SETTINGS["esd"]).erase(
        pipe, ErasureRequest("pizza"), progress=False
    )
    second.apply(pipe)
    first.revert(pipe)
    second.revert(pipe)
    assert prints(pipe) == before


def test_erasure_refuses_another_base_model(pipe):
    erasure = make_eraser("uce").erase(pipe, REQUEST)
    with pytest.raises(ArtifactError, match="base model"):
        erasure.apply(tiny_pipeline(seed=1))


def test_unknown_methods_and_settings_are_named():
    with pytest.raises(SelectionError, match="few-shot"):
        make_eraser("fewshot")
    with pytest.raises(SelectionError, match="did you mean 'epochs'"):
        make_eraser("few-shot", epoch=3)


def test_recipes_hold_valid_settings_and_can_be_overridden():
    for model, methods in RECIPES.items():
        for name, kinds in methods.items():
            for kind, settings in kinds.items():
                config = make_eraser(name, model, kind).config
                assert all(getattr(config, key) == value for key, value in settings.items())
    anchors = make_eraser("uce", "emoji-world").config.anchors
    assert {"", "a cat face", "an octopus"} < set(anchors) and len(anchors) == 41
    assert "a cat face, fluent style" in make_eraser("uce", "emoji-world", "style").config.anchors
    with pytest.raises(SelectionError, match="kind"):
        make_eraser("uce", "emoji-world", "person")
    assert make_eraser("few-shot", model="emoji-world", lr=0.5).config.lr == 0.5
    assert make_eraser("few-shot").config.lr == 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": " "}, "`target`"),
        ({"target": "cat", "preserve": "dog"}, "tuple"),
        ({"target": "cat", "preserve": ("dog", "")}, "`preserve`"),
        ({"target": "cat", "preserve": ("Cat",)}, "erased and preserved"),
        ({"target": "cat", "replacement": "cat"}, "replaced by itself"),
        ({"target": "cat", "kind": "thing"}, "`kind`"),
    ],
)
def test_bad_requests_are_named(arguments, message):
    with pytest.raises(PromptError, match=message):
        ErasureRequest(**arguments)


def test_epochs_that_were_not_kept_are_refused(pipe):
    erasure = make_eraser("uce").erase(pipe, REQUEST)
    with pytest.raises(ArtifactError, match="`epoch`"):
        erasure.at_epoch(1)
