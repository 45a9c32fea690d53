import pytest
import torch

from unweave.diffusion_core.parameters import fingerprint, select_parameters
from unweave.diffusion_core.prompts import encode_prompts
from unweave.erasure.closed_form import closed_form_edit
from unweave.erasure.protocol import Erasure, ErasureRequest
from unweave.erasure.uce import (
    UCE,
    UCE_TEMPLATES,
    UCEConfig,
    anchor_states,
    last_subject_token,
    subject_states,
)

REQUEST = ErasureRequest("cat", replacement="dog", preserve=("rocket", "pizza"))


def unet_output(pipe, prompt="a cat"):
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 4, 16, 16, generator=generator)
    with torch.no_grad():
        return pipe.unet(noisy, 500, encode_prompts(pipe, [prompt])).sample


def erase(pipe, request=REQUEST, **settings):
    return UCE(UCEConfig(**settings)).erase(pipe, request)


def test_only_keys_and_values_of_cross_attention_change(pipe):
    before = fingerprint(pipe.unet), fingerprint(pipe.text_encoder), fingerprint(pipe.vae)
    erasure = erase(pipe)
    assert fingerprint(pipe.unet) == before[0]
    erasure.apply(pipe)
    after = fingerprint(pipe.unet)
    changed = {name for name in after if after[name] != before[0][name]}
    assert changed == set(select_parameters(pipe.unet, "cross-attention-kv"))
    assert (fingerprint(pipe.text_encoder), fingerprint(pipe.vae)) == before[1:]


def test_keys_and_values_of_the_concept_become_those_of_the_guide(pipe):
    erasure = erase(pipe, regularisation=1e-4)
    weights = select_parameters(pipe.unet, "cross-attention-kv")
    old = {name: weight.detach().clone() for name, weight in weights.items()}
    target, guide, kept = (
        subject_states(pipe, "{}", name, "last-subject-token") for name in ("cat", "dog", "pizza")
    )
    with erasure.apply(pipe):
        for name, weight in weights.items():
            reached, wanted = target @ weight.T, guide @ old[name].T
            assert (reached - wanted).norm() < 1e-3 * wanted.norm()
            assert (kept @ weight.T - kept @ old[name].T).norm() < 1e-3 * wanted.norm()


def test_lora_file_gives_the_same_output_in_diffusers_own_loader(pipe, tmp_path):
    from unweave.diffusion_core.testing import tiny_pipeline

    erasure = erase(pipe)
    erasure.save(tmp_path / "erasure")
    original = unet_output(pipe)
    with erasure.apply(pipe):
        dense = unet_output(pipe)
    other = tiny_pipeline()
    other.load_lora_weights(
        tmp_path / "erasure", weight_name="pytorch_lora_weights.safetensors", use_safetensors=True
    )
    torch.testing.assert_close(unet_output(other), dense, rtol=0, atol=1e-5)
    assert (dense - original).abs().max() > 1e-3


def test_erasure_has_low_rank_and_one_shared_factor(pipe):
    erasure = erase(pipe)
    assert erasure.delta.low_rank
    changes = list(erasure.delta.deltas["unet"].values())
    assert all(change.rank == 1 for change in changes)
    assert all(torch.equal(change.down, changes[0].down) for change in changes)


@pytest.mark.parametrize("templates", [("{}",), UCE_TEMPLATES])
@pytest.mark.parametrize("positions", ["last-subject-token", "from-last-subject-token"])
def test_rank_counts_edited_states(pipe, templates, positions):
    edit = UCE(UCEConfig(templates=templates, positions=positions)).solve(pipe, REQUEST)
    if positions == "last-subject-token":
        assert len(edit.down) == len(templates)
    else:
        assert len(edit.down) == sum(
            77 - last_subject_token(pipe, text.format("cat"), "cat") for text in templates
        )


def test_empty_guide_is_the_state_before_the_end_token(pipe):
    states = encode_prompts(pipe, [""])[0]
    found = subject_states(pipe, "{}", "", "last-subject-token")
    assert torch.equal(found, states[:1])


def test_default_guide_depends_on_the_kind(pipe):
    downs, differences = [], []
    for request in (
        ErasureRequest("cat"),
        ErasureRequest("cat", replacement=""),
        ErasureRequest("cat", kind="style"),
        ErasureRequest("cat", replacement="art"),
    ):
        edit = UCE().solve(pipe, request)
        downs.append(edit.down)
        differences.append(edit.difference)
    assert torch.equal(differences[0], differences[1])
    assert torch.equal(differences[2], differences[3])
    assert not torch.equal(differences[0], differences[2])


def test_scaling_lambda_to_the_norm_ignores_the_scale_of_states(pipe):
    states = subject_states(pipe, "{}", "cat", "last-subject-token")
    scale = states.square().sum().item() / 784
    scaled = UCE(UCEConfig(scale_to_norm=True)).solve(pipe, REQUEST)
    by_hand = UCE(UCEConfig(regularisation=0.5 * scale)).solve(pipe, REQUEST)
    torch.testing.assert_close(scaled.down, by_hand.down)


def test_round_trip_keeps_request_and_edit(pipe, tmp_path):
    erasure = erase(pipe)
    erasure.save(tmp_path / "erasure")
    loaded = Erasure.load(tmp_path / "erasure")
    assert loaded.request == REQUEST
    assert loaded.text_encoder() is None
    with erasure.apply(pipe):
        expected = unet_output(pipe)
    with loaded.apply(pipe):
        assert torch.equal(unet_output(pipe), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regularisation": 0}, "`regularisation`"),
        ({"erase_scale": -1}, "`erase_scale`"),
        ({"positions": "all"}, "from-last-subject-token"),
        ({"templates": ()}, "`templates`"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        UCEConfig(**settings)


def test_anchors_enter_the_solve_as_preserved_states_of_every_token(pipe):
    request = ErasureRequest("cat", replacement="dog")
    solved = UCE(UCEConfig(anchors=("a tree",))).solve(pipe, request)
    source, target = (subject_states(pipe, "{}", n, "last-subject-token") for n in ("cat", "dog"))
    with torch.no_grad():
        every_token = encode_prompts(pipe, ["a tree"])[0]
    expected = closed_form_edit(source, target, every_token, regularisation=0.5)
    torch.testing.assert_close(solved.down, expected.down)


def test_anchors_hold_what_an_edit_of_all_states_would_move(pipe):
    """In 32 dimensions 74 edited states leave no room to hold others exactly."""
    request = ErasureRequest("cat", replacement="dog")
    weights = select_parameters(pipe.unet, "cross-attention-kv")
    states = anchor_states(pipe, ["a tree"], "cat")[0]
    before = {name: states @ weight.T for name, weight in weights.items()}
    moved = []
    for anchors in ((), ("a tree",)):
        erasure = erase(pipe, request, positions="from-last-subject-token", anchors=anchors)
        with erasure.apply(pipe):
            moved.append(
                max(
                    ((states @ weight.T - before[name]).norm() / before[name].norm()).item()
                    for name, weight in weights.items()
                )
            )
    assert moved[1] < 0.2 * moved[0]


def test_anchors_that_name_the_target_are_left_out(pipe):
    every = anchor_states(pipe, ["a carrot", "a Car on red", ""], "bus")[0]
    kept = anchor_states(pipe, ["a carrot", "a Car on red", ""], "car")[0]
    assert len(every) == 3 * 77 and len(kept) == 2 * 77
    assert anchor_states(pipe, ["a cat"], "cat") == []
