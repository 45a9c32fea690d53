import time

import pytest
import torch

from unweave.diffusion_core.errors import PromptError, SelectionError
from unweave.diffusion_core.parameters import select_parameters
from unweave.diffusion_core.prompts import encode_prompts
from unweave.diffusion_core.testing import tiny_xl_pipeline
from unweave.erasure.closed_form import closed_form_edit
from unweave.erasure.esd import ESD
from unweave.erasure.many import (
    closed_form_rows,
    combined_request,
    compact,
    erase_many,
    key_value_weights,
)
from unweave.erasure.protocol import Erasure, ErasureRequest
from unweave.erasure.rece import RECE, RECEConfig
from unweave.erasure.uce import UCE, UCEConfig, subject_states

CAT = ErasureRequest("cat", replacement="dog", preserve=("rocket", "pizza"))
CAR = ErasureRequest("car", replacement="tree", preserve=("pizza", "house"))
STYLE = ErasureRequest("van gogh", kind="style")


def words(count):
    """Return different words of four letters, each token of which is one letter."""
    letters = "bcdfghjklmnpqrstvwxz"
    return [a + b + c + d for a in letters for b in "aeiou" for c in letters for d in letters][
        :: 8000 // count
    ][:count]


@pytest.mark.parametrize("positions", ["last-subject-token", "from-last-subject-token"])
@pytest.mark.parametrize("request_", [CAT, STYLE, ErasureRequest("cat")])
def test_one_request_gives_what_uce_gives(pipe, positions, request_):
    """One row an edit is equal to rounding; of all positions more rows than columns are cut."""
    config = UCEConfig(
        positions=positions,
        templates=("{}", "a photo of {}"),
        anchors=("a tree", ""),
        scale_to_norm=True,
    )
    joint = erase_many(pipe, [request_], UCE(config)).delta.deltas["unet"]
    single = UCE(config).erase(pipe, request_).delta.deltas["unet"]
    assert joint.keys() == single.keys()
    for name, change in single.items():
        gap = (joint[name].dense() - change.dense()).norm() / change.dense().norm()
        assert gap < 1e-4


@pytest.mark.parametrize("make", [None, tiny_xl_pipeline])
def test_several_concepts_all_move_to_their_guides(pipe, make):
    pipe = make() if make else pipe
    weights = key_value_weights(pipe)
    old = {name: weight.detach().clone() for name, weight in weights.items()}
    erasure = erase_many(pipe, [CAT, CAR], UCE(UCEConfig(regularisation=1e-4)))
    assert all(change.rank == 2 for change in erasure.delta.deltas["unet"].values())
    with erasure.apply(pipe):
        for name, weight in weights.items():
            for source, guide in (("cat", "dog"), ("car", "tree"), ("pizza", "pizza")):
                source, guide = (
                    subject_states(pipe, "{}", word, "last-subject-token")
                    for word in (source, guide)
                )
                wanted = guide @ old[name].T
                assert (source @ weight.T - wanted).norm() < 1e-3 * wanted.norm()


def test_joint_erasure_is_closer_to_the_guides_than_erasures_added_up(pipe):
    requests = [ErasureRequest(name, replacement="dog") for name in ("cat", "bat", "rat", "hat")]
    weights = key_value_weights(pipe)
    old = {name: weight.detach().clone() for name, weight in weights.items()}
    wanted = subject_states(pipe, "{}", "dog", "last-subject-token")

    def gap():
        states = [subject_states(pipe, "{}", r.target, "last-subject-token") for r in requests]
        return sum(
            (torch.cat(states) @ weight.T - wanted @ old[name].T).norm().item()
            for name, weight in weights.items()
        )

    with erase_many(pipe, requests, UCE()).apply(pipe):
        joint = gap()
    parts = [UCE().erase(pipe, request) for request in requests]
    for part in parts:
        part.apply(pipe)
    assert joint < 0.5 * gap()


@pytest.mark.parametrize("count", [10, 50, 1000])
def test_many_concepts_equal_least_squares_and_cost_no_more_than_the_width(pipe, count):
    requests = [ErasureRequest(word, replacement="dog") for word in words(count)]
    started = time.perf_counter()
    erasure = erase_many(pipe, requests, UCE(UCEConfig(regularisation=0.5)))
    assert time.perf_counter() - started < 20
    rows = closed_form_rows(pipe, requests, UCEConfig())
    sources, targets = rows.sources.double(), rows.targets.double()
    assert len(sources) == count
    name, weight = next(iter(key_value_weights(pipe).items()))
    weight = weight.detach().double()
    inputs = torch.cat([sources, 0.5**0.5 * torch.eye(32).double()])
    outputs = torch.cat([targets @ weight.T, 0.5**0.5 * weight.T])
    expected = torch.linalg.lstsq(inputs, outputs).solution.T - weight
    change = erasure.delta.deltas["unet"][name]
    assert change.rank <= 32 and erasure.delta.low_rank
    assert (change.dense().double() - expected).norm() / expected.norm() < 1e-5


def test_rece_knows_all_concepts_in_each_iteration(pipe):
    erasure = erase_many(pipe, [CAT, CAR, STYLE], RECE(RECEConfig(num_iterations=2)))
    assert erasure.delta.meta.method == "rece"
    assert len(erasure.delta.meta.settings["iterations"]) == 3


def test_request_of_many_names_all_and_survives_saving(pipe, tmp_path):
    erasure = erase_many(pipe, [CAT, CAR, STYLE], UCE())
    assert erasure.request.target == "cat; car; van gogh"
    assert erasure.request.preserve == ("rocket", "pizza", "house")
    erasure.save(tmp_path / "erasure")
    loaded = Erasure.load(tmp_path / "erasure")
    assert loaded.request == erasure.request
    assert [entry["target"] for entry in loaded.delta.meta.settings["requests"]] == [
        "cat", "car", "van gogh",
    ]  # fmt: skip
    assert "requests" not in erase_many(pipe, [CAT], UCE()).delta.meta.settings


def test_anchors_that_name_any_target_are_left_out(pipe):
    config = UCEConfig(anchors=("a cat", "a car", "a tree"))
    rows = closed_form_rows(pipe, [CAT, CAR], config)
    with torch.no_grad():
        tree = encode_prompts(pipe, ["a tree"])[0]
    assert len(rows.preserved) == 3 + 77
    torch.testing.assert_close(rows.preserved[3:], tree)


def test_compact_keeps_the_edit(pipe):
    generator = torch.Generator().manual_seed(0)
    c, guide = (torch.randn(100, 16, generator=generator) for _ in range(2))
    weight = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    edit = closed_form_edit(c, guide)
    slim = compact(edit)
    assert len(edit.down) == 100 and len(slim.down) == 16
    gap = slim.low_rank(weight).dense() - edit.low_rank(weight).dense()
    assert gap.norm() < 1e-6 * edit.low_rank(weight).dense().norm()
    few = closed_form_edit(c[:3], guide[:3])
    assert compact(few) is few


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "`requests`"),
        ([CAT, CAT], "more than once"),
        ([CAT, ErasureRequest("pizza")], "erases 'pizza' and another preserves"),
    ],
)
def test_requests_that_contradict_one_another_are_refused(pipe, requests, message):
    with pytest.raises(PromptError, match=message):
        erase_many(pipe, requests, UCE())
    with pytest.raises(PromptError, match=message):
        combined_request(requests)


def test_erasers_of_one_concept_are_refused_with_what_works(pipe):
    with pytest.raises(SelectionError, match="'esd' erases one concept at a time"):
        erase_many(pipe, [CAT, CAR], ESD())
    assert select_parameters(pipe.unet, "cross-attention-kv")
