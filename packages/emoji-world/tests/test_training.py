from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unweave.emoji_world.tokenizer import MAX_TOKENS, build_tokenizer, world_words
from unweave.emoji_world.train.diffusion import build_scheduler, build_unet
from unweave.emoji_world.train.loop import Recipe, train
from unweave.emoji_world.train.vae import build_vae

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
