import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from unweave.diffusion_core.errors import (
    ArtifactError,
    ImageError,
    NonFiniteError,
    SelectionError,
    UnweaveError,
)
from unweave.diffusion_core.parameters import fingerprint
from unweave.erasure.class_unlearning import class_unlearner
from unweave.erasure.class_unlearning.baselines import BASELINES, BaselineUnlearner, salun_mask
from unweave.erasure.class_unlearning.class_unlearner import (
    ClassUnlearner,
    ClassUnlearningConfig,
    protected_samples,
)
from unweave.erasure.class_unlearning.classifier import ClassRequest, features_of
from unweave.erasure.class_unlearning.concept_bank import ConceptSamples
from unweave.erasure.class_unlearning.measures import accuracy, kl_from_retrained
from unweave.erasure.class_unlearning.result import ClassUnlearning

SHAPES, COLOURS = ("square", "disc"), ("red", "green", "blue")
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
SEEDS = range(3)
TARGETS = (0, 2, 4)
# Five concepts: at the default coverage of 0.8 a colour that the class lacks is among its own.
CONFIG = ClassUnlearningConfig(
    coverage=0.7,
    optimizer="adamw",
    lr=3e-4,
    epochs=8,
    recovery_epochs=3,
    batch_size=32,
    retain_fraction=0.5,
    max_retain_drop=0.05,
)


def images_of(shapes, colours, striped, generator):
    """Draw 16x16 images: square frames or discs of a colour, with or without stripes."""
    count = len(shapes)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    centre = 6 + 3 * torch.rand(2, count, 1, 1, generator=generator)
    radius = 3.5 + 1.5 * torch.rand(count, 1, 1, generator=generator)
    dx, dy = (x - centre[0]).abs(), (y - centre[1]).abs()
    far = torch.maximum(dx, dy)
    frame, disc = (far < radius) & (far > radius - 2), dx**2 + dy**2 < (0.9 * radius) ** 2
    mask = torch.stack([frame, disc], 1)[torch.arange(count), shapes].float()
    stripes = 0.35 + 0.65 * ((x + y) % 4 < 2)
    mask = torch.where(striped[:, None, None] == 1, mask * stripes, mask)
    tint = 0.15 + 0.85 * functional.one_hot(colours, 3)
    noise = 0.15 * torch.randn(count, 3, 16, 16, generator=generator)
    backdrop = 0.3 * torch.rand(count, 1, 1, 1, generator=generator)
    return backdrop + mask[:, None] * tint[:, :, None, None] + noise


def labelled_images(per_class, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(6).repeat_interleave(per_class)
    striped = torch.randint(2, (len(labels),), generator=generator)
    return images_of(labels % 2, labels // 2, striped, generator), labels


def concept_samples(seed, count=100):
    generator = torch.Generator().manual_seed(seed)
    shapes, striped = torch.randint(2, (2, 6 * count), generator=generator)
    colours = torch.randint(3, (6 * count,), generator=generator)
    images = images_of(shapes, colours, striped, generator)
    present = {"square": shapes == 0, "striped": striped == 1}
    present |= {name: colours == index for index, name in enumerate(COLOURS)}
    return {
        name: ConceptSamples(images[here][:count], images[~here][:count])
        for name, here in present.items()
    }


class SmallCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 1, 1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, 1, 1), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 32, 3, 1, 1), nn.GroupNorm(4, 32), nn.ReLU()),
        )
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 6)

    def forward(self, images):
        places = self.trunk(images)
        return self.head(self.norm(torch.cat([places.mean((2, 3)), places.amax((2, 3))], 1)))


def trained(inputs, labels, seed, num_steps=120):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SmallCNN()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        for _ in range(num_steps):
            batch = torch.randint(len(inputs), (64,))
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
        optimizer.zero_grad()
    return model.eval()


class World:
    """A classifier of six classes, the one to forget, and a model that never saw that."""

    def __init__(self, seed, target):
        self.seed, self.target = seed, target
        self.inputs, self.labels = labelled_images(150, seed)
        self.test_inputs, self.test_labels = labelled_images(60, seed + 100)
        self.concepts = concept_samples(seed + 50)
        own = self.labels == target
        self.model = trained(self.inputs, self.labels, seed)
        self.retrained = trained(self.inputs[~own], self.labels[~own], seed)
        self.request = self.request_for(target)

    def request_for(self, target):
        own = self.labels == target
        return ClassRequest(
            CLASSES[target], CLASSES, self.inputs[own], self.inputs[~own], self.labels[~own]
        )

    def unlearn(self, **settings):
        return ClassUnlearner(replace(CONFIG, **settings)).unlearn(
            self.model, self.request, self.concepts, head="head", seed=self.seed, progress=False
        )

    def baseline(self, name, **settings):
        return BaselineUnlearner(name, replace(CONFIG, **settings)).unlearn(
            self.model, self.request, seed=self.seed, progress=False
        )

    def explain(self, target=None, concepts=None, **settings):
        return ClassUnlearner(replace(CONFIG, **settings)).explain(
            self.model,
            self.request_for(self.target if target is None else target),
            concepts or self.concepts,
            head="head",
            seed=self.seed,
        )

    def rates(self, result=None):
        """Return test accuracy on the target, on the others, and on its sibling in colour."""
        with result.apply(self.model) if result else torch.no_grad():
            found = [
                accuracy(
                    self.model,
                    self.test_inputs[self.test_labels == index],
                    self.test_labels[self.test_labels == index],
                )
                for index in range(6)
            ]
        others = [rate for index, rate in enumerate(found) if index != self.target]
        return found[self.target], sum(others) / 5, found[self.target ^ 1]

    def divergence(self, result):
        own = self.test_inputs[self.test_labels == self.target]
        with result.apply(self.model):
            return kl_from_retrained(self.retrained, self.model, own)


@pytest.fixture(scope="module")
def worlds():
    return [World(seed, target) for seed, target in zip(SEEDS, TARGETS, strict=True)]


@pytest.fixture(scope="module")
def world(worlds):
    return worlds[0]


@pytest.fixture(scope="module")
def targeted(worlds):
    return [world.unlearn() for world in worlds]


@pytest.fixture(scope="module")
def randomised(worlds):
    return [world.unlearn(labels="random") for world in worlds]


def hit_rate(worlds, concepts_of, **settings):
    hits = []
    for world in worlds:
        for target, name in enumerate(CLASSES):
            try:
                found = world.explain(target, concepts_of(world), **settings)
            except SelectionError:
                hits.append(False)
                continue
            top = found.importance[target].topk(2).indices.tolist()
            hits.append({found.bottleneck.bank.names[k] for k in top} == defining(name))
    return sum(hits) / len(hits)


def defining(class_name):
    """Return the attributes of a class; a disc is what is no square, so that concept defines it."""
    return {class_name.split()[0], "square"}


def test_top_two_concepts_of_every_class_are_the_attributes_that_define_it(worlds):
    assert hit_rate(worlds, lambda world: world.concepts) >= 0.9


def test_shuffled_concept_labels_bring_the_hit_rate_to_chance(worlds):
    def shuffled(world):
        generator = torch.Generator().manual_seed(world.seed)
        samples = {}
        for name, part in world.concepts.items():
            both = torch.cat([part.positive, part.negative])
            order = torch.randperm(len(both), generator=generator)
            samples[name] = ConceptSamples(*both[order].split(len(part.positive)))
        return samples

    # Chance is 1 in 10 pairs of concepts: of 18 classes, 5 or fewer hit in 99 of 100 cases.
    assert hit_rate(worlds, shuffled, min_concept_accuracy=0.0, max_fidelity_gap=1.0) <= 5 / 18


def test_bottleneck_is_within_5_points_of_the_head(worlds):
    for world in worlds:
        found = world.explain()
        assert found.head_accuracy - found.bottleneck_accuracy <= 0.05


@pytest.mark.parametrize("labels", ["targeted", "random"])
def test_class_goes_and_others_stay(labels, worlds, targeted, randomised):
    results = {"targeted": targeted, "random": randomised}[labels]
    for world, result in zip(worlds, results, strict=True):
        _, before, _ = world.rates()
        target, others, _ = world.rates(result)
        assert target <= 0.1
        assert before - others <= 0.03


def test_as_many_epochs_on_retain_samples_alone_leave_the_class(worlds, targeted):
    for world, result in zip(worlds, targeted, strict=True):
        alone = world.baseline("fine-tune", epochs=result.report.facts["epochs"])
        assert world.rates(alone)[0] > 0.5


def test_targeted_labels_are_20_percent_closer_to_retraining(worlds, targeted, randomised):
    aimed = sum(world.divergence(result) for world, result in zip(worlds, targeted, strict=True))
    drawn = sum(world.divergence(result) for world, result in zip(worlds, randomised, strict=True))
    assert aimed <= 0.8 * drawn


def test_target_label_is_what_a_retrained_model_answers(worlds, targeted):
    for world, result in zip(worlds, targeted, strict=True):
        assert list(result.report.answers) == [CLASSES[world.target ^ 1]]


@pytest.mark.xfail(
    strict=True, reason="2 points and not 10 over three seeds: samples of a class are much alike"
)
def test_samples_chosen_by_concepts_forget_10_points_more_than_samples_drawn(worlds, monkeypatch):
    settings = {"fraction": 0.3, "epochs": 2, "recovery_epochs": 0, "max_retain_drop": 1.0}
    chosen = [world.rates(world.unlearn(**settings))[0] for world in worlds]

    def drawn(scores, fraction):
        order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(7))
        return order[: round(fraction * len(scores))]

    monkeypatch.setattr(class_unlearner, "highest", drawn)
    at_random = [world.rates(world.unlearn(**settings))[0] for world in worlds]
    assert sum(chosen) / 3 <= sum(at_random) / 3 - 0.1


@pytest.mark.xfail(
    strict=True, reason="the sibling loses nothing without it, and others lose no less with it"
)
def test_protected_look_alikes_halve_what_the_others_lose(worlds):
    def loss(protect):
        settings = {"labels": "random", "recovery_epochs": 0, "retain_fraction": 0.1}
        drops = [
            world.rates()[1] - world.rates(world.unlearn(protect=protect, **settings))[1]
            for world in worlds
        ]
        return sum(drops) / 3

    assert loss(0.1) <= 0.5 * loss(0.0)


def test_model_is_bit_identical_until_applied_and_after_reverting(world, targeted):
    before = fingerprint(world.model)
    world.unlearn(epochs=1)
    assert fingerprint(world.model) == before
    with targeted[0].apply(world.model):
        assert fingerprint(world.model) != before
        with pytest.raises(UnweaveError, match="applied to this model already"):
            targeted[0].apply(world.model)
    assert fingerprint(world.model) == before
    with pytest.raises(UnweaveError, match="nothing to revert"):
        targeted[0].revert(world.model)


def test_loaded_unlearning_does_the_same_and_keeps_the_report(world, targeted, tmp_path):
    targeted[0].save(tmp_path / "artifact")
    loaded = ClassUnlearning.load(tmp_path / "artifact")
    with targeted[0].apply(world.model):
        expected = fingerprint(world.model)
    with loaded.apply(world.model):
        assert fingerprint(world.model) == expected
    assert loaded.report == targeted[0].report
    assert loaded.history == targeted[0].history
    assert torch.equal(loaded.poison["labels"], targeted[0].poison["labels"])


def test_damaged_artifact_and_foreign_model_are_refused(world, worlds, targeted, tmp_path):
    targeted[0].save(tmp_path / "artifact")
    report = tmp_path / "artifact" / "concept_report.json"
    report.write_text(report.read_text().replace("red", "tan"))
    with pytest.raises(ArtifactError, match=r"concept_report\.json"):
        ClassUnlearning.load(tmp_path / "artifact")
    with pytest.raises(ArtifactError, match="belongs to the model with hash"):
        targeted[0].apply(worlds[1].model)


def test_report_names_concepts_targets_and_what_is_still_decodable(targeted):
    report = targeted[0].report
    assert set(report.concept_set) == {"red", "square"}
    assert sum(report.answers.values()) == 135
    assert 0.5 <= report.facts["probe_accuracy_after"] <= 1.0
    assert report.facts["stopped"] == "forgotten"
    assert report.facts["surrogate_data"] is False


def test_same_seed_gives_identical_weights(world):
    first, again = (world.unlearn(epochs=1, labels="random") for _ in range(2))
    for name, change in first.delta.deltas["model"].items():
        assert torch.equal(change, again.delta.deltas["model"][name])
    assert torch.equal(first.poison["labels"], again.poison["labels"])


def test_batch_normalisation_keeps_its_statistics(world):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(768, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 6)
        ).train()
        model(world.inputs)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    config = replace(CONFIG, max_fidelity_gap=1.0, epochs=1, min_concept_accuracy=0.0)
    ClassUnlearner(config).unlearn(model, world.request, world.concepts, head="4", progress=False)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(module.training for module in model.modules())


def test_projection_takes_the_concepts_out_of_what_the_head_reads(world):
    result = world.unlearn(mode="project")
    found = world.explain()
    bank = found.bottleneck.bank
    directions = bank.weights[list(found.concepts)]
    with result.apply(world.model):
        assert (world.model.head.weight @ directions.T).abs().max() < 1e-4
    features = features_of(world.model, "head", world.request.retain_inputs)
    plain = world.model.head(features.mean(0))
    with result.apply(world.model):
        assert torch.allclose(world.model.head(features.mean(0)), plain, atol=1e-4)
    assert result.delta.deltas["model"]["head.weight"].rank == len(found.concepts)


def test_kept_pixels_are_the_only_ones_of_the_class(world, monkeypatch):
    seen = {}
    original = class_unlearner.fine_tune

    def spy(model, data, config, **rest):
        seen["inputs"] = data.forget_inputs
        return original(model, data, config, **rest)

    monkeypatch.setattr(class_unlearner, "fine_tune", spy)
    result = world.unlearn(keep_pixels=0.3, num_ig_steps=4, epochs=1)
    own = world.request.forget_inputs[result.poison["indices"]]
    kept = (seen["inputs"] == own).all(1).float().mean((1, 2))
    assert kept.min() >= 0.29
    assert kept.mean() <= 0.32


def test_protected_samples_are_those_with_the_highest_scores():
    scores, kept = torch.tensor([0.1, 0.9, 0.5, 0.7]), torch.tensor([0, 2, 3])
    assert protected_samples(scores, kept, 0.34).tolist() == [3]
    assert protected_samples(scores, kept, 0.0).tolist() == []


def test_salun_changes_half_of_the_weights_at_most(world):
    result = world.baseline("salun", epochs=1)
    changed = sum(int((c != 0).sum()) for c in result.delta.deltas["model"].values())
    total = sum(p.numel() for p in world.model.parameters())
    assert changed <= 0.5 * total + 1
    labels = torch.zeros(8, dtype=torch.long)
    mask = salun_mask(world.model, world.request.forget_inputs[:8], labels)
    assert sum(int(part.sum()) for part in mask.values()) == pytest.approx(total / 2, abs=2)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_leave_the_model_as_it_was(name, world):
    before = fingerprint(world.model)
    world.baseline(name, epochs=1)
    assert fingerprint(world.model) == before


def request(**changes):
    inputs = torch.zeros(4, 3, 16, 16)
    given = {
        "target": "cat",
        "class_names": ("cat", "dog", "owl"),
        "forget_inputs": inputs,
        "retain_inputs": inputs,
        "retain_labels": torch.tensor([1, 2, 1, 2]),
        **changes,
    }
    return ClassRequest(**given)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": "cow"}, SelectionError, "got 'cow'"),
        ({"class_names": ("cat", "dog")}, SelectionError, "at least 3 different names"),
        ({"forget_inputs": torch.zeros(0, 3, 16, 16)}, SelectionError, "`forget_inputs`"),
        ({"retain_inputs": torch.zeros(0, 3, 16, 16)}, SelectionError, "`retain_inputs`"),
        ({"forget_inputs": torch.zeros(4, 3, 8, 8)}, ImageError, "of one shape"),
        ({"retain_labels": torch.tensor([1, 2])}, SelectionError, "one label for each of the 4"),
        ({"retain_labels": torch.tensor([1, 1, 1, 1])}, SelectionError, r"\['owl'\] are missing"),
        ({"retain_labels": torch.tensor([0, 1, 2, 1])}, SelectionError, "'cat' itself"),
        ({"retain_labels": torch.tensor([1, 2, 1, 3])}, SelectionError, "from 0 to 2"),
        ({"retain_labels": torch.tensor([1.0, 2, 1, 2])}, SelectionError, "whole numbers"),
        (
            {"forget_inputs": torch.full((4, 3, 16, 16), torch.nan)},
            NonFiniteError,
            "3072 NaN or infinite values",
        ),
    ],
)
def test_bad_requests_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        request(**changes)


def test_concepts_that_explain_too_little_are_refused(world):
    few = {name: world.concepts[name] for name in ("red", "green")}
    with pytest.raises(SelectionError, match="a gap above `max_fidelity_gap`"):
        world.explain(concepts=few)
    assert world.explain(concepts=few, hybrid=True).bottleneck_accuracy >= 0.95


def test_concept_sets_that_are_too_small_are_named(world):
    few = world.concepts["red"].positive[:3]
    with pytest.raises(SelectionError, match=r"'red' must have at least 4 positive .* got 3"):
        world.explain(concepts={"red": ConceptSamples(few, world.concepts["red"].negative)})
    with pytest.raises(SelectionError, match="no positive or no negative"):
        world.explain(concepts={"red": ConceptSamples(few[:0], few)})
    with pytest.raises(SelectionError, match="at least 2 concepts"):
        world.explain(concepts={"red": world.concepts["red"]})


def test_unknown_heads_and_broken_features_are_named(world):
    unlearner = ClassUnlearner(replace(CONFIG, epochs=1))
    with pytest.raises(SelectionError, match="`head` must name the module"):
        unlearner.unlearn(world.model, world.request, world.concepts, head="fc")
    broken = copy.deepcopy(world.model)
    with torch.no_grad():
        broken.norm.weight[0] = torch.nan
    with pytest.raises(NonFiniteError, match="features before 'head'"):
        unlearner.unlearn(broken, world.request, world.concepts, head="head")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": "wrong"}, "`labels`"),
        ({"mode": "delete"}, "`mode`"),
        ({"lr": 0.0}, "`lr`"),
        ({"fraction": 0.0}, "`fraction`"),
        ({"coverage": 1.1}, "`coverage`"),
        ({"holdout": 1.0}, "`holdout`"),
        ({"keep_pixels": 1.0}, "`keep_pixels`"),
        ({"momentum": 1.0}, "`momentum`"),
        ({"recovery_epochs": -1}, "`recovery_epochs`"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ClassUnlearningConfig(**settings)
