"""The example of the README runs as it is printed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import unweave.diffusion_core as package
from unweave.diffusion_core.testing import tiny_pipeline

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_example_writes_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        package, "load_pipeline", lambda name: tiny_pipeline("v_prediction"), raising=False
    )
    names: dict[str, Any] = {}
    exec(compile(example, str(README), "exec"), names)
    numbers = json.loads((tmp_path / "two-draws" / "numbers.json").read_text())
    assert numbers == {"kid": names["distance"], "kid_std": names["spread"]}
    assert (tmp_path / "two-draws" / "report.html").read_text().count("<img") == 16
