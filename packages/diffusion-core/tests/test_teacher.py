"""Claims about the frozen teacher: it keeps what is trained and shares the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from unweave.diffusion_core.errors import SelectionError
from unweave.diffusion_core.teacher import frozen_teacher

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def _trained_names(pipe: StableDiffusionPipeline) -> list[str]:
    return [name for name, _ in pipe.unet.named_parameters() if ".attn2.to_k." in name]


def test_training_the_student_leaves_the_teacher_as_it_was(pipe: StableDiffusionPipeline) -> None:
    inputs = (torch.randn(1, 4, 16, 16), torch.tensor([5]), torch.randn(1, 77, 32))
    before = pipe.unet(*inputs).sample
    teacher = frozen_teacher(pipe.unet, _trained_names(pipe))
    with torch.no_grad():
        for name in _trained_names(pipe):
            pipe.unet.get_parameter(name).add_(1.0)
    assert torch.equal(teacher(*inputs).sample, before)
    assert not torch.equal(pipe.unet(*inputs).sample, before)


def test_only_trained_parameters_are_copied(pipe: StableDiffusionPipeline) -> None:
    trained = set(_trained_names(pipe))
    teacher = frozen_teacher(pipe.unet, trained)
    for name, parameter in pipe.unet.named_parameters():
        shared = teacher.get_parameter(name).data_ptr() == parameter.data_ptr()
        assert shared == (name not in trained)


def test_the_teacher_is_frozen_and_the_student_is_not(pipe: StableDiffusionPipeline) -> None:
    pipe.text_encoder.train()
    teacher = frozen_teacher(pipe.text_encoder, [])
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    assert all(parameter.requires_grad for parameter in pipe.text_encoder.parameters())
    assert pipe.text_encoder.training


def test_unknown_names_are_refused(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(SelectionError, match=r"nothing\.weight"):
        frozen_teacher(pipe.unet, ["nothing.weight"])
