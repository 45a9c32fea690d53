"""Write the tables of claims in READMEs and docs from `claims.json`, or check that they agree."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from claims_runner import FULL_FILE, ROOT, read_claims

BLOCK = re.compile(
    r"(?P<start><!-- claims:start(?: (?P<name>[\w-]+))? -->\n).*?(?P<end><!-- claims:end -->)",
    re.DOTALL,
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 when `--check` finds a table that is not up to date."""
    parser = argparse.ArgumentParser(prog="readme_tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail on a difference")
    check = parser.parse_args(arguments).check
    stale = []
    for document in documents(ROOT):
        before = document.read_text(encoding="utf-8")
        after = updated(before, document, ROOT)
        if after == before:
            continue
        if check:
            stale.append(document)
        else:
            document.write_text(after, encoding="utf-8")
            print(f"updated {document.relative_to(ROOT)}")
    for document in stale:
        print(
            f"{document.relative_to(ROOT)}: its table of claims differs from {FULL_FILE}; run "
            "`python benchmarks/readme_tables.py`",
            file=sys.stderr,
        )
    return 1 if stale else 0


def documents(root: Path) -> list[Path]:
    """Return the Markdown files under `root` that may hold tables of claims."""
    patterns = ("README.md", "docs/*.md", "kernels/README.md", "packages/*/README.md")
    return sorted(path for pattern in patterns for path in root.glob(pattern))


def updated(text: str, document: Path, root: Path) -> str:
    """Return `text` with the table of each block of claims as `claims.json` has it.

    A block without a package's name in its start marker is about the package of `document`.
    Raises `SystemExit` for a package with claims whose README has no block.
    """
    own = document.parent / "benchmarks" / FULL_FILE
    if own.exists() and not BLOCK.search(text):
        raise SystemExit(
            f"{document} has no table of claims; add the lines `<!-- claims:start -->` and "
            "`<!-- claims:end -->`"
        )

    def replaced(match: re.Match[str]) -> str:
        name = match["name"]
        project = _project(root, name) if name else document.parent
        table = render(read_claims(project / "benchmarks" / FULL_FILE))
        return f"{match['start']}{table}{match['end']}"

    return BLOCK.sub(replaced, text)


def render(content: Mapping[str, Any]) -> str:
    """Return the Markdown table of the content of a `claims.json`."""
    if not content["claims"]:
        return "\nNo claim has been measured yet.\n\n"
    rows = [
        "| claim | setting | aim | measured | 95 % interval | holds |",
        "|---|---|---|---|---|---|",
    ]
    for claim in content["claims"]:
        low_high = claim["interval"]
        holds = "yes" if claim["holds"] else "**no**"
        cells = [
            claim["text"],
            claim["setting"],
            claim["aim"],
            claim["measured"],
            "" if low_high is None else f"{low_high[0]:g} to {low_high[1]:g}",
            f"{holds}: {claim['note']}" if claim["note"] else holds,
        ]
        rows.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    machine, versions = content["machine"], content["versions"]
    used = ", ".join(f"{name} {number}" for name, number in versions.items())
    gpu = f", {machine['gpu']}" if machine.get("gpu") else ""
    where = f"{machine['processor']}, {machine['cores']} cores{gpu}"
    where = f"Measured {content['date']}, {where}; {used}."
    return "\n" + "\n".join(rows) + f"\n\n{where}\n\n"


def _project(root: Path, name: str) -> Path:
    return root / "kernels" if name == "kernels" else root / "packages" / name


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())


if __name__ == "__main__":
    sys.exit(main())
