"""Claims are measured, kept and shown as they are, the failed ones too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from claims_runner import Claim, find_projects, run_project
from readme_tables import updated

SOURCE = """
from claims_runner import Claim

def claim(name, holds=True, note=""):
    def measure(seed, quick):
        measured = f"seed {seed}, quick {quick}"
        text = f"{name} | works"
        return Claim(name, text, "paper", "toy", "> 0", measured, (0.5, 1.5), holds, note)
    return measure

def broken(seed, quick):
    raise RuntimeError("no such model")

CLAIMS = {"one": claim("one"), "two": claim("two", False, "too small"), "bad": broken}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "packages" / "erasure" / "benchmarks"
    folder.mkdir(parents=True)
    (folder / "claims.py").write_text(SOURCE)
    return folder.parent


def recorded(project: Path, name: str = "claims.json") -> dict[str, dict[str, object]]:
    content = json.loads((project / "benchmarks" / name).read_text())
    assert set(content) == {"date", "machine", "versions", "claims"}
    return {claim["id"]: claim for claim in content["claims"]}


def test_a_run_keeps_every_measured_claim_and_names_the_broken_one(project: Path) -> None:
    assert run_project(project, 3, False) == ["erasure: bad: RuntimeError: no such model"]
    assert list(recorded(project)) == ["one", "two"]
    assert recorded(project)["two"]["holds"] is False
    assert recorded(project)["one"]["measured"] == "seed 3, quick False"


def test_running_one_claim_keeps_the_others(project: Path) -> None:
    run_project(project, 0, False, ["one", "two"])
    assert run_project(project, 7, False, ["two"]) == []
    assert [claim["seed"] for claim in recorded(project).values()] == [0, 7]


def test_a_quick_run_leaves_the_committed_numbers_alone(project: Path) -> None:
    run_project(project, 0, True, ["one"])
    assert not (project / "benchmarks" / "claims.json").exists()
    assert list(recorded(project, "claims-quick.json")) == ["one"]


def test_an_unknown_claim_is_reported(project: Path) -> None:
    assert run_project(project, 0, True, ["three"]) == ["erasure: no claim 'three'"]


def test_an_unknown_package_is_named_with_those_that_exist(project: Path) -> None:
    root = project.parents[1]
    assert find_projects(root) == [project]
    with pytest.raises(SystemExit, match=r"'kernels'.*erasure"):
        find_projects(root, ["kernels"])


def test_a_claim_that_fails_needs_a_reason() -> None:
    with pytest.raises(ValueError, match="why"):
        Claim("x", "x works", "paper", "toy", "> 0", "-1", None, False)


def test_the_table_follows_the_numbers(project: Path) -> None:
    run_project(project, 0, False, ["one", "two"])
    root, readme = project.parents[1], project / "README.md"
    text = "# A\n\n<!-- claims:start -->\nSTALE\n<!-- claims:end -->\n\nThe end.\n"
    table = updated(text, readme, root)
    assert "one \\| works | toy | > 0 | seed 0, quick False | 0.5 to 1.5 | yes |" in table
    assert "**no**: too small |" in table
    assert "STALE" not in table
    assert table.endswith("<!-- claims:end -->\n\nThe end.\n")
    assert updated(table, readme, root) == table
    elsewhere = "<!-- claims:start erasure -->\n<!-- claims:end -->\n"
    assert "too small" in updated(elsewhere, root / "docs" / "claims.md", root)


def test_a_readme_without_a_place_for_its_claims_is_refused(project: Path) -> None:
    run_project(project, 0, False, ["one"])
    with pytest.raises(SystemExit, match="claims:start"):
        updated("# A\n", project / "README.md", project.parents[1])
