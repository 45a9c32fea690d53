"""Claims about tokens: only new rows ever change, and every known file form is read safely."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from unweave.diffusion_core.errors import (
    ArtifactError,
    NonFiniteError,
    PromptError,
    SelectionError,
)
from unweave.diffusion_core.files import save_tensors
from unweave.diffusion_core.prompts import encode_prompts
from unweave.diffusion_core.tokens import (
    add_tokens,
    install_tokens,
    load_tokens,
    save_token,
    train_token_rows,
    vector_tokens,
)

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

PROMPTS = ["a cat", "masks", "<cat", "SKS sk s", ""]


def _rows(pipe: Any) -> Tensor:
    weight: Tensor = pipe.text_encoder.get_input_embeddings().weight.detach()
    return weight.clone()


def test_adding_tokens_leaves_old_rows_and_old_prompts_as_they_were(
    pipe: StableDiffusionPipeline,
) -> None:
    before, ids = _rows(pipe), pipe.tokenizer(PROMPTS).input_ids
    states = encode_prompts(pipe, PROMPTS[:3])
    assert add_tokens(pipe, ["<cat>", "sks", "<cat>_1"]) == [514, 515, 516]
    assert torch.equal(_rows(pipe)[: len(before)], before)
    assert pipe.tokenizer(PROMPTS[:3]).input_ids == ids[:3]
    assert torch.equal(encode_prompts(pipe, PROMPTS[:3]), states)


def test_a_token_is_one_token_as_written_and_no_part_of_other_words(
    pipe: StableDiffusionPipeline,
) -> None:
    first, second, word = add_tokens(pipe, ["<cat>", "<cat>_1", "sks"])
    tokenize = pipe.tokenizer
    assert tokenize("<cat>", add_special_tokens=False).input_ids == [first]
    assert tokenize("<cat> <cat>_1 sks", add_special_tokens=False).input_ids == [
        first,
        second,
        word,
    ]
    assert word not in tokenize("masks", add_special_tokens=False).input_ids


def test_new_rows_start_as_the_initializer(pipe: StableDiffusionPipeline) -> None:
    before = _rows(pipe)
    cat = pipe.tokenizer("cat", add_special_tokens=False).input_ids
    add_tokens(pipe, ["<a>"], "cat")
    add_tokens(pipe, ["<b>"])
    add_tokens(pipe, ["<c>", "<d>"], torch.arange(64.0).view(2, 32))
    add_tokens(pipe, ["<e>", "<f>"], torch.arange(32.0))
    new = _rows(pipe)[len(before) :]
    torch.testing.assert_close(new[0], before[cat].mean(0))
    torch.testing.assert_close(new[1], torch.cat([before, new[:1]]).mean(0))
    assert torch.equal(new[2:4], torch.arange(64.0).view(2, 32))
    assert torch.equal(new[4:], torch.arange(32.0).expand(2, 32))


@pytest.mark.parametrize(
    "token",
    [
        "",
        " ",
        "a b",
        "<a\tb>",
        "<a\n>",
        "<\0>",
        "<\u202ea>",
        "<\ud800>",
        "x" * 101,
        "<" + "y" * 10**6,
    ],
)
def test_an_unusable_token_is_refused(pipe: StableDiffusionPipeline, token: str) -> None:
    with pytest.raises(PromptError):
        add_tokens(pipe, ["<fine>", token])
    assert len(pipe.tokenizer) == len(_rows(pipe)) == 514


@pytest.mark.parametrize("tokens", [["a"], ["A"], ["b</w>"], ["<|endoftext|>"], ["<x>", "<x>"]])
def test_a_token_that_exists_is_refused_and_nothing_changes(
    pipe: StableDiffusionPipeline, tokens: list[str]
) -> None:
    before = _rows(pipe)
    with pytest.raises(PromptError, match="already known"):
        add_tokens(pipe, tokens)
    assert len(pipe.tokenizer) == 514
    assert torch.equal(_rows(pipe), before)


@pytest.mark.parametrize("initializer", ["", torch.zeros(31), torch.zeros(2, 32)])
def test_an_unusable_initializer_changes_nothing(
    pipe: StableDiffusionPipeline, initializer: Any
) -> None:
    with pytest.raises(PromptError):
        add_tokens(pipe, ["<x>"], initializer)
    with pytest.raises(NonFiniteError):
        add_tokens(pipe, ["<x>"], torch.full((32,), float("nan")))
    assert len(pipe.tokenizer) == 514


def test_the_frozen_flag_of_the_embedding_stays(pipe: StableDiffusionPipeline) -> None:
    pipe.text_encoder.requires_grad_(False)
    add_tokens(pipe, ["<x>"])
    assert not pipe.text_encoder.get_input_embeddings().weight.requires_grad


def test_training_leaves_old_rows_bit_identical_under_weight_decay(
    pipe: StableDiffusionPipeline,
) -> None:
    token_ids = add_tokens(pipe, ["<x>", "<y>"], "cat")
    before = {name: p.detach().clone() for name, p in pipe.text_encoder.named_parameters()}
    goal = torch.randn(32)
    with train_token_rows(pipe.text_encoder, token_ids) as rows:
        optimizer = torch.optim.AdamW([rows], lr=0.1, weight_decay=0.5)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            states = encode_prompts(pipe, ["a <x> and <y>", "a cat"])
            loss = (states[0, 7] - goal).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = set()
    for name, parameter in pipe.text_encoder.named_parameters():
        assert parameter.grad is None
        same = (parameter.detach() == before[name]).view(len(parameter), -1).all(1)
        changed |= {(name, index) for index in (~same).nonzero().flatten().tolist()}
    (name,) = {name for name, _ in changed}
    assert pipe.text_encoder.get_parameter(name) is pipe.text_encoder.get_input_embeddings().weight
    assert {index for _, index in changed} == set(token_ids)


def test_after_training_the_encoder_reads_what_it_read_at_the_end(
    pipe: StableDiffusionPipeline,
) -> None:
    token_ids = add_tokens(pipe, ["<x>"])
    flags = [parameter.requires_grad for parameter in pipe.text_encoder.parameters()]
    with train_token_rows(pipe.text_encoder, token_ids) as rows:
        with torch.no_grad():
            rows.add_(1.0)
        during = encode_prompts(pipe, ["a <x>"])
    assert torch.equal(encode_prompts(pipe, ["a <x>"]), during)
    assert [parameter.requires_grad for parameter in pipe.text_encoder.parameters()] == flags


def test_training_that_fails_leaves_every_row_as_it_was(pipe: StableDiffusionPipeline) -> None:
    token_ids = add_tokens(pipe, ["<x>"])
    before = _rows(pipe)
    with pytest.raises(KeyboardInterrupt), train_token_rows(pipe.text_encoder, token_ids) as rows:
        rows.data.add_(1.0)
        raise KeyboardInterrupt
    with pytest.raises(NonFiniteError), train_token_rows(pipe.text_encoder, token_ids) as rows:
        rows.data.fill_(float("nan"))
    assert torch.equal(_rows(pipe), before)


@pytest.mark.parametrize("token_ids", [[], [1, 1], [-1], [514]])
def test_unusable_token_ids_are_named(pipe: StableDiffusionPipeline, token_ids: list[int]) -> None:
    training = train_token_rows(pipe.text_encoder, token_ids)
    with pytest.raises(SelectionError, match="token_ids"), training:
        pass


@pytest.mark.parametrize("count", [1, 3])
def test_a_saved_token_comes_back_and_diffusers_reads_the_file(
    pipe: StableDiffusionPipeline, tmp_path: Path, count: int
) -> None:
    rows = torch.randn(count, 32)
    path = save_token(tmp_path / "new", "<my-cat>", rows)
    assert path.name == "my-cat.safetensors"
    for source in (path, tmp_path / "new"):
        (loaded,) = load_tokens(source).items()
        assert loaded[0] == "<my-cat>" and torch.equal(loaded[1], rows)
    pipe.load_textual_inversion(str(path), use_safetensors=True, local_files_only=True)
    assert torch.equal(_rows(pipe)[514:], rows)


def test_an_installed_token_means_what_diffusers_makes_of_it(
    pipe: StableDiffusionPipeline,
) -> None:
    from unweave.diffusion_core.testing import tiny_pipeline

    rows, other = torch.randn(2, 32), tiny_pipeline()
    assert install_tokens(pipe, {"<cat>": rows}) == {"<cat>": [514, 515]}
    other.load_textual_inversion({"<cat>": rows})
    prompts = ["a <cat> on a <cat>"]
    assert torch.equal(encode_prompts(pipe, prompts), encode_prompts(other, prompts))
    with pytest.raises(PromptError, match="another model"):
        install_tokens(pipe, {"<dog>": torch.zeros(2, 768)})


def test_the_three_known_forms_are_read(tmp_path: Path) -> None:
    rows = torch.randn(2, 768)
    forms: dict[str, dict[str, Tensor]] = {
        "diffusers": {"<cat>": rows},
        "a1111": {"emb_params": rows},
        "a1111-old": {"string_to_param.*": rows},
        "sdxl": {"clip_l": rows, "clip_g": torch.randn(2, 1280)},
    }
    for name, content in forms.items():
        path = tmp_path / f"{name}.safetensors"
        save_tensors(path, content)
        (loaded,) = load_tokens(path).items()
        assert loaded[0] == ("<cat>" if name == "diffusers" else name)
        assert torch.equal(loaded[1], rows)
        assert load_tokens(path, token="<new>").keys() == {"<new>"}
    nested = {"string_to_param": {"*": rows}, "name": "cat-toy"}
    assert load_tokens(nested).keys() == {"cat-toy"}
    assert load_tokens({"<cat>": rows[0]})["<cat>"].shape == (1, 768)
    assert load_tokens(tmp_path).keys() == {"<cat>", "a1111", "a1111-old", "sdxl"}


def test_a_name_stored_in_the_file_counts_more_than_its_own(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_tensors(path, {"emb_params": torch.zeros(1, 4)}, {"name": "<stored>"})
    assert load_tokens(path).keys() == {"<stored>"}


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"clip_g": torch.zeros(1, 4)},
        {"emb_params": torch.zeros(1, 4, 4)},
        {"<x>": torch.zeros(2, 2, dtype=torch.int64)},
        {"<x>": "text"},
        {"a b": torch.zeros(4)},
        {"string_to_param": {}},
        {"string_to_param": {"*": torch.zeros(1, 4)}},
        {"<x>": torch.zeros(0, 4)},
    ],
)
def test_other_contents_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError):
        load_tokens(content)


@pytest.mark.parametrize("name", ["learned_embeds.bin", "cat.pt", "cat.pkl"])
def test_pickles_are_never_opened_and_the_error_names_what_is_expected(
    tmp_path: Path, name: str
) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "opened",)

    torch.save(Payload(), tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(ArtifactError, match="safetensors"):
            load_tokens(source)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("token", ["<../x>", "<a/b>", "<a\\b>", "<CON>", "<>", "<x.>"])
def test_a_token_that_cannot_name_a_file_writes_nothing(tmp_path: Path, token: str) -> None:
    folder = tmp_path / "folder"
    with pytest.raises(ArtifactError):
        save_token(folder, token, torch.zeros(4))
    assert not any(tmp_path.rglob("*"))


def test_saving_never_replaces_another_token_and_refuses_nan(tmp_path: Path) -> None:
    save_token(tmp_path, "<cat>", torch.zeros(4))
    save_token(tmp_path, "<cat>", torch.ones(4))
    with pytest.raises(ArtifactError, match="another token"):
        save_token(tmp_path, "cat", torch.zeros(4))
    with pytest.raises(NonFiniteError):
        save_token(tmp_path, "<cat>", torch.full((4,), float("inf")))
    assert torch.equal(load_tokens(tmp_path)["<cat>"], torch.ones(1, 4))


def test_the_vectors_of_a_token_are_named_as_in_diffusers() -> None:
    assert vector_tokens("<x>", 1) == ["<x>"]
    assert vector_tokens("<x>", 3) == ["<x>", "<x>_1", "<x>_2"]
