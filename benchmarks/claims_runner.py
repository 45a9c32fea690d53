"""Measure the claims of every package, print them and keep them in `claims.json`."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FULL_FILE = "claims.json"
QUICK_FILE = "claims-quick.json"
DISTRIBUTIONS = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy")


@dataclass(frozen=True)
class Claim:
    """One thing that a package says it can do, and what a measurement says about it.

    `aim` and `measured` are short texts with units ("<= 15 %", "9.8 %"); `interval` is a 95 %
    interval in the unit of `measured`. A claim that does not hold needs a `note` saying why.
    """

    id: str
    text: str
    source: str
    setting: str
    aim: str
    measured: str
    interval: tuple[float, float] | None
    holds: bool
    note: str = ""

    def __post_init__(self) -> None:
        if not self.id or not self.text or not self.measured:
            raise ValueError(f"`id`, `text` and `measured` must not be empty, got {self!r}")
        if not self.holds and not self.note:
            raise ValueError(f"claim {self.id!r} does not hold: `note` must say why")

    @classmethod
    def share(
        cls,
        id: str,
        text: str,
        source: str,
        setting: str,
        *,
        hits: int,
        total: int,
        at_least: float,
        note: str,
    ) -> Claim:
        """Claim that a share is at least `at_least` percent, with its Wilson interval.

        `note` says why it may be missed and is kept only if it is.
        """
        from scipy.stats import binomtest

        interval = binomtest(hits, total).proportion_ci(method="wilson")
        holds = 100 * hits / total >= at_least
        return cls(
            id=id,
            text=text,
            source=source,
            setting=f"{setting}, n = {total}",
            aim=f">= {at_least:g} %",
            measured=f"{100 * hits / total:.1f} %",
            interval=(round(100 * float(interval.low), 1), round(100 * float(interval.high), 1)),
            holds=holds,
            note="" if holds else note,
        )

    @classmethod
    def at_most(
        cls,
        id: str,
        text: str,
        source: str,
        setting: str,
        *,
        value: float,
        limit: float,
        unit: str = "",
        interval: tuple[float, float] | None = None,
        digits: str = ".1f",
        note: str,
    ) -> Claim:
        """Claim that a number is at most `limit`; `digits` formats it, `note` as in `share`."""
        return cls(
            id=id,
            text=text,
            source=source,
            setting=setting,
            aim=f"<= {limit:g} {unit}".rstrip(),
            measured=f"{value:{digits}} {unit}".rstrip(),
            interval=interval,
            holds=value <= limit,
            note="" if value <= limit else note,
        )

    @classmethod
    def identical(
        cls, id: str, text: str, source: str, setting: str, *, same: bool, note: str
    ) -> Claim:
        """Claim that two things are the same to the last bit; `note` as in `share`."""
        return cls(
            id=id,
            text=text,
            source=source,
            setting=setting,
            aim="identical",
            measured="identical" if same else "different",
            interval=None,
            holds=same,
            note="" if same else note,
        )


Measure = Callable[[int, bool], Claim]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0 when every chosen claim could be measured."""
    options = _parse(arguments)
    projects = find_projects(ROOT, options.names)
    if not projects:
        print("No package has a benchmarks/claims.py yet: nothing to measure.")
        return 0
    failures = [
        failure
        for project in projects
        for failure in run_project(project, options.seed, options.quick, options.only)
    ]
    for failure in failures:
        print(f"not measured: {failure}", file=sys.stderr)
    return 1 if failures else 0


def find_projects(root: Path, names: Iterable[str] = ()) -> list[Path]:
    """Return the folders under `root` that hold `benchmarks/claims.py`, those in `names` if any.

    Raises `SystemExit` naming a package that has no claims.
    """
    found = sorted(
        path.parents[1]
        for pattern in ("kernels/benchmarks/claims.py", "packages/*/benchmarks/claims.py")
        for path in root.glob(pattern)
    )
    by_name = {project.name: project for project in found}
    wanted = [Path(name).name for name in names]
    for name in wanted:
        if name not in by_name:
            known = ", ".join(by_name) or "none"
            raise SystemExit(f"no package {name!r} has a benchmarks/claims.py; there are: {known}")
    return [by_name[name] for name in wanted] if wanted else found


def run_project(project: Path, seed: int, quick: bool, only: Iterable[str] = ()) -> list[str]:
    """Measure the claims of `project`, write its file; return what could not be measured.

    With `quick`, results go to `claims-quick.json`, which nothing is generated from. Claims that
    are left out by `only` or fail to run keep their earlier record.
    """
    claims = load_claims(project)
    chosen = {name: claims[name] for name in only if name in claims} if only else claims
    target = project / "benchmarks" / (QUICK_FILE if quick else FULL_FILE)
    records, failures = _measure(project.name, chosen, seed, quick)
    if records:
        kept = {record["id"]: record for record in read_claims(target)["claims"]}
        merged = [(kept | records)[name] for name in claims if name in kept | records]
        write_json(target, {**_header(), "claims": merged})
    _print_table(project.name, records.values())
    unknown = [f"{project.name}: no claim {name!r}" for name in only if name not in claims]
    return failures + unknown


def load_claims(project: Path) -> dict[str, Measure]:
    """Import `benchmarks/claims.py` of `project` and return its `CLAIMS`."""
    path = project / "benchmarks" / "claims.py"
    sys.modules.setdefault("claims_runner", sys.modules[__name__])
    name = f"claims_of_{project.name.replace('-', '_')}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    claims: dict[str, Measure] = module.CLAIMS
    return claims


def read_claims(path: Path) -> dict[str, Any]:
    """Return the content of a claims file, one without claims when it is not there."""
    if not path.exists():
        return {"claims": []}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` by `content` in one step: a reader sees the old file or the new one."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="claims", description=__doc__)
    parser.add_argument("names", nargs="*", help="packages, such as erasure; all when left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small settings, to see that it runs")
    parser.add_argument("--only", action="append", default=[], metavar="ID", help="may be repeated")
    return parser.parse_args(arguments)


def _measure(
    title: str, chosen: Mapping[str, Measure], seed: int, quick: bool
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    records: dict[str, dict[str, Any]] = {}
    failures: list[str] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=len(chosen))
        for name, measure in chosen.items():
            progress.update(task, description=f"{title}: {name}")
            start = time.perf_counter()
            try:
                claim = measure(seed, quick)
                if claim.id != name:
                    raise ValueError(f"CLAIMS[{name!r}] returned a claim with id {claim.id!r}")
            except Exception as error:
                console.print_exception()
                failures.append(f"{title}: {name}: {type(error).__name__}: {error}")
            else:
                records[name] = dataclasses.asdict(claim) | {
                    "seed": seed,
                    "quick": quick,
                    "seconds": round(time.perf_counter() - start, 1),
                    "date": _today(),
                }
            progress.advance(task)
    return records, failures


def _print_table(title: str, records: Iterable[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("claim", "aim", "measured", "95 % interval", "holds", "note", title=title)
    for record in records:
        low_high = record["interval"]
        table.add_row(
            f"{record['id']}: {record['text']}",
            record["aim"],
            record["measured"],
            "" if low_high is None else f"{low_high[0]:g} to {low_high[1]:g}",
            "yes" if record["holds"] else "NO",
            record["note"],
        )
    Console().print(table)


def _header() -> dict[str, Any]:
    return {"date": _today(), "machine": _machine(), "versions": _versions()}


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _machine() -> dict[str, Any]:
    return {
        "system": platform.system(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "gpu": _gpu(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpu() -> str | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_name(0))


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


if __name__ == "__main__":
    sys.exit(main())
