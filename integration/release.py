"""Release one distribution: bump its version, date its changelog, commit and tag."""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("major", "minor", "patch")
VERSION = re.compile(r"\d+\.\d+\.\d+")
ASSIGNMENT = re.compile(r'^(__version__ = ")(\d+\.\d+\.\d+)(")$', re.MULTILINE)
HEADING = re.compile(r"^## (?P<title>.+)\n(?P<body>(?:(?!## ).*\n?)*)", re.MULTILINE)


class ReleaseError(ValueError):
    """A release that cannot be made, and what to do about it."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line: `erasure minor` or `erasure 0.2.0`."""
    parser = argparse.ArgumentParser(prog="release", description=__doc__)
    parser.add_argument("package", help="a folder of packages/ such as erasure, or kernels")
    parser.add_argument("version", help="major, minor, patch or a version such as 0.2.0")
    options = parser.parse_args(arguments)
    try:
        tag = release(ROOT, options.package, options.version, datetime.date.today())
    except ReleaseError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"tagged {tag}; publish it with: git push --follow-tags")
    return 0


def release(root: Path, package: str, version: str, date: datetime.date) -> str:
    """Make the release of `package` as a commit in the git repository `root`; return its tag.

    `version` is "major", "minor", "patch" or a version. The first section of the changelog must be
    "Unreleased", or the new version without a date, and have text. Raises `ReleaseError`, having
    changed nothing, when that is not so, the work tree is not clean or the tag exists.
    """
    project = root / "kernels" if package == "kernels" else root / "packages" / package
    if not (project / "pyproject.toml").is_file():
        raise ReleaseError(f"there is no distribution {package!r}: no {project}/pyproject.toml")
    if _git(root, "status", "--porcelain"):
        raise ReleaseError("the work tree has changes; commit or stash them first")
    version_file = project / _version_path(project)
    old = current_version(version_file)
    new = next_version(old, version)
    tag = f"{package}-v{new}"
    if _git(root, "tag", "--list", tag):
        raise ReleaseError(f"the tag {tag} exists; choose a higher version than {new}")
    changelog = project / "CHANGELOG.md"
    dated = dated_changelog(changelog.read_text(encoding="utf-8"), new, date)
    source = version_file.read_text(encoding="utf-8")
    version_file.write_text(ASSIGNMENT.sub(rf"\g<1>{new}\g<3>", source), encoding="utf-8")
    changelog.write_text(dated, encoding="utf-8")
    _git(root, "add", str(version_file), str(changelog))
    message = f"Release {package} {new}"
    _git(root, "commit", "--quiet", "--message", message)
    _git(root, "tag", "--annotate", tag, "--message", message)
    return tag


def current_version(version_file: Path) -> str:
    """Return the version that `version_file` assigns to `__version__`."""
    match = ASSIGNMENT.search(version_file.read_text(encoding="utf-8"))
    if match is None:
        raise ReleaseError(f'{version_file} has no line `__version__ = "1.2.3"`')
    return match[2]


def next_version(old: str, wanted: str) -> str:
    """Return the version after `old` that `wanted` asks for.

    >>> next_version("0.1.4", "minor")
    '0.2.0'
    """
    numbers = [int(number) for number in old.split(".")]
    if wanted in PARTS:
        place = PARTS.index(wanted)
        numbers = [*numbers[:place], numbers[place] + 1, *[0] * (2 - place)]
        return ".".join(str(number) for number in numbers)
    if not VERSION.fullmatch(wanted):
        raise ReleaseError(f"the version must be one of {PARTS} or like 0.2.0, got {wanted!r}")
    if [int(number) for number in wanted.split(".")] < numbers:
        raise ReleaseError(f"the version must not be below {old}, the present one, got {wanted!r}")
    return wanted


def dated_changelog(text: str, version: str, date: datetime.date) -> str:
    """Return the changelog `text` with its first section turned into `version`, dated."""
    section = HEADING.search(text)
    if section is None or section["title"] not in ("Unreleased", version):
        found = "nothing" if section is None else repr(section["title"])
        raise ReleaseError(
            f"the changelog must begin with a section `## Unreleased` (or `## {version}` without a "
            f"date), found {found}"
        )
    if not section["body"].strip():
        raise ReleaseError(f"the section {section['title']!r} of the changelog is empty")
    start, end = section.span("title")
    return f"{text[:start]}{version} ({date.isoformat()}){text[end:]}"


def _version_path(project: Path) -> str:
    table = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
    return str(table["tool"]["hatch"]["version"]["path"])


def _git(root: Path, *arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if result.returncode:
        raise ReleaseError(f"git {arguments[0]} failed: {result.stderr.strip()}")
    return result.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
