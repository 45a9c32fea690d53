"""Releases are one commit and one tag, or nothing."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path

import pytest

from release import ReleaseError, next_version, release

DAY = datetime.date(2026, 11, 24)
CHANGELOG = "# Changelog\n\n## Unreleased\n\n- A thing.\n\n## 0.1.0 (2026-01-01)\n\n- The first.\n"


def git(repository: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repository), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    project = tmp_path / "packages" / "erasure"
    (project / "src").mkdir(parents=True)
    (project / "pyproject.toml").write_text('[tool.hatch.version]\npath = "src/a.py"\n')
    (project / "src" / "a.py").write_text('"""A."""\n\n__version__ = "0.1.0"\n')
    (project / "CHANGELOG.md").write_text(CHANGELOG)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "config", "user.name", "A")
    git(tmp_path, "config", "user.email", "a@example.org")
    commit(tmp_path)
    return tmp_path


def commit(repository: Path) -> None:
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "--message", "work")


def test_a_release_bumps_dates_commits_and_tags(repository: Path) -> None:
    assert release(repository, "erasure", "minor", DAY) == "erasure-v0.2.0"
    project = repository / "packages" / "erasure"
    assert '__version__ = "0.2.0"\n' in (project / "src" / "a.py").read_text()
    assert "## 0.2.0 (2026-11-24)\n\n- A thing." in (project / "CHANGELOG.md").read_text()
    assert git(repository, "tag") == "erasure-v0.2.0"
    assert git(repository, "rev-parse", "erasure-v0.2.0^{}") == git(repository, "rev-parse", "HEAD")
    assert git(repository, "log", "-1", "--format=%s") == "Release erasure 0.2.0"
    assert not git(repository, "status", "--porcelain")


def test_a_first_release_dates_its_own_section(repository: Path) -> None:
    changelog = repository / "packages" / "erasure" / "CHANGELOG.md"
    changelog.write_text("# Changelog\n\n## 0.1.0\n\n- The first.\n")
    commit(repository)
    assert release(repository, "erasure", "0.1.0", DAY) == "erasure-v0.1.0"
    assert "## 0.1.0 (2026-11-24)\n" in changelog.read_text()


@pytest.mark.parametrize(
    ("changelog", "message"),
    [
        ("# Changelog\n\n## 0.1.0 (2026-01-01)\n\n- The first.\n", "Unreleased"),
        ("# Changelog\n\n## Unreleased\n\n## 0.1.0\n\n- The first.\n", "empty"),
        ("# Changelog\n", "found nothing"),
    ],
)
def test_a_release_without_news_is_refused(repository: Path, changelog: str, message: str) -> None:
    (repository / "packages" / "erasure" / "CHANGELOG.md").write_text(changelog)
    commit(repository)
    with pytest.raises(ReleaseError, match=message):
        release(repository, "erasure", "minor", DAY)
    assert not git(repository, "status", "--porcelain")
    assert not git(repository, "tag")


def test_a_release_of_a_changed_work_tree_is_refused(repository: Path) -> None:
    (repository / "packages" / "erasure" / "src" / "a.py").write_text("changed\n")
    with pytest.raises(ReleaseError, match="commit or stash"):
        release(repository, "erasure", "minor", DAY)


def test_a_tag_is_never_moved(repository: Path) -> None:
    git(repository, "tag", "erasure-v0.2.0")
    with pytest.raises(ReleaseError, match=r"erasure-v0\.2\.0 exists"):
        release(repository, "erasure", "minor", DAY)


def test_an_unknown_package_is_named(repository: Path) -> None:
    with pytest.raises(ReleaseError, match="'eraser'"):
        release(repository, "eraser", "minor", DAY)


@pytest.mark.parametrize(
    ("wanted", "new"),
    [("major", "2.0.0"), ("minor", "1.3.0"), ("patch", "1.2.4"), ("1.2.3", "1.2.3")],
)
def test_the_next_version_follows_the_part(wanted: str, new: str) -> None:
    assert next_version("1.2.3", wanted) == new


@pytest.mark.parametrize("wanted", ["1.2", "later", "1.2.2", ""])
def test_a_version_that_is_none_or_lower_is_refused(wanted: str) -> None:
    with pytest.raises(ReleaseError, match=repr(wanted)):
        next_version("1.2.3", wanted)
