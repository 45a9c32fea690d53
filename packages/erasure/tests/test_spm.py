import math

import pytest
import torch
from torch import nn

from unweave.diffusion_core.changes import as_dense
from unweave.diffusion_core.denoiser import Denoiser
from unweave.diffusion_core.errors import PipelineError, PromptError, SelectionError
from unweave.diffusion_core.keys import base_parameters
from unweave.diffusion_core.parameters import fingerprint
from unweave.diffusion_core.pipelines import base_model_hash, generate
from unweave.diffusion_core.prompts import PromptStates, encode_conditions
from unweave.diffusion_core.teacher import frozen_teacher
from unweave.diffusion_core.testing import tiny_pipeline, tiny_xl_pipeline
from unweave.diffusion_core.weight_delta import DeltaMeta, WeightDelta
from unweave.erasure.esd import esd_loss
from unweave.erasure.protocol import Erasure, ErasureRequest
from unweave.erasure.spm import (
    SPM,
    Membranes,
    SPMConfig,
    adapted_layers,
    generate_transported,
    random_anchors,
    spm_losses,
    transport_strength,
    transported,
)

OTHERS = ("dog", "tree", "fish")
QUICK = {"num_steps": 3, "num_inference_steps": 3, "num_trajectories": 2, "lr": 1e-2}
PIPELINES = {
    "epsilon": tiny_pipeline,
    "v": lambda: tiny_pipeline("v_prediction"),
    "xl": tiny_xl_pipeline,
}


def erase(pipe, target="cat", seed=0, replacement=None, preserve=(), **settings):
    request = ErasureRequest(target, replacement=replacement, preserve=preserve)
    return SPM(SPMConfig(**{**QUICK, **settings})).erase(pipe, request, seed=seed, progress=False)


def output(pipe, prompt="a cat"):
    noisy = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = encode_conditions(pipe, [prompt])
        return Denoiser.from_pipeline(pipe).predict(noisy, torch.tensor([400]), states).raw


def random_membranes(pipe, seed=0, which="all"):
    generator = torch.Generator().manual_seed(seed)
    membranes = Membranes(adapted_layers(pipe.unet, which), 1, generator)
    with torch.no_grad():
        for up in membranes.ups:
            up.copy_(0.1 * torch.randn(up.shape, generator=generator))
    return membranes


def random_erasure(pipe, target, seed):
    with random_membranes(pipe, seed) as membranes:
        changes = membranes.changes()
    meta = DeltaMeta(base_model_hash(pipe), "spm")
    return Erasure(WeightDelta({"unet": changes}, meta), ErasureRequest(target))


def test_defaults_are_the_papers():
    config = SPMConfig()
    assert (config.rank, config.eta, config.anchor_weight) == (1, 1.0, 1000.0)
    assert (config.num_steps, config.lr, config.lr_cycles) == (3000, 1e-4, 3)
    assert config.warmup * config.num_steps == 500
    assert (config.num_inference_steps, config.guidance_scale) == (30, 3.0)


def test_membranes_are_in_all_linear_and_convolution_layers_of_the_transformers(pipe):
    layers = adapted_layers(pipe.unet)
    assert all(isinstance(layer, (nn.Linear, nn.Conv2d)) for layer in layers.values())
    assert all(".attentions." in path for path in layers)
    endings = {path.rpartition(".")[2] for path in layers}
    assert {"to_q", "to_k", "to_v", "proj_in", "proj_out", "proj"} <= endings
    linear = adapted_layers(pipe.unet, "linear")
    assert linear.keys() < layers.keys()
    assert all(isinstance(layer, nn.Linear) for layer in linear.values())
    with pytest.raises(PipelineError, match="no transformers"):
        adapted_layers(nn.Linear(2, 2))


@pytest.mark.parametrize("kind", PIPELINES)
def test_without_training_and_after_it_the_base_is_bit_exact(kind):
    pipe = PIPELINES[kind]()
    before, weights = output(pipe), fingerprint(pipe.unet)
    membranes = Membranes(adapted_layers(pipe.unet), 1, torch.Generator().manual_seed(0))
    with membranes:
        assert torch.equal(output(pipe), before)
    with random_membranes(pipe):
        assert not torch.equal(output(pipe), before)
        assert fingerprint(pipe.unet) == weights
    assert torch.equal(output(pipe), before)


@pytest.mark.parametrize("kind", PIPELINES)
def test_changes_of_weights_do_what_the_membranes_did(kind):
    pipe = PIPELINES[kind]()
    original = output(pipe)
    with random_membranes(pipe) as membranes:
        beside = output(pipe)
        changes = membranes.changes()
    delta = WeightDelta({"unet": changes}, DeltaMeta(base_model_hash(pipe), "spm"))
    with delta.apply(pipe):
        torch.testing.assert_close(output(pipe), beside, rtol=0, atol=1e-5)
    assert (beside - original).abs().max() > 1e-2


@pytest.mark.parametrize("kind", PIPELINES)
def test_losses_are_esds_and_latent_anchoring(kind):
    pipe = PIPELINES[kind]()
    pipe.unet.requires_grad_(False)
    teacher = Denoiser.from_pipeline(pipe)
    teacher = Denoiser(frozen_teacher(pipe.unet, ()), pipe.scheduler, teacher.vae_scale_factor)
    student = Denoiser.from_pipeline(pipe)
    generator = torch.Generator().manual_seed(1)
    noisy, t = torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([100, 700])
    with torch.no_grad():
        concept, surrogate = (encode_conditions(pipe, [text] * 2) for text in ("cat", "dog"))
    anchors = random_anchors(concept, 3, generator)
    with random_membranes(pipe), torch.no_grad():
        erasing, anchoring = spm_losses(
            student, teacher, noisy, t, concept, surrogate, anchors, 1.5
        )
        expected = esd_loss(student, teacher, noisy, t, concept, surrogate, surrogate, 1.5)
        rows = torch.tensor([0, 1, 0])
        gaps = (
            student.predict(noisy[rows], t[rows], anchors).raw
            - teacher.predict(noisy[rows], t[rows], anchors).raw
        )
    torch.testing.assert_close(erasing, expected)
    torch.testing.assert_close(anchoring, gaps.square().mean())
    none = PromptStates.cat([anchors]).select(torch.arange(0))
    with torch.no_grad():
        erasing, anchoring = spm_losses(student, teacher, noisy, t, concept, surrogate, none, 1.5)
    assert anchoring == 0 < erasing


@pytest.mark.parametrize("kind", ["epsilon", "xl"])
def test_anchors_are_about_as_long_as_the_concept(kind):
    pipe = PIPELINES[kind]()
    with torch.no_grad():
        concept = encode_conditions(pipe, ["cat"])
    anchors = random_anchors(concept, 20, torch.Generator().manual_seed(0))
    assert anchors.hidden_states.shape == (20, *concept.hidden_states.shape[1:])
    pairs = [(anchors.hidden_states.flatten(1), concept.hidden_states.flatten())]
    if kind == "xl":
        pairs.append((anchors.pooled, concept.pooled[0]))
    for drawn, own in pairs:
        ratios = drawn.norm(dim=1) / own.norm()
        assert 0.8 <= ratios.min() < 0.9 and 1.1 < ratios.max() <= 1.2


def test_anchors_similar_to_the_concept_are_rare():
    """In two dimensions the density min(1, 1 - cos) has the mean cosine -pi / (4 pi - 4)."""
    concept = PromptStates(torch.tensor([[[1.0, 0.0]]]))
    anchors = random_anchors(concept, 3000, torch.Generator().manual_seed(0)).hidden_states[:, 0]
    cosines = anchors[:, 0] / anchors.norm(dim=1)
    expected = -math.pi / (4 * math.pi - 4)
    assert cosines.mean().item() == pytest.approx(expected, abs=0.04)


def test_strength_follows_how_much_a_prompt_asks_for_the_concept(pipe):
    assert transport_strength(pipe, "cat", "cat") == pytest.approx(1.0)
    assert transport_strength(pipe, "cat", "a small cat on red") == 1.0
    with torch.no_grad():
        states = encode_conditions(pipe, ["dog", "cat"]).hidden_states.flatten(1)
    cosine = torch.cosine_similarity(states[0], states[1], dim=0).item()
    assert transport_strength(pipe, "cat", "dog") == pytest.approx(max(cosine, 0.0), abs=1e-5)
    with pytest.raises(PromptError, match="`target`"):
        transport_strength(pipe, "", "dog")


def test_strength_has_the_share_of_tokens_as_its_lower_bound(toy_world):
    pipe = toy_world.pipeline()
    assert transport_strength(pipe, "red cat", "a cat") >= 0.5
    related, other = (transport_strength(pipe, "cat", text) for text in ("a kitten", "a tree"))
    assert 0 <= other < related < 1


def test_merged_strength_is_linear_in_gamma(pipe):
    """Scaling both factors by gamma, as the published code does, would give gamma squared."""
    erasure = random_erasure(pipe, "cat", 0)
    original = {n: p.detach().clone() for n, p in base_parameters("unet", pipe.unet).items()}
    for gamma in (0.25, 0.5, 1.0):
        with erasure.apply(pipe, gamma):
            for name, change in erasure.delta.deltas["unet"].items():
                moved = base_parameters("unet", pipe.unet)[name].detach() - original[name]
                torch.testing.assert_close(moved, gamma * as_dense(change), rtol=0, atol=1e-6)


def test_two_membranes_add_up_without_cross_terms(pipe):
    erasures = [random_erasure(pipe, "cat", 0), random_erasure(pipe, "dog", 1)]
    original = {n: p.detach().clone() for n, p in base_parameters("unet", pipe.unet).items()}
    with transported(pipe, erasures, "a cat") as strengths:
        assert strengths[0] == 1.0 > strengths[1] > 0
        for name, parameter in base_parameters("unet", pipe.unet).items():
            expected = original[name]
            for erasure, strength in zip(erasures, strengths, strict=True):
                if name in erasure.delta.deltas["unet"]:
                    change = as_dense(erasure.delta.deltas["unet"][name])
                    expected = expected + strength * change
            torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-6)
    for name, parameter in base_parameters("unet", pipe.unet).items():
        assert torch.equal(parameter.detach(), original[name])


def test_images_of_several_prompts_each_have_their_own_strengths(pipe):
    erasures = [random_erasure(pipe, "cat", 0), random_erasure(pipe, "dog", 1)]
    prompts, seeds = ["a cat", "a dog", "a cat"], [1, 2, 3]
    images = generate_transported(pipe, erasures, prompts, seeds=seeds, num_inference_steps=2)
    for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        with transported(pipe, erasures, prompt):
            alone = generate(pipe, [prompt], seeds=[seed], num_inference_steps=2)[0]
        torch.testing.assert_close(images[place], alone, rtol=0, atol=1e-4)
    with pytest.raises(PromptError, match="`seeds`"):
        generate_transported(pipe, erasures, prompts, seeds=[1])


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("trajectories", ["teacher", "adapter"])
def test_only_layers_of_transformers_change_and_all_bits_come_back(kind, trajectories):
    pipe = PIPELINES[kind]()
    before = fingerprint(pipe.unet)
    erasure = erase(
        pipe, trajectories=trajectories, replacement="dog", preserve=("rocket",), batch_size=2
    )
    assert fingerprint(pipe.unet) == before
    assert len(erasure.history) == 3
    with erasure.apply(pipe):
        after = fingerprint(pipe.unet)
    changed = {name for name in after if after[name] != before[name]}
    assert changed <= {f"{path}.weight" for path in adapted_layers(pipe.unet)}
    assert len(changed) > 0.8 * len(adapted_layers(pipe.unet))
    assert fingerprint(pipe.unet) == before


def test_linear_layers_alone_are_a_lora_that_diffusers_reads(pipe, tmp_path):
    assert not erase(pipe).delta.low_rank
    erasure = erase(pipe, layers="linear", num_steps=8)
    assert erasure.delta.low_rank
    assert all(change.rank == 1 for change in erasure.delta.deltas["unet"].values())
    erasure.save(tmp_path / "erasure")
    other = tiny_pipeline()
    other.load_lora_weights(
        tmp_path / "erasure", weight_name="pytorch_lora_weights.safetensors", use_safetensors=True
    )
    original = output(pipe)
    with Erasure.load(tmp_path / "erasure").apply(pipe):
        torch.testing.assert_close(output(other), output(pipe), rtol=0, atol=1e-5)
        assert (output(pipe) - original).abs().max() > 1e-4


def test_same_seed_gives_identical_weights(pipe):
    first, second, other = (erase(pipe, seed=seed) for seed in (1, 1, 2))
    for name, change in first.delta.deltas["unet"].items():
        assert torch.equal(as_dense(change), as_dense(second.delta.deltas["unet"][name]))
    assert first.history == second.history != other.history


def test_learning_rate_warms_up_from_nothing(pipe):
    """The first step of a warm-up has the rate 0, so that one step changes no weight."""
    still = erase(pipe, num_steps=1, warmup=0.9)
    assert all(as_dense(change).abs().max() == 0 for change in still.delta.deltas["unet"].values())
    moved = erase(pipe, num_steps=1, warmup=0.0)
    assert any(as_dense(change).abs().max() > 0 for change in moved.delta.deltas["unet"].values())


@pytest.fixture(scope="module")
def erased_toy(toy_world):
    """A pipeline and the erasure of its cat, from eighty steps at a high rate."""
    pipe = toy_world.pipeline()
    config = SPMConfig(
        num_steps=80,
        lr=2e-2,
        lr_cycles=1,
        batch_size=4,
        eta=2.0,
        anchor_weight=0.3,
        guidance_scale=2.0,
        num_inference_steps=12,
        num_trajectories=8,
        templates=("a {}", "a photo of a {}", "one {}"),
    )
    request = ErasureRequest("cat", preserve=("tree", "house"))
    return pipe, SPM(config).erase(pipe, request, progress=False)


def test_erased_concept_goes_and_others_stay(toy_world, erased_toy):
    """Measured: cat from 1.00 to 0.12, its synonyms to 0.17, the others from 0.90 to 0.89."""
    pipe, erasure = erased_toy
    shown = {"target": ["a cat", "my cat"], "synonyms": ["a kitten", "a tomcat"]}

    def rates():
        found = {name: toy_world.rate(pipe, "cat", p, range(6)) for name, p in shown.items()}
        others = [toy_world.rate(pipe, name, [f"a {name}"], range(6)) for name in OTHERS]
        return found | {"others": sum(others) / len(others)}

    before = rates()
    with erasure.apply(pipe):
        after = rates()
    assert after["target"] <= before["target"] - 0.5
    assert after["synonyms"] <= before["synonyms"] - 0.3
    assert after["others"] >= before["others"] - 0.2


def test_transport_leaves_unrelated_prompts_nearer_to_what_they_were(toy_world, erased_toy):
    pipe, erasure = erased_toy
    prompts, seeds = ["a tree"] * 4 + ["a fish"] * 4, [*range(4)] * 2
    settings = {"num_inference_steps": 12, "guidance_scale": 2.0}
    before = generate(pipe, prompts, seeds=seeds, **settings)
    with erasure.apply(pipe):
        full = generate(pipe, prompts, seeds=seeds, **settings)
    eased = generate_transported(pipe, [erasure], prompts, seeds=seeds, **settings)
    assert (eased - before).square().mean() < (full - before).square().mean()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "`rank`"),
        ({"warmup": 1.0}, "`warmup`"),
        ({"layers": "some"}, "`layers`"),
        ({"trajectories": "student"}, "`trajectories`"),
        ({"anchor_weight": -1.0}, "`anchor_weight`"),
        ({"templates": ("cat",)}, "`templates`"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises((SelectionError, ValueError), match=message):
        SPMConfig(**settings)


def test_half_precision_is_refused(pipe):
    pipe.unet.half()
    with pytest.raises(PipelineError, match="dtype"):
        erase(pipe)
