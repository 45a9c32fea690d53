"""Claims about LoRA: other tools read our files and compute what the dense edit computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest
import torch
from safetensors import safe_open

from unweave.diffusion_core.changes import LowRank
from unweave.diffusion_core.errors import ArtifactError, NonFiniteError, SelectionError
from unweave.diffusion_core.files import load_tensors, save_tensors
from unweave.diffusion_core.keys import base_parameters
from unweave.diffusion_core.lora import LORA_FILE, add_lora, load_lora_factors, save_lora
from unweave.diffusion_core.pipelines import base_model_hash
from unweave.diffusion_core.testing import tiny_pipeline
from unweave.diffusion_core.weight_delta import DeltaMeta, WeightDelta

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
Style = Literal["diffusers", "kohya"]


def _factors(module: torch.nn.Module, component: str, ranks: tuple[int, ...]) -> Pairs:
    """Return random factors for every attention and feed-forward weight, ranks in turn."""
    generator = torch.Generator().manual_seed(0)
    endings = ("to_q", "to_k", "to_v", "to_out.0", "net.2", "q_proj", "v_proj", "fc1", "fc2")
    pairs: Pairs = {}
    for name, weight in base_parameters(component, module).items():
        path = name.removesuffix(".weight")
        if name.endswith(".weight") and path.endswith(endings):
            rank = ranks[len(pairs) % len(ranks)]
            down = torch.randn(rank, weight.shape[1], generator=generator)
            up = 0.05 * torch.randn(weight.shape[0], rank, generator=generator)
            pairs[path] = (down, up)
    return pairs


def _outputs(pipe: StableDiffusionPipeline) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = pipe.tokenizer("a cat face", padding="max_length", return_tensors="pt").input_ids
    noise = torch.randn(1, 4, 16, 16, generator=generator)
    hidden = torch.randn(1, 77, 32, generator=generator)
    with torch.no_grad():
        return pipe.unet(noise, 7, hidden).sample, pipe.text_encoder(ids).last_hidden_state


def _delta(pipe: StableDiffusionPipeline, unet: Pairs, text: Pairs) -> WeightDelta:
    changes = {
        component: {f"{path}.weight": LowRank(*pair) for path, pair in pairs.items()}
        for component, pairs in (("unet", unet), ("text_encoder", text))
    }
    return WeightDelta(changes, DeltaMeta(base_model_hash(pipe), "test"))


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
@pytest.mark.parametrize("ranks", [(2,), (1, 3, 3, 4)])
@pytest.mark.parametrize("parts", ["unet", "text_encoder", "both"])
def test_diffusers_own_loader_gives_the_output_of_the_dense_edit(
    tmp_path: Path, style: Style, ranks: tuple[int, ...], parts: str
) -> None:
    pipe, other = tiny_pipeline(), tiny_pipeline()
    unet = {} if parts == "text_encoder" else _factors(pipe.unet, "unet", ranks)
    text = {} if parts == "unet" else _factors(pipe.text_encoder, "text_encoder", ranks)
    plain = _outputs(pipe)
    save_lora(tmp_path, unet, text, key_style=style)
    other.load_lora_weights(tmp_path, use_safetensors=True)
    _delta(pipe, unet, text).apply(pipe)
    for edited, adapted, before, changed in zip(
        _outputs(pipe), _outputs(other), plain, (unet, text), strict=True
    ):
        torch.testing.assert_close(adapted, edited, atol=1e-5, rtol=1e-5)
        assert torch.equal(edited, before) == (not changed)


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_factors_come_back(pipe: StableDiffusionPipeline, tmp_path: Path, style: Style) -> None:
    unet = _factors(pipe.unet, "unet", (2, 4))
    text = _factors(pipe.text_encoder, "text_encoder", (3,))
    save_lora(tmp_path, unet, text, key_style=style)
    for saved, loaded in zip((unet, text), load_lora_factors(tmp_path), strict=True):
        assert saved.keys() == loaded.keys()
        for path, (down, up) in saved.items():
            assert torch.equal(down, loaded[path][0])
            torch.testing.assert_close(up, loaded[path][1])


def test_text_encoder_keys_are_canonical_in_every_file(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    path = "encoder.layers.0.mlp.fc1"
    pair = (torch.ones(1, 32), torch.ones(64, 1))
    save_lora(tmp_path / "a", {}, {path: pair})
    save_lora(tmp_path / "b", {}, {path: pair}, key_style="kohya")
    assert f"text_encoder.text_model.{path}.lora_A.weight" in load_tensors(
        tmp_path / "a" / LORA_FILE
    )
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha" in load_tensors(
        tmp_path / "b" / LORA_FILE
    )


def test_alpha_is_the_rank_of_each_layer(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    unet = _factors(pipe.unet, "unet", (2, 2, 5))
    save_lora(tmp_path, unet)
    with safe_open(tmp_path / LORA_FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for prefix, settings in (("unet.", metadata), ("", config)):
        assert settings[prefix + "r"] == settings[prefix + "lora_alpha"] == 2
        assert settings[prefix + "rank_pattern"] == settings[prefix + "alpha_pattern"]
        assert set(settings[prefix + "rank_pattern"].values()) == {5}
        assert set(settings[prefix + "target_modules"]) == set(unet)


def test_a_lora_saved_by_diffusers_is_read_with_its_alpha(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["to_k", "to_v"], init_lora_weights="gaussian"
    )
    pipe.unet.add_adapter(config)
    for name, parameter in pipe.unet.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    pipe.save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=config.to_dict()
    )
    other = tiny_pipeline()
    unet, text = load_lora_factors(tmp_path)
    assert not text
    _delta(other, unet, {}).apply(other)
    torch.testing.assert_close(_outputs(pipe)[0], _outputs(other)[0], atol=1e-5, rtol=1e-5)


def test_a_delta_goes_on_a_pipeline_that_has_an_adapter_of_peft(tmp_path: Path) -> None:
    pipe, other = tiny_pipeline(), tiny_pipeline()
    unet = _factors(pipe.unet, "unet", (2,))
    save_lora(tmp_path, unet)
    delta = _delta(pipe, unet, {})
    pipe.load_lora_weights(tmp_path, use_safetensors=True)
    assert base_model_hash(pipe) == base_model_hash(other)
    delta.apply(pipe)
    delta.apply(other, strength=2.0)
    torch.testing.assert_close(_outputs(pipe)[0], _outputs(other)[0], atol=1e-5, rtol=1e-5)


def test_training_factors_start_from_the_unchanged_module(pipe: StableDiffusionPipeline) -> None:
    before = _outputs(pipe)[0]
    paths = list(_factors(pipe.unet, "unet", (1,)))
    with add_lora(pipe.unet, paths, 3, generator=torch.Generator().manual_seed(0)) as layers:
        torch.testing.assert_close(_outputs(pipe)[0], before)
        assert len(layers.parameters) == 2 * len(paths)
        optimizer = torch.optim.SGD(layers.parameters.values(), lr=1e2)
        noise, hidden = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 32)
        for _ in range(2):
            optimizer.zero_grad()
            pipe.unet(noise, 7, hidden).sample.square().mean().backward()
            optimizer.step()
        trained, factors = _outputs(pipe)[0], layers.factors()
    assert torch.equal(_outputs(pipe)[0], before)
    assert not torch.allclose(trained, before, atol=1e-3)
    _delta(pipe, factors, {}).apply(pipe)
    torch.testing.assert_close(_outputs(pipe)[0], trained, atol=1e-5, rtol=1e-5)


def test_factors_go_beside_linear_layers_only(pipe: StableDiffusionPipeline) -> None:
    for path, message in (("conv_in", "Conv2d"), ("nothing.here", "nothing")):
        with pytest.raises(SelectionError, match=message):
            add_lora(pipe.unet, [path], 2)
    with pytest.raises(SelectionError, match="got none"):
        add_lora(pipe.unet, [], 2)
    with pytest.raises(SelectionError, match="got 0"):
        add_lora(pipe.unet, ["time_embedding.linear_1"], 0)


def test_factors_that_fit_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="got none"):
        save_lora(tmp_path, {})
    with pytest.raises(SelectionError, match=r"unet\.x"):
        save_lora(tmp_path, {"x": (torch.ones(2, 3), torch.ones(3, 1))})
    with pytest.raises(NonFiniteError, match=r"unet\.x"):
        save_lora(tmp_path, {"x": (torch.ones(2, 3), torch.full((3, 2), float("inf")))})
    with pytest.raises(SelectionError, match="'webui'"):
        save_lora(tmp_path, {"x": (torch.ones(1, 1),) * 2}, key_style="webui")  # type: ignore[arg-type]


def test_files_that_are_no_lora_are_named(tmp_path: Path) -> None:
    path = tmp_path / LORA_FILE
    with pytest.raises(ArtifactError, match=LORA_FILE):
        load_lora_factors(tmp_path)
    for key in ("unet.x.weight", "lora_unet_x.lora_down.weight", "vae.x.lora_A.weight"):
        save_tensors(path, {key: torch.ones(1, 1)})
        with pytest.raises(ArtifactError, match=LORA_FILE):
            load_lora_factors(tmp_path)
    save_tensors(path, {"unet.x.lora_A.weight": torch.ones(1, 1)})
    with pytest.raises(ArtifactError, match="lora_B"):
        load_lora_factors(path)
