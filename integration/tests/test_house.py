"""The house is in order: names, files and versions of all distributions follow one rule."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from try_wheels import Project

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT / "kernels", *sorted(path for path in (ROOT / "packages").iterdir())]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

every_distribution = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@every_distribution
def test_folder_distribution_and_import_have_one_name(folder: Path) -> None:
    project = Project.read(folder)
    source = folder / "src" / project.module.replace(".", "/")
    assert (source / "__init__.py").is_file()
    assert (source / "py.typed").is_file()


@every_distribution
def test_unweave_stays_a_namespace(folder: Path) -> None:
    assert [path.name for path in (folder / "src" / "unweave").glob("*.py")] == []


@every_distribution
def test_the_changelog_begins_with_the_version_or_what_is_unreleased(folder: Path) -> None:
    table = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    version_file = folder / table["tool"]["hatch"]["version"]["path"]
    (version,) = re.findall(r'^__version__ = "(.+)"$', version_file.read_text(), re.MULTILINE)
    first = re.findall(r"^## (\S+)", (folder / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert first in (version, "Unreleased")


@every_distribution
def test_the_readme_has_an_install_line(folder: Path) -> None:
    name = Project.read(folder).distribution
    assert re.search(rf"pip install \"?{name}\b", (folder / "README.md").read_text())


@every_distribution
def test_torchvision_is_not_required(folder: Path) -> None:
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert not [line for line in project["dependencies"] if line.startswith("torchvision")]


@every_document
def test_examples_in_the_documentation_are_python(document: Path) -> None:
    for block in PYTHON_BLOCK.findall(document.read_text(encoding="utf-8")):
        ast.parse(block)


@every_document
def test_examples_in_the_documentation_import_what_there_is(document: Path) -> None:
    for block in PYTHON_BLOCK.findall(document.read_text(encoding="utf-8")):
        imports = [node for node in ast.parse(block).body if isinstance(node, ast.ImportFrom)]
        for node in imports:
            if node.module and node.module.startswith("unweave"):
                exec(ast.unparse(node), {})


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = PYTHON_BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "no-cat/manifest.json").is_file()
