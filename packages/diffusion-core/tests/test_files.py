"""Claims about files: whole or untouched, verified when read, never unpickled."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
from pathlib import Path

import pytest
import torch

from unweave.diffusion_core.errors import ArtifactError
from unweave.diffusion_core.files import (
    atomic_folder,
    atomic_write_bytes,
    folder_lock,
    load_metadata,
    load_tensors,
    read_manifest,
    safe_name,
    save_tensors,
    sha256_of,
    write_manifest,
)


def _write_artifact(folder: Path, value: float) -> None:
    with atomic_folder(folder) as new:
        save_tensors(new / "a.safetensors", {"x": torch.full((64,), value)})
        save_tensors(new / "b.safetensors", {"x": torch.full((64,), -value)})
        write_manifest(new, {"value": value})


def _write_many(folder: Path, value: float) -> None:
    for _ in range(20):
        _write_artifact(folder, value)


def _raise_io_error(*_: object) -> None:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "..", ".", "/etc/passwd", "a/b", "a\\b", "C:x", "", "  ", "a\0b", "a\nb"),
        *(
            "x" * 300,
            "é" * 99 + "漢" * 10,
            "\ud800",
            "CON",
            "con.txt",
            "Lpt1",
            "nul",
            "end.",
            "end ",
        ),
        " start",
    ],
)
def test_unsafe_names_are_refused(name: str) -> None:
    with pytest.raises(ArtifactError, match="method name"):
        safe_name(name, "method")


@pytest.mark.parametrize("name", ["a", "few-shot", "<cat-toy>", "console", "漢字", "v1.0"])
def test_ordinary_names_are_returned_unchanged(name: str) -> None:
    assert safe_name(name, "token") == name


def test_the_error_quotes_the_name() -> None:
    with pytest.raises(ArtifactError, match=r"'\.\./x'"):
        safe_name("../x", "token")


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    shared = torch.arange(6.0).reshape(2, 3)
    save_tensors(path, {"a": shared, "b": shared.T, "c": torch.tensor(3)}, {"key": "value"})
    loaded = load_tensors(path)
    assert torch.equal(loaded["a"], shared) and torch.equal(loaded["b"], shared.T)
    assert loaded["c"].item() == 3
    assert load_metadata(path) == {"key": "value"}


def test_every_truncation_of_a_tensor_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.randn(40), "b": torch.randn(3, 3)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match=r"t\.safetensors"):
            load_tensors(path)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pkl", ".ckpt"])
def test_pickles_are_never_opened_and_the_expected_file_is_named(
    tmp_path: Path, suffix: str
) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / f"weights{suffix}").write_bytes(pickle.dumps(Trap()))
    for path in (tmp_path / f"weights{suffix}", tmp_path / "weights.safetensors"):
        with pytest.raises(ArtifactError, match=r"expected the safetensors file"):
            load_tensors(path)
    os.rename(tmp_path / f"weights{suffix}", tmp_path / "weights.safetensors")
    with pytest.raises(ArtifactError, match=r"weights\.safetensors"):
        load_tensors(tmp_path / "weights.safetensors")
    assert not (tmp_path / "sprung").exists()


def test_a_failing_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic_write_bytes(path, b"old")
    monkeypatch.setattr(os, "fsync", _raise_io_error)
    with pytest.raises(ArtifactError, match=r"file'.*Input/output error"):
        atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_failing_disk_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    folder = tmp_path / "artifact"
    _write_artifact(folder, 1.0)
    monkeypatch.setattr(os, failing, _raise_io_error)
    with pytest.raises(ArtifactError, match="Input/output error"):
        _write_artifact(folder, 2.0)
    monkeypatch.undo()
    assert read_manifest(folder)["value"] == 1.0
    assert os.listdir(tmp_path) == ["artifact"]


def test_a_failing_block_keeps_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    _write_artifact(folder, 1.0)
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder) as new:
        (new / "half").write_bytes(b"x")
        raise KeyboardInterrupt
    assert read_manifest(folder)["value"] == 1.0
    assert os.listdir(tmp_path) == ["artifact"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    _write_artifact(folder, 1.0)
    with atomic_folder(folder) as new:
        save_tensors(new / "only.safetensors", {"x": torch.ones(1)})
        write_manifest(new, {})
    assert sorted(os.listdir(folder)) == ["manifest.json", "only.safetensors"]


def test_folders_are_replaced_without_the_exchange_call_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unweave.diffusion_core.files._exchange", lambda *_: False)
    for value in (1.0, 2.0):
        _write_artifact(tmp_path / "artifact", value)
    assert read_manifest(tmp_path / "artifact")["value"] == 2.0
    assert os.listdir(tmp_path) == ["artifact"]


def test_a_folder_with_files_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"chapter1\.tex"):
        _write_artifact(folder, 1.0)
    assert (folder / "chapter1.tex").read_text() == "years of work"


def test_missing_parents_and_files_in_the_way_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere' does not exist"):
        atomic_write_bytes(tmp_path / "nowhere" / "file", b"")
    with pytest.raises(ArtifactError, match="nowhere' does not exist"):
        _write_artifact(tmp_path / "nowhere" / "artifact", 1.0)
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(ArtifactError, match="taken"):
        _write_artifact(tmp_path / "taken", 1.0)
    with pytest.raises(ArtifactError, match="NUL"):
        atomic_write_bytes("a\0b", b"")


def test_a_read_only_parent_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ArtifactError, match="artifact': Permission denied"):
        _write_artifact(tmp_path / "artifact", 1.0)
    with pytest.raises(ArtifactError, match="file': Permission denied"):
        atomic_write_bytes(tmp_path / "file", b"")


def test_concurrent_writers_leave_one_whole_version(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(folder, float(i))) for i in (1, 2, 3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    value = read_manifest(folder)["value"]
    assert load_tensors(folder / "a.safetensors")["x"][0] == value
    assert load_tensors(folder / "b.safetensors")["x"][0] == -value
    assert os.listdir(tmp_path) == ["artifact"]


def test_a_manifest_names_file_and_both_hashes(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    _write_artifact(folder, 1.0)
    a, b = folder / "a.safetensors", folder / "b.safetensors"
    recorded, found = sha256_of(a), sha256_of(b)
    a.write_bytes(b.read_bytes())
    with pytest.raises(ArtifactError) as error:
        read_manifest(folder)
    assert all(part in str(error.value) for part in ("a.safetensors", recorded, found))


def test_every_changed_byte_and_cut_of_a_manifest_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    _write_artifact(folder, 1.0)
    path = folder / "manifest.json"
    whole = path.read_bytes()
    chance = random.Random(0)
    damaged = [whole[:length] for length in range(len(whole))]
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << chance.randrange(8)
        damaged.append(bytes(flipped))
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=r"manifest\.json"):
            read_manifest(folder)


def test_missing_files_and_manifests_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    with pytest.raises(ArtifactError, match="no such folder"):
        read_manifest(folder)
    _write_artifact(folder, 1.0)
    (folder / "a.safetensors").rename(folder / "a.bin")
    with pytest.raises(ArtifactError, match=r"a\.safetensors.*missing.*a\.bin"):
        read_manifest(folder)


def test_a_manifest_cannot_reach_out_of_its_folder(tmp_path: Path) -> None:
    from unweave.diffusion_core import files

    (tmp_path / "secret").write_bytes(b"x")
    folder = tmp_path / "artifact"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "sha256_of", lambda _: "0" * 63 + "1")
        patch.setattr(Path, "rglob", lambda *_: [folder / ".." / "secret"])
        write_manifest(folder, {})
    with pytest.raises(ArtifactError, match="stands for a folder"):
        read_manifest(folder)


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    holder = f"process {os.getpid()}"
    with folder_lock(folder), pytest.raises(ArtifactError, match=holder), folder_lock(folder):
        pass
    with folder_lock(folder):
        pass
    assert os.listdir(tmp_path) == []


def _lock_and_die(folder: Path) -> None:
    with folder_lock(folder):
        os._exit(1)


def test_a_lock_does_not_outlive_a_killed_process(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=_lock_and_die, args=(tmp_path / "run",)
    )
    process.start()
    process.join()
    with folder_lock(tmp_path / "run"):
        pass
