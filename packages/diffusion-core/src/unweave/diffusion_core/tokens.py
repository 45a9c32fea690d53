"""New words for a pipeline: adding tokens, training their embeddings alone, and their files."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unweave.diffusion_core.errors import (
    ArtifactError,
    NonFiniteError,
    PipelineError,
    PromptError,
    SelectionError,
)
from unweave.diffusion_core.files import load_metadata, load_tensors, safe_name, save_tensors
from unweave.diffusion_core.pipelines import text_encoders

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

_MAX_CHARACTERS = 100
_A1111_KEYS = ("emb_params", "string_to_param", "string_to_param.*")
_SDXL_KEYS = {"clip_l", "clip_g"}


def add_tokens(
    pipe: StableDiffusionPipeline,
    tokens: Sequence[str],
    initializer: str | Tensor | None = None,
) -> list[int]:
    """Add `tokens` to tokenizer and text encoder and return their ids.

    The new embeddings start as the mean of those of the words of `initializer`, as the tensor
    `initializer`, (width,) or (number of tokens, width), or as the mean of all embeddings. Old
    embeddings and the meaning of old prompts stay as they were. Raises `PromptError`, before
    anything is changed, for a token that is empty, exists, is longer than 100 characters, or holds
    spaces or control characters, and `PipelineError` for Stable Diffusion XL, whose second text
    encoder would not know the token.

    >>> from unweave.diffusion_core.testing import tiny_pipeline
    >>> add_tokens(tiny_pipeline(), ["<my-cat>"], "cat")
    [514]
    """
    if isinstance(tokens, str) or not tokens:
        raise PromptError(f"`tokens` must be a list of at least one token, got {tokens!r}")
    if len(text_encoders(pipe)) > 1:
        raise PipelineError(
            f"this {type(pipe).__name__} has two text encoders, and a learned token is for the one "
            "of Stable Diffusion 1.x and 2.x; give such a pipeline"
        )
    tokenizer, text_encoder = pipe.tokenizer, pipe.text_encoder
    _check_tokens(tokenizer, tokens)
    rows = _initial_rows(pipe, len(tokens), initializer)
    tokenizer.add_tokens([_added_token(token) for token in tokens])
    token_ids: list[int] = tokenizer.convert_tokens_to_ids(list(tokens))
    if max(token_ids) >= len(text_encoder.get_input_embeddings().weight):
        text_encoder.resize_token_embeddings(max(token_ids) + 1, mean_resizing=False)
    with torch.no_grad():
        text_encoder.get_input_embeddings().weight[token_ids] = rows
    return token_ids


def install_tokens(
    pipe: StableDiffusionPipeline, embeddings: Mapping[str, Tensor]
) -> dict[str, list[int]]:
    """Add learned tokens, {token: (n, width)} as `load_tokens` returns, and return their ids.

    A token of n > 1 vectors becomes `token`, `token_1`, ..., which the pipeline puts in the place
    of `token` in prompts.
    """
    return {
        token: add_tokens(pipe, vector_tokens(token, len(rows)), rows)
        for token, rows in embeddings.items()
    }


def vector_tokens(token: str, count: int) -> list[str]:
    """Return the names of the `count` vectors of one token, as diffusers names them.

    >>> vector_tokens("<cat>", 3)
    ['<cat>', '<cat>_1', '<cat>_2']
    """
    return [token, *(f"{token}_{index}" for index in range(1, count))]


@contextlib.contextmanager
def train_token_rows(text_encoder: nn.Module, token_ids: Sequence[int]) -> Iterator[nn.Parameter]:
    """Yield the embeddings of `token_ids` as a parameter of their own, (n, width), to be trained.

    While the block runs, the text encoder reads these rows from the parameter and its own weights
    collect no gradients, so no optimizer, whatever its weight decay or momentum, can move another
    row. When the block ends well the rows are written back; after an error the old ones stay.
    Raises `SelectionError` for no, repeated or unknown ids and `NonFiniteError` for rows that end
    as NaN or infinity.
    """
    encoder: Any = text_encoder
    embedding: nn.Embedding = encoder.get_input_embeddings()
    ids = torch.as_tensor(list(token_ids), device=embedding.weight.device)
    _check_ids(ids, embedding)
    rows = nn.Parameter(embedding.weight.detach()[ids].clone())

    def replace(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        matches = inputs[0][..., None] == ids.to(inputs[0].device)
        chosen = rows[matches.long().argmax(-1)].to(output)
        return torch.where(matches.any(-1, keepdim=True), chosen, output)

    required = [(parameter, parameter.requires_grad) for parameter in encoder.parameters()]
    encoder.requires_grad_(False)
    handle = embedding.register_forward_hook(replace)
    try:
        yield rows
    finally:
        handle.remove()
        for parameter, before in required:
            parameter.requires_grad_(before)
    if not bool(rows.detach().isfinite().all()):
        raise NonFiniteError("the trained token rows are not finite: lower the learning rate")
    with torch.no_grad():
        embedding.weight[ids] = rows.detach().to(embedding.weight)


def save_token(folder: str | Path, token: str, embedding: Tensor) -> Path:
    """Write one learned token, (width,) or (n, width), to a file of its own; return the file.

    The file has the token's name without angle brackets and is what
    `pipe.load_textual_inversion(file)`, A1111 and ComfyUI read. Raises `ArtifactError` when the
    name cannot be a file name or the file belongs to another token, and `NonFiniteError` for NaN.
    """
    _check_text(token)
    rows = _as_rows(embedding, token)
    if not bool(rows.isfinite().all()):
        raise NonFiniteError(f"the embedding of {token!r} has NaN or infinite values")
    name = safe_name(token.removeprefix("<").removesuffix(">"), "token")
    path = Path(folder) / f"{name}.safetensors"
    if path.exists() and list(load_tensors(path)) != [token]:
        raise ArtifactError(
            f"{str(path)!r} exists and holds another token than {token!r}: choose another folder"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot write the folder {str(folder)!r}: {error}") from error
    save_tensors(path, {token: rows})
    return path


def load_tokens(
    source: str | Path | Mapping[str, Any], *, token: str | None = None
) -> dict[str, Tensor]:
    """Read learned tokens, {token: (n, width)}, from a file, a folder of files or a mapping.

    Three forms are known: diffusers' {token: tensor}; A1111's `string_to_param` or `emb_params`;
    SDXL's `clip_l` and `clip_g`, of which `clip_l` fits Stable Diffusion 1. The last two name no
    token: it is `token`, the `name` stored with them, or the name of the file. `token` renames
    the token of any single file. Only safetensors files are opened. Raises `ArtifactError`.
    """
    if isinstance(source, Mapping):
        return _read_form(source, token, "the mapping", None)
    path = Path(source)
    if not path.is_dir():
        return _read_file(path, token)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        load_tensors(path / "learned_embeds.safetensors")
    if token is not None and len(files) > 1:
        raise ArtifactError(
            f"{str(path)!r} holds {len(files)} files: give the one to be read as {token!r}"
        )
    found: dict[str, Tensor] = {}
    for file in files:
        for name, rows in _read_file(file, token).items():
            if name in found:
                raise ArtifactError(f"{str(path)!r} holds the token {name!r} twice")
            found[name] = rows
    return found


def _check_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    vocabulary = tokenizer.get_vocab()
    for index, token in enumerate(tokens):
        _check_text(token)
        spelled = (token, token.lower(), f"{token.lower()}</w>")
        if any(piece in vocabulary for piece in spelled) or token in tokens[:index]:
            raise PromptError(
                f"the token {token!r} is already known to the tokenizer: choose another, such as "
                f"'<my-{token.strip('<>')}>'"
            )


def _check_text(token: str) -> None:
    if not isinstance(token, str) or not token.strip():
        raise PromptError(f"a token must be text that is not empty, got {token!r}")
    if len(token) > _MAX_CHARACTERS:
        raise PromptError(
            f"the token {token[:20]!r}... has {len(token)} characters, and {_MAX_CHARACTERS} are "
            "allowed"
        )
    for character in token:
        if character.isspace() or unicodedata.category(character).startswith("C"):
            raise PromptError(
                f"the token {token!r} contains {character!r}: use neither spaces nor control "
                "characters"
            )


def _added_token(token: str) -> Any:
    """Return a token that is matched as it is written and never inside another word."""
    from transformers import AddedToken

    return AddedToken(token, normalized=False, single_word=token[-1].isalnum() or token[-1] == "_")


def _initial_rows(
    pipe: StableDiffusionPipeline, count: int, initializer: str | Tensor | None
) -> Tensor:
    weight: Tensor = pipe.text_encoder.get_input_embeddings().weight.detach()
    if initializer is None:
        return weight.mean(0).expand(count, -1)
    if isinstance(initializer, str):
        token_ids = pipe.tokenizer(initializer, add_special_tokens=False).input_ids
        if not token_ids:
            raise PromptError(f"`initializer` must name something, got {initializer!r}")
        return weight[token_ids].mean(0).expand(count, -1)
    rows = initializer.detach().to(weight)
    if rows.shape not in ((weight.shape[1],), (count, weight.shape[1])):
        raise PromptError(
            f"the embeddings of {count} tokens must be ({weight.shape[1]},) or "
            f"{(count, weight.shape[1])} for this text encoder, got {tuple(rows.shape)}; they may "
            "be made for another model"
        )
    if not bool(rows.isfinite().all()):
        raise NonFiniteError("the embeddings of the new tokens have NaN or infinite values")
    return rows.expand(count, -1)


def _check_ids(ids: Tensor, embedding: nn.Embedding) -> None:
    values = ids.tolist()
    if not values or len(set(values)) < len(values):
        raise SelectionError(f"`token_ids` must be different ids, at least one, got {values}")
    if min(values) < 0 or max(values) >= embedding.num_embeddings:
        raise SelectionError(
            f"`token_ids` must be in [0, {embedding.num_embeddings}), got {values}"
        )


def _read_file(path: Path, token: str | None) -> dict[str, Tensor]:
    tensors = load_tensors(path)
    stored = load_metadata(path).get("name")
    return _read_form(tensors, token, repr(str(path)), stored or path.stem)


def _read_form(
    content: Mapping[str, Any], token: str | None, source: str, fallback: str | None
) -> dict[str, Tensor]:
    if set(content) & _SDXL_KEYS and set(content) <= _SDXL_KEYS:
        if "clip_l" not in content:
            raise ArtifactError(
                f"{source} holds only `clip_g`, for the second text encoder of SDXL: a learned "
                "token for Stable Diffusion 1.x or 2.x is needed"
            )
        return _named(token or fallback, content["clip_l"], source)
    for key in _A1111_KEYS:
        if key in content:
            name = content.get("name")
            rows = content[key]
            inner = rows.get("*") if isinstance(rows, Mapping) else rows
            return _named(token or (name if isinstance(name, str) else fallback), inner, source)
    if token is not None and len(content) == 1:
        return _named(token, next(iter(content.values())), source)
    if token is not None or not content:
        raise ArtifactError(f"{source} holds {len(content)} tokens: expected one, for {token!r}")
    return {
        name: rows
        for key, value in content.items()
        for name, rows in _named(key, value, source).items()
    }


def _named(name: str | None, value: Any, source: str) -> dict[str, Tensor]:
    if not isinstance(value, Tensor):
        raise ArtifactError(
            f"{source} is no learned token: expected a tensor, got {type(value).__name__}"
        )
    if not name:
        raise ArtifactError(f"{source} does not name its token: give `token`")
    try:
        _check_text(name)
    except PromptError as error:
        raise ArtifactError(f"{source}: {error}; give `token` to rename it") from error
    return {name: _as_rows(value, name)}


def _as_rows(embedding: Tensor, token: str) -> Tensor:
    rows = embedding.detach()
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or 0 in rows.shape or not rows.is_floating_point():
        raise ArtifactError(
            f"the embedding of {token!r} must be floating, (width,) or (n, width), got "
            f"{embedding.dtype} {tuple(embedding.shape)}"
        )
    return rows
