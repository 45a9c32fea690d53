"""Importing the package is cheap, and its table of contents holds what it names."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files
from typing import Any

import pytest

import unweave.diffusion_core as package

HEAVY = ("diffusers", "transformers", "peft", "accelerate", "torchmetrics", "matplotlib", "jinja2")

PROBE = """
import json, sys, time
import torch
start = time.perf_counter()
import unweave.diffusion_core as package
for name in package.__all__:
    getattr(package, name)
print(json.dumps({"seconds": time.perf_counter() - start, "modules": sorted(sys.modules)}))
"""


@pytest.fixture(scope="module")
def probe() -> dict[str, Any]:
    """What a fresh interpreter says after touching every public name."""
    command = [sys.executable, "-c", PROBE]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result: dict[str, Any] = json.loads(output)
    return result


def test_every_public_name_takes_less_than_a_second_beyond_torch(probe: dict[str, Any]) -> None:
    assert probe["seconds"] < 1


def test_no_heavy_library_is_imported_before_it_is_needed(probe: dict[str, Any]) -> None:
    assert not set(HEAVY) & set(probe["modules"])


@pytest.mark.parametrize("name", package.__all__)
def test_every_public_name_resolves_and_is_listed(name: str) -> None:
    assert getattr(package, name) is not None
    assert name in dir(package)


def test_every_public_class_and_function_has_a_docstring() -> None:
    for name in package.__all__:
        member = getattr(package, name)
        if callable(member):
            assert (member.__doc__ or "").strip(), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        package.no_such_name  # noqa: B018


def test_the_package_says_that_it_is_typed_and_ships_its_template() -> None:
    assert files("unweave.diffusion_core").joinpath("py.typed").is_file()
    assert files("unweave.diffusion_core").joinpath("report.html.jinja").is_file()
