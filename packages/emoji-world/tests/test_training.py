import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from unweave.emoji_world.models import save_fp16, store_clip
from unweave.emoji_world.tokenizer import MAX_TOKENS, build_tokenizer, world_words
from unweave.emoji_world.train.__main__ import main
from unweave.emoji_world.train.clip import build_clip
from unweave.emoji_world.train.diffusion import (
    build_scheduler,
    build_unet,
    draw_timesteps,
    train_diffusion,
)
from unweave.emoji_world.train.loop import Recipe, train
from unweave.emoji_world.train.pool import encoded_pool
from unweave.emoji_world.train.recogniser import noise_images
from unweave.emoji_world.train.vae import build_vae, train_decoder

RECIPE = Recipe(steps=12, batch_size=4, learning_rate=1e-2, checkpoint_every=3)


def run(folder: Path, stop_at: int | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1)
    )

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(4, 3, generator=generator)
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    train(model, loss_at, RECIPE, folder)
    return model.state_dict()


@pytest.mark.parametrize("stop_at", [1, 7, 11])
def test_a_stopped_run_ends_bit_identical_to_an_unbroken_one(tmp_path: Path, stop_at: int) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", stop_at)
    resumed = run(tmp_path / "broken")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_folder_of_another_recipe_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    other = Recipe(steps=99, batch_size=4, learning_rate=1e-2)
    with pytest.raises(ValueError, match="another recipe"):
        train(nn.Linear(1, 1), lambda step, generator: torch.zeros(()), other, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="step 0"):
        train(nn.Linear(1, 1), lambda step, generator: torch.tensor(float("nan")), RECIPE, tmp_path)


def test_each_word_of_the_world_is_one_token_and_other_text_survives() -> None:
    tokenizer = build_tokenizer()
    assert [word for word in world_words() if len(tokenizer.tokenize(word)) != 1] == []
    ids = tokenizer("a zebra, naïve 東京!").input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert "zebra" in tokenizer.decode(ids)
    padded = tokenizer("a cat face", padding="max_length", truncation=True).input_ids
    assert len(padded) == MAX_TOKENS


def test_the_networks_fit_together() -> None:
    vae, unet, scheduler = build_vae(), build_unet(), build_scheduler()
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
        output = unet(latents, torch.tensor([999]), torch.zeros(1, MAX_TOKENS, 128)).sample
    assert latents.shape == output.shape == (1, 4, 16, 16)
    assert scheduler.alphas_cumprod[-1] == 0


def test_a_pool_is_encoded_once_and_draws_repeat(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    vae = build_vae()
    text_encoder = CLIPTextModel(build_clip(tokenizer).config.text_config)
    pool = encoded_pool(vae, text_encoder, tokenizer, 6, tmp_path, seed=0)
    again = encoded_pool(vae, text_encoder, tokenizer, 6, tmp_path, seed=0)
    assert torch.equal(pool.latents, again.latents) and torch.equal(pool.states, again.states)
    draws = [pool.draw(5, 0.5, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))
    latents, states = draws[0]
    assert latents.shape == (5, 4, 16, 16) and states.shape == (5, MAX_TOKENS, 128)
    dropped = [bool((row == pool.empty.float()).all()) for row in states]
    assert 0 < sum(dropped) < 5
    all_empty = pool.draw(5, 1.0, torch.Generator())[1]
    assert bool((all_empty == pool.empty.float()).all())


def test_a_pool_of_another_encoder_is_made_anew(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    text_encoder = CLIPTextModel(build_clip(tokenizer).config.text_config)
    first = encoded_pool(build_vae(), text_encoder, tokenizer, 2, tmp_path, seed=0)
    second = encoded_pool(build_vae(), text_encoder, tokenizer, 2, tmp_path, seed=0)
    assert not torch.equal(first.latents, second.latents)


def test_training_the_decoder_further_leaves_the_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = build_vae().half()
    vae.save_pretrained(tmp_path / "vae")
    recipe = Recipe(steps=2, batch_size=2, learning_rate=1e-3)
    trained = train_decoder(recipe, tmp_path / "work", tmp_path / "vae").half().state_dict()
    same = {name for name, value in vae.state_dict().items() if torch.equal(value, trained[name])}
    encoder = {n for n in trained if n.startswith(("encoder.", "quant_conv."))}
    assert encoder <= same and not same >= set(trained)


def test_noise_images_have_many_grains() -> None:
    draws = [noise_images(3, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert all(images.shape == (3, 3, 64, 64) for images in draws)
    assert all(images.min() >= 0 and images.max() <= 1 for images in draws)
    grain = [images.diff(dim=-1).abs().mean().item() for images in draws]
    assert max(grain) > 10 * min(grain)


def test_timesteps_cover_the_schedule_and_prefer_its_middle() -> None:
    drawn = draw_timesteps(20_000, torch.Generator().manual_seed(0))
    assert drawn.min() == 0 and drawn.max() == 999 and drawn.dtype == torch.long
    shares = torch.histc(drawn.float(), 4, 0, 1000) / len(drawn)
    assert shares[1:3].min() > 1.2 * shares[[0, 3]].max() > 0.2


def test_a_warm_start_begins_with_the_stored_denoiser(tmp_path: Path) -> None:
    """With a learning rate of zero it ends with it too."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    save_fp16(build_vae(), tmp_path / "pipeline/vae")
    store_clip(build_clip(tokenizer), tokenizer, tmp_path)
    recipe = Recipe(steps=1, batch_size=2, learning_rate=1e-3)
    train_diffusion(recipe, 4, tmp_path / "first", tmp_path / "pipeline")
    weights = tmp_path / "pipeline/unet/diffusion_pytorch_model.safetensors"
    first = load_file(weights)
    still = Recipe(steps=1, batch_size=2, learning_rate=0.0, seed=1)
    train_diffusion(still, 4, tmp_path / "second", tmp_path / "pipeline", warm_start=True)
    second = load_file(weights)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_command_line_passes_on_what_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def record(recipe: Recipe, pool_size: int, work: Path, folder: Path, warm_start: bool) -> None:
        calls.append((recipe, folder, warm_start))
        train(
            nn.Linear(1, 1),
            lambda step, generator: torch.zeros(1, requires_grad=True).sum(),
            recipe,
            work / "diffusion",
        )

    monkeypatch.setattr("unweave.emoji_world.train.diffusion.train_diffusion", record)
    options = [
        "--steps",
        "2",
        "--seed",
        "3",
        "--out",
        str(tmp_path),
        "--work",
        str(tmp_path / "work"),
    ]
    monkeypatch.setattr("sys.argv", ["train", "diffusion", "--warm-start", *options])
    tmp_path.joinpath("training.json").write_text('{"diffusion": {"date": "earlier"}}')
    main()
    ((recipe, folder, warm_start),) = calls
    assert (recipe.steps, recipe.seed, folder, warm_start) == (2, 3, tmp_path / "pipeline", True)
    record_of_run = json.loads((tmp_path / "training.json").read_text())["diffusion"]
    assert record_of_run["recipe"]["steps"] == 2
    assert record_of_run["started_from"] == {"date": "earlier"}
