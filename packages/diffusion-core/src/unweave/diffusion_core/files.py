"""Files that are written whole or not at all, verified when read, and never unpickled."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from unweave.diffusion_core.errors import ArtifactError

MANIFEST = "manifest.json"
_FORMAT = "unweave-manifest/1"
_OWN_HASH = "manifest_sha256"
_ZEROS = "0" * 64
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
_MAX_CHARACTERS, _MAX_BYTES = 100, 200


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader meets the old file or the whole new one.

    Raises `ArtifactError` naming the path when it cannot be written; the old file then stays.
    """
    target = _real(path)
    temporary = _sibling(target)
    with _named_errors(target):
        try:
            with open(temporary, "xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    _sync_folder(target.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place, whole, when the block ends well.

    If the block or the writing fails, the new folder is removed and `path` stays as it was. A
    folder holding files that neither its manifest nor the new version knows is never replaced.
    Raises `ArtifactError` naming the path when it cannot be written.
    """
    target = _real(path)
    temporary = _sibling(target)
    if target.exists() and not target.is_dir():
        raise ArtifactError(f"cannot write the folder {str(target)!r}: a file has that name")
    with _named_errors(target):
        temporary.mkdir()
    try:
        yield temporary
        _refuse_foreign_files(target, temporary)
        with _named_errors(target):
            _sync_tree(temporary)
            _swap_in(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync_folder(target.parent)


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with _named_errors(Path(path), "read"), open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def safe_name(name: str, what: str) -> str:
    """Return `name` unchanged if it can be one file name on every system.

    `what` says in the error what is being named, for example "method". Raises `ArtifactError`.
    """
    rule = _broken_name_rule(name)
    if rule:
        shown = name if len(name) <= _MAX_CHARACTERS else name[:_MAX_CHARACTERS] + "..."
        raise ArtifactError(f"the {what} name {shown!r} cannot be a file name: it {rule}")
    return name


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors, copied to the CPU, and text `metadata` to one safetensors file atomically."""
    from safetensors.torch import save

    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    atomic_write_bytes(path, save(copies, metadata=dict(metadata) if metadata else None))


def load_tensors(path: str | Path, *, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file into CPU tensors, checking its SHA-256 first when it is given.

    Raises `ArtifactError` when the file is missing, damaged, pickled, or has another hash.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(path)
    data = _read_safetensors_bytes(path)
    if sha256 is not None:
        _check_hash(path, sha256, hashlib.sha256(data).hexdigest())
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise ArtifactError(
            f"{str(path)!r} is not a whole safetensors file ({error}); it was cut short, damaged "
            "or is of another format: save or download it again"
        ) from error


def load_metadata(path: str | Path) -> dict[str, str]:
    """Read the text metadata of a safetensors file; empty when it has none."""
    path = Path(path)
    data = _read_safetensors_bytes(path)
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return {str(key): str(value) for key, value in header.get("__metadata__", {}).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{str(path)!r} has no readable safetensors header: {error}") from error


@contextlib.contextmanager
def folder_lock(path: str | Path) -> Iterator[None]:
    """Hold a folder for this process alone; the lock ends with the process, however that ends.

    The folder itself need not exist yet. Raises `ArtifactError` with the process id of the
    holder when the folder is already held.
    """
    target = _real(path)
    lock_path = target.parent / f".{target.name}.lock"
    with _named_errors(target):
        descriptor = _acquire(lock_path)
    if descriptor is None:
        holder = lock_path.read_text(encoding="ascii", errors="replace") or "unknown"
        raise ArtifactError(
            f"the folder {str(target)!r} is in use by process {holder.strip()}; wait until it "
            "ends or choose another folder"
        )
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock_path.unlink()
        os.close(descriptor)


def write_manifest(folder: str | Path, content: Mapping[str, Any]) -> None:
    """Write `manifest.json`: the JSON `content` and the SHA-256 of every file now in `folder`.

    The manifest also carries its own hash, so that a change to any byte of it is found.
    """
    folder = Path(folder)
    taken = {"format", "files", _OWN_HASH} & content.keys()
    if taken:
        raise ArtifactError(f"the manifest key {sorted(taken)[0]!r} is reserved: use another")
    names = sorted(
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and file != folder / MANIFEST
    )
    files = {name: sha256_of(folder / name) for name in names}
    manifest = {"format": _FORMAT, **content, "files": files, _OWN_HASH: _ZEROS}
    data = json.dumps(manifest, indent=2, allow_nan=False).encode() + b"\n"
    own = hashlib.sha256(data).hexdigest()
    head, _, tail = data.rpartition(_ZEROS.encode())
    atomic_write_bytes(folder / MANIFEST, head + own.encode() + tail)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read `manifest.json` and verify its own hash and that of every file it lists.

    Files that the manifest does not list are neither opened nor trusted. Raises `ArtifactError`
    naming the file, the hash that was recorded and the hash that was found.
    """
    folder = Path(folder)
    manifest = _parse_manifest(folder)
    for name, recorded in manifest["files"].items():
        _check_relative(folder, name)
        if not (folder / name).is_file():
            raise ArtifactError(
                f"{str(folder / name)!r} is listed in {MANIFEST} with sha256 {recorded} but is "
                f"missing{_pickles_near(folder / name)}"
            )
        _check_hash(folder / name, recorded, sha256_of(folder / name))
    return manifest


def _parse_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(
            f"{str(folder)!r} holds no {MANIFEST}, so it is no artifact that unweave saved"
            + (_pickles_near(path) if folder.is_dir() else ": there is no such folder")
        )
    with _named_errors(path, "read"):
        data = path.read_bytes()
    try:
        manifest = json.loads(data)
        recorded = str(manifest[_OWN_HASH])
        position = data.rindex(recorded.encode())
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        found = hashlib.sha256(data).hexdigest()
        raise ArtifactError(
            f"{str(path)!r} is damaged: it records no readable {_OWN_HASH} (the file's sha256 is "
            f"{found}; {error}); save or download the artifact again"
        ) from error
    zeroed = data[:position] + _ZEROS.encode() + data[position + len(recorded.encode()) :]
    _check_hash(path, recorded, hashlib.sha256(zeroed).hexdigest())
    if manifest.get("format") != _FORMAT or not isinstance(manifest.get("files"), dict):
        raise ArtifactError(
            f"{str(path)!r} has the format {manifest.get('format')!r}; this version of unweave "
            f"reads {_FORMAT!r}"
        )
    del manifest[_OWN_HASH]
    return dict(manifest)


def _check_hash(path: Path, recorded: str, found: str) -> None:
    if recorded != found:
        raise ArtifactError(
            f"{str(path)!r} is not the file that was saved: expected sha256 {recorded}, found "
            f"{found}; save or download the artifact again"
        )


def _check_relative(folder: Path, name: str) -> None:
    for part in name.split("/"):
        safe_name(part, f"file (in {str(folder / MANIFEST)!r})")


def _read_safetensors_bytes(path: Path) -> bytes:
    expected = path.with_suffix(".safetensors").name
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise ArtifactError(
            f"{str(path)!r} may be a pickle, which can run any code, and is not opened; expected "
            f"the safetensors file {expected!r}"
        )
    if not path.is_file():
        raise ArtifactError(f"there is no safetensors file {str(path)!r}{_pickles_near(path)}")
    with _named_errors(path, "read"):
        return path.read_bytes()


def _pickles_near(path: Path) -> str:
    pickles = [
        file.name
        for file in (sorted(path.parent.iterdir()) if path.parent.is_dir() else ())
        if file.suffix.lower() in _PICKLE_SUFFIXES
    ]
    if not pickles:
        return ""
    expected = path.name if path.suffix == ".safetensors" else "*.safetensors"
    return (
        f"; {', '.join(map(repr, pickles))} beside it may be a pickle, which can run any code, and "
        f"is not opened: expected the safetensors file {expected!r}"
    )


def _broken_name_rule(name: str) -> str | None:
    if not name or not name.strip():
        return "is empty"
    if len(name) > _MAX_CHARACTERS:
        return f"has {len(name)} characters, and {_MAX_CHARACTERS} are allowed"
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        return "contains a control character"
    if any(0xD800 <= ord(character) < 0xE000 for character in name):
        return "contains half a character (a lone surrogate)"
    if len(name.encode()) > _MAX_BYTES:
        return f"takes {len(name.encode())} bytes, and {_MAX_BYTES} are allowed"
    if any(character in name for character in "/\\:"):
        return "contains a path separator"
    if name in (".", ".."):
        return "stands for a folder"
    if name[-1] in ". " or name[0] == " ":
        return "begins with a space or ends with a dot or a space"
    if _RESERVED.fullmatch(name):
        return "is reserved by Windows"
    return None


def _real(path: str | Path) -> Path:
    if "\0" in str(path):
        raise ArtifactError(f"the path {str(path)!r} contains a NUL character")
    return Path(os.path.realpath(path))


def _sibling(target: Path) -> Path:
    return target.parent / f".{target.name[:80]}.{os.getpid()}-{secrets.token_hex(6)}.tmp"


@contextlib.contextmanager
def _named_errors(path: Path, action: str = "write") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if action == "write" and not path.parent.is_dir():
            reason = f"the folder {str(path.parent)!r} does not exist; create it first"
        raise ArtifactError(f"cannot {action} {str(path)!r}: {reason}") from error


def _sync_tree(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb+") as stream:
                os.fsync(stream.fileno())
    for inner in (folder, *folder.rglob("*")):
        if inner.is_dir():
            _sync_folder(inner)


def _sync_folder(folder: Path) -> None:
    """Ask for the names in `folder` to reach the disk; not every file system can do it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _refuse_foreign_files(target: Path, replacement: Path) -> None:
    if not target.is_dir():
        return
    known = {MANIFEST, ".DS_Store"} | {entry.name for entry in replacement.iterdir()}
    with contextlib.suppress(ArtifactError):
        known |= {name.split("/")[0] for name in _parse_manifest(target)["files"]}
    foreign = sorted({entry.name for entry in target.iterdir()} - known)
    if foreign:
        raise ArtifactError(
            f"the folder {str(target)!r} would be replaced whole, but it holds {foreign[0]!r}, "
            "which unweave did not write there; move that away or choose another folder"
        )


def _swap_in(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`; what was there, if anything, is then called `new`."""
    for _ in range(1000):
        try:
            os.rename(new, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES):
                raise
            if not target.is_dir():
                raise
        if _exchange(new, target) or _move_aside(new, target):
            return
    raise OSError(errno.EBUSY, "other processes keep replacing it")


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step where the kernel can (Linux `renameat2`)."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    at_cwd, exchange_flag = -100, 2
    return bool(rename(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange_flag) == 0)


def _move_aside(new: Path, target: Path) -> bool:
    """Replace a folder by two renames, undoing the first when the second fails."""
    aside = _sibling(target)
    try:
        os.rename(target, aside)
    except FileNotFoundError:
        return False
    try:
        os.rename(new, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            shutil.rmtree(aside, ignore_errors=True)
            return False
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    return True


def _acquire(lock_path: Path) -> int | None:
    """Return a locked descriptor of `lock_path` with this process id in it, or None if held."""
    while True:
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _lock(descriptor):
            os.close(descriptor)
            return None
        try:
            current = os.path.samestat(os.fstat(descriptor), os.stat(lock_path))
        except FileNotFoundError:
            current = False
        if current:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
            return descriptor
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 1024, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise
    return True
