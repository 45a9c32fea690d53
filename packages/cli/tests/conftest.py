"""Fixtures: a package with subcommands, installed on the path as pip would do it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

SOURCE = '''
"""Commands for the tests; importing this is recorded."""
import errno
import sys
from typing import Annotated
import typer

sys.modules["sample_was_imported"] = sys

class SampleError(ValueError):
    """An error like those of unweave's packages."""

SampleError.__module__ = "unweave.sample.errors"

def add(first: int, second: int, times: Annotated[int, typer.Option()] = 1) -> None:
    """Add two numbers.

    And print the sum.
    """
    print((first + second) * times)

def fail(kind: str) -> None:
    """Raise an error."""
    if kind == "own":
        raise SampleError("`kind` must be good,\\ngot 'own'")
    if kind == "space":
        raise SampleError("cannot write 'x'") from OSError(errno.ENOSPC, "No space left on device")
    if kind == "os":
        raise OSError(errno.EACCES, "Permission denied", "some/file")
    if kind == "interrupt":
        raise KeyboardInterrupt
    raise ValueError("a bug")

several = typer.Typer(help="Do one of several things.", no_args_is_help=True)

@several.command()
def double(number: int) -> None:
    """Print twice the number."""
    print(2 * number)

@several.command()
def refuse() -> None:
    """Raise an error."""
    fail("own")
'''


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    package = tmp_path / "sample_package"
    info = tmp_path / "sample_package-1.2.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported too early')\n")
    (tmp_path / "sample_commands.py").write_text(SOURCE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sample-package\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(
        "[unweave.commands]\n"
        "add = sample_commands:add\n"
        "fail = sample_commands:fail\n"
        "several = sample_commands:several\n"
        "early = sample_package.commands:early\n"
        "broken = no_such_module_here:run\n"
    )
    (package / "commands.py").write_text('def early():\n    """Told without an import."""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path
    for name in ("sample_commands", "sample_was_imported", "sample_package"):
        sys.modules.pop(name, None)


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()
