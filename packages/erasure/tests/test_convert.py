"""Files of other tools become erasures: formats, exactness, and what is refused."""

import pickle
import re

import pytest
import torch

from unweave.diffusion_core.errors import ArtifactError
from unweave.diffusion_core.files import save_tensors, sha256_of
from unweave.diffusion_core.parameters import select_parameters
from unweave.diffusion_core.testing import tiny_pipeline
from unweave.erasure.convert import convert_delta
from unweave.erasure.protocol import Erasure, ErasureRequest

REQUEST = ErasureRequest("cat", replacement="animal")
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
TINY_BLOCKS = {
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
}


@pytest.fixture
def edited(pipe):
    """The weights of the tiny U-Net with new keys and values."""
    weights = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for name in select_parameters(pipe.unet, "cross-attention-kv"):
        weights[name] += 0.1 * torch.randn(weights[name].shape, generator=generator)
    return weights


def only_changed(pipe, weights):
    return {name: weights[name] for name in select_parameters(pipe.unet, "cross-attention-kv")}


def compvis_name(name):
    path, _, kind = name.rpartition(".")
    for old, new in ENDS.items():
        if path == old:
            return f"{new}.{kind}"
    for old, new in TINY_BLOCKS.items():
        if path == old or path.startswith(old + "."):
            rest = path.removeprefix(old).strip(".")
            parts = [new, RESNET.get(rest, rest), kind]
            return ".".join(part for part in parts if part)
    raise AssertionError(name)


def check(erasure, pipe, weights):
    assert set(erasure.delta.deltas["unet"]) == set(only_changed(pipe, weights))
    with erasure.apply(pipe):
        for name, tensor in pipe.unet.state_dict().items():
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-6)


def test_delta_bin_of_custom_diffusion_is_read(pipe, edited, tmp_path):
    path = tmp_path / "delta.bin"
    torch.save({"unet": only_changed(pipe, edited), "modifier_token": {}}, path)
    erasure = convert_delta(path, pipe, "doco", REQUEST)
    check(erasure, pipe, edited)
    assert erasure.delta.meta.settings == {
        "converted_from": "delta.bin",
        "sha256": sha256_of(path),
    }


def test_compressed_delta_bin_becomes_exactly_a_lora(pipe, tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = select_parameters(pipe.unet, "cross-attention-kv")
    factors = {
        name: {
            "u": torch.randn(weight.shape[0], 2, generator=generator),
            "v": torch.randn(2, weight.shape[1], generator=generator),
        }
        for name, weight in weights.items()
    }
    torch.save({"unet": factors}, tmp_path / "delta.bin")
    erasure = convert_delta(tmp_path / "delta.bin", pipe, "doco", REQUEST)
    assert erasure.delta.low_rank
    wanted = {n: w.detach() + factors[n]["u"] @ factors[n]["v"] for n, w in weights.items()}
    with erasure.apply(pipe):
        for name, weight in weights.items():
            torch.testing.assert_close(weight.detach(), wanted[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "unet."])
def test_whole_unet_in_diffusers_names_is_read(pipe, edited, tmp_path, prefix, suffix):
    weights = {prefix + name: tensor for name, tensor in edited.items()}
    path = tmp_path / ("unet" + suffix)
    (torch.save if suffix == ".pt" else lambda w, p: save_tensors(p, w))(weights, path)
    check(convert_delta(path, pipe, "esd", REQUEST), pipe, edited)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_unet_in_compvis_names_is_read(pipe, edited, tmp_path, prefix, wrapped):
    weights = {prefix + compvis_name(name): tensor for name, tensor in edited.items()}
    if prefix:
        weights["first_stage_model.encoder.conv_in.weight"] = torch.zeros(1)
    torch.save({"state_dict": weights} if wrapped else weights, tmp_path / "compvis.pt")
    check(convert_delta(tmp_path / "compvis.pt", pipe, "esd", REQUEST), pipe, edited)


def test_rounding_to_half_precision_is_no_change(pipe, edited, tmp_path):
    torch.save({name: tensor.half() for name, tensor in edited.items()}, tmp_path / "half.pt")
    erasure = convert_delta(tmp_path / "half.pt", pipe, "uce", REQUEST)
    assert set(erasure.delta.deltas["unet"]) == set(only_changed(pipe, edited))


def test_converted_erasure_is_saved_and_undone(pipe, edited, tmp_path):
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    torch.save({"unet": only_changed(pipe, edited)}, tmp_path / "delta.bin")
    convert_delta(tmp_path / "delta.bin", pipe, "doco", REQUEST).save(tmp_path / "safe")
    loaded = Erasure.load(tmp_path / "safe")
    assert loaded.request == REQUEST and loaded.delta.meta.method == "doco"
    check(loaded, pipe, edited)
    assert all(torch.equal(before[n], tensor) for n, tensor in pipe.unet.state_dict().items())


def test_applied_deltas_do_not_count(pipe, edited, tmp_path):
    torch.save({"unet": only_changed(pipe, edited)}, tmp_path / "delta.bin")
    first = convert_delta(tmp_path / "delta.bin", pipe, "doco", REQUEST)
    with first.apply(pipe):
        second = convert_delta(tmp_path / "delta.bin", pipe, "doco", REQUEST)
    for name, change in first.delta.deltas["unet"].items():
        assert torch.equal(change, second.delta.deltas["unet"][name])


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_pickle_is_never_run(pipe, tmp_path):
    torch.save({"unet": Attack(tmp_path / "harm")}, tmp_path / "delta.bin")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Attack(tmp_path / "harm"), protocol=2))
    for name in ("delta.bin", "plain.bin"):
        with pytest.raises(ArtifactError, match="could run any code"):
            convert_delta(tmp_path / name, pipe, "doco", REQUEST)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no weights"),
        (torch.zeros(2), "holds no weights"),
        ({"unet": {"conv_in.weight": 1.0}}, "float at 'conv_in.weight'"),
        ({"unet": {"nothing.weight": torch.zeros(1)}}, "'nothing.weight', which this U-Net lacks"),
        ({"unet": {"conv_in.bias": torch.zeros(3)}}, "of shape (3,)"),
        ({"unet": {"conv_in.bias": torch.zeros(3)}, "modifier_token": {"x": 1}}, "learned words"),
        ({"input_blocks.0.0.weight": torch.zeros(1)}, "not the whole"),
    ],
)
def test_foreign_content_is_refused(pipe, tmp_path, content, message):
    torch.save(content, tmp_path / "file.bin")
    with pytest.raises(ArtifactError, match=re.escape(message)):
        convert_delta(tmp_path / "file.bin", pipe, "doco", REQUEST)


def test_missing_damaged_and_unedited_files_are_named(pipe, tmp_path):
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 nothing")
    for name in ("missing.pt", "damaged.pt"):
        with pytest.raises(ArtifactError, match=name):
            convert_delta(tmp_path / name, pipe, "doco", REQUEST)
    torch.save(tiny_pipeline().unet.state_dict(), tmp_path / "same.pt")
    with pytest.raises(ArtifactError, match="nothing was erased"):
        convert_delta(tmp_path / "same.pt", pipe, "doco", REQUEST)
