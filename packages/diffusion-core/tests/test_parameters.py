"""Claims about selections: by class and position, never empty, and the rest stays untouched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from unweave.diffusion_core.errors import SelectionError, UnweaveError
from unweave.diffusion_core.parameters import (
    ROLES,
    TEXT_ENCODER_ROLES,
    UNET_ROLES,
    assert_untouched,
    fingerprint,
    select_parameters,
    train_only,
)

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel


def _text_encoder(layers: int, width: int, inner: int, heads: int) -> CLIPTextModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    with torch.device("meta"):
        return CLIPTextModel(config)


def _size(selection: dict[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in selection.values())


@pytest.mark.parametrize(
    ("role", "size"),
    [
        ("mlp-only", 56_669_184),
        ("attn-only", 28_348_416),
        ("mlp-attn", 85_017_600),
        ("mlp-final-attn", 59_031_552),
        ("all", 123_060_480),
    ],
)
def test_the_roles_of_clip_vit_l_have_the_sizes_of_the_paper(role: str, size: int) -> None:
    assert _size(select_parameters(_text_encoder(12, 768, 3072, 12), role)) == size


def test_the_last_attention_is_the_last_by_position_and_not_by_name() -> None:
    text_encoder = _text_encoder(12, 8, 16, 2)
    mlps = select_parameters(text_encoder, "mlp-only")
    both = select_parameters(text_encoder, "mlp-final-attn")
    last = both.keys() - mlps.keys()
    assert len(last) == 8
    assert all(".11.self_attn." in name for name in last)


def test_renaming_modules_does_not_change_what_is_selected() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anything = _text_encoder(3, 8, 16, 2)

    wrapped = Wrapped()
    for role in TEXT_ENCODER_ROLES:
        selected = select_parameters(wrapped, role).values()
        expected = select_parameters(wrapped.anything, role).values()
        assert [id(parameter) for parameter in selected] == [id(p) for p in expected]


def test_the_roles_of_a_unet_divide_it_as_they_say(pipe: StableDiffusionPipeline) -> None:
    unet = pipe.unet
    crossing = select_parameters(unet, "cross-attention")
    within = select_parameters(unet, "self-attention")
    rest = select_parameters(unet, "not-cross-attention")
    keys_values = select_parameters(unet, "cross-attention-kv")
    assert not crossing.keys() & within.keys()
    assert crossing.keys() | rest.keys() == dict(unet.named_parameters()).keys()
    assert not crossing.keys() & rest.keys()
    assert within.keys() < rest.keys()
    assert keys_values.keys() < crossing.keys()
    assert {parameter.shape[1] for parameter in keys_values.values()} == {32}
    assert all(".attn2." in name for name in crossing)
    assert all(".attn1." in name for name in within)
    assert all(name.endswith(("to_k.weight", "to_v.weight")) for name in keys_values)


@pytest.mark.parametrize("role", UNET_ROLES)
def test_a_unet_role_of_a_text_encoder_is_refused_with_the_roles_there_are(
    pipe: StableDiffusionPipeline, role: str
) -> None:
    with pytest.raises(SelectionError) as error:
        select_parameters(pipe.text_encoder, role)
    assert all(known in str(error.value) for known in ROLES)


@pytest.mark.parametrize("role", TEXT_ENCODER_ROLES)
def test_a_text_encoder_role_of_a_unet_is_refused_with_the_roles_there_are(
    pipe: StableDiffusionPipeline, role: str
) -> None:
    with pytest.raises(SelectionError) as error:
        select_parameters(pipe.unet, role)
    assert all(known in str(error.value) for known in ROLES)


def test_an_unknown_role_is_refused_with_those_that_are_known(
    pipe: StableDiffusionPipeline,
) -> None:
    with pytest.raises(SelectionError, match=r"mlp-final-attn.*'mlp'"):
        select_parameters(pipe.text_encoder, "mlp")


def test_only_the_chosen_parameters_collect_gradients(pipe: StableDiffusionPipeline) -> None:
    chosen = select_parameters(pipe.text_encoder, "mlp-only")
    with train_only([pipe.text_encoder, pipe.unet], chosen):
        pipe.text_encoder(torch.tensor([[1, 2, 3]]))[0].sum().backward()
        trained = {name for name, p in pipe.text_encoder.named_parameters() if p.grad is not None}
        assert trained == chosen.keys()
        assert not any(parameter.requires_grad for parameter in pipe.unet.parameters())


def test_train_only_leaves_flags_as_they_were_and_no_gradients(
    pipe: StableDiffusionPipeline,
) -> None:
    frozen = next(pipe.text_encoder.parameters()).requires_grad_(False)
    chosen = select_parameters(pipe.text_encoder, "mlp-only")
    with pytest.raises(RuntimeError, match="stopped"), train_only([pipe.text_encoder], chosen):
        pipe.text_encoder(torch.tensor([[1, 2, 3]]))[0].sum().backward()
        raise RuntimeError("stopped")
    for parameter in pipe.text_encoder.parameters():
        assert parameter.requires_grad == (parameter is not frozen)
        assert parameter.grad is None


def test_training_nothing_or_parameters_of_another_module_is_refused(
    pipe: StableDiffusionPipeline,
) -> None:
    with pytest.raises(SelectionError), train_only([pipe.unet], {}):
        pass
    foreign = select_parameters(pipe.text_encoder, "mlp-only")
    with pytest.raises(SelectionError, match="8 are in none"), train_only([pipe.unet], foreign):
        pass
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())


def test_one_bit_in_one_tensor_changes_its_fingerprint_only(pipe: StableDiffusionPipeline) -> None:
    before = fingerprint(pipe.unet)
    name, parameter = next(iter(select_parameters(pipe.unet, "cross-attention-kv").items()))
    parameter.detach().view(torch.int32).view(-1)[0] ^= 1
    after = fingerprint(pipe.unet)
    assert {key for key in before if before[key] != after[key]} == {name}
    assert_untouched(before, after, [name])
    with pytest.raises(UnweaveError, match=name):
        assert_untouched(before, after)


def test_buffers_are_part_of_the_fingerprint() -> None:
    module = nn.BatchNorm1d(2)
    before = fingerprint(module)
    module(torch.randn(4, 2))
    with pytest.raises(UnweaveError, match="running_mean"):
        assert_untouched(before, fingerprint(module))


def test_a_lost_tensor_is_a_change_and_a_misspelt_exception_is_an_error() -> None:
    with pytest.raises(UnweaveError, match="weight"):
        assert_untouched({"weight": "1"}, {})
    with pytest.raises(SelectionError, match="wieght"):
        assert_untouched({"weight": "1"}, {"weight": "1"}, ["wieght"])
