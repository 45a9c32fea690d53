"""Build every distribution, then install each wheel alone in a clean environment and use it."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
CONSTRAINTS = ROOT / "constraints.txt"
MAX_IMPORT_SECONDS = 1.0
AT_ONCE = 2
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in package.__all__:
    getattr(package, name)
from importlib.resources import files
assert files(package).joinpath("py.typed").is_file(), "py.typed is missing from the wheel"
"""
TIME_IMPORT = """
import importlib, importlib.util, sys, time
if importlib.util.find_spec("torch"):
    import torch
start = time.perf_counter()
importlib.import_module(sys.argv[1])
print(time.perf_counter() - start)
"""


@dataclass(frozen=True)
class Project:
    """A distribution of this repository."""

    folder: Path
    distribution: str
    module: str

    @classmethod
    def read(cls, folder: Path) -> Project:
        """Read the names of the distribution in `folder` and check that they derive from it."""
        table = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
        distribution = table["project"]["name"]
        expected = "unweave" if folder.name == "cli" else f"unweave-{folder.name}"
        if distribution != expected:
            raise SystemExit(f"{folder} must hold {expected!r}, it holds {distribution!r}")
        return cls(folder, distribution, f"unweave.{folder.name.replace('-', '_')}")

    @property
    def readme(self) -> str:
        """The text of the README."""
        return (self.folder / "README.md").read_text(encoding="utf-8")

    @property
    def wheel(self) -> Path:
        """The one wheel of this distribution in `dist`."""
        (wheel,) = DIST.glob(f"{self.distribution.replace('-', '_')}-[0-9]*.whl")
        return wheel


@dataclass(frozen=True)
class Trial:
    """What came of trying one wheel; `problem` is empty when all went well."""

    project: Project
    install_seconds: float = 0.0
    megabytes: float = 0.0
    distributions: int = 0
    import_seconds: float = 0.0
    example: str = ""
    problem: str = ""


class StepError(RuntimeError):
    """A command that failed, with what it printed."""


def main(arguments: list[str] | None = None) -> int:
    """Build all wheels and try those of the packages named, all when none is."""
    parser = argparse.ArgumentParser(prog="packages", description=__doc__)
    parser.add_argument("names", nargs="*", help="packages to try, such as erasure")
    names = {Path(name).name for name in parser.parse_args(arguments).names}
    folders = [ROOT / "kernels", *sorted((ROOT / "packages").iterdir())]
    projects = [Project.read(path) for path in folders if (path / "pyproject.toml").is_file()]
    unknown = names - {project.folder.name for project in projects}
    if unknown:
        raise SystemExit(f"no such package: {', '.join(sorted(unknown))}")
    build_all(projects)
    chosen = [project for project in projects if not names or project.folder.name in names]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        trials = list(pool.map(try_alone, chosen))
    report(trials)
    failed = [trial for trial in trials if trial.problem]
    for trial in failed:
        print(f"\n{trial.project.distribution}: {trial.problem}", file=sys.stderr)
    return 1 if failed else 0


def build_all(projects: list[Project]) -> None:
    """Build an sdist of each project, and from that its wheel, into a new `dist` folder."""
    shutil.rmtree(DIST, ignore_errors=True)
    for project in projects:
        command = ["-m", "build", "--no-isolation", "--outdir", str(DIST), str(project.folder)]
        run(sys.executable, *command, cwd=ROOT)
        print(f"built {project.wheel.name}", flush=True)


def try_alone(project: Project) -> Trial:
    """Install, import and use `project` in a new environment that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="unweave-wheel-") as name:
        try:
            trial = _try_in(Path(name), project)
        except StepError as error:
            trial = Trial(project, problem=str(error))
    print(f"tried {project.distribution}: {'FAILED' if trial.problem else 'ok'}", flush=True)
    return trial


def report(trials: list[Trial]) -> None:
    """Print one row a wheel."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Each wheel alone in a clean environment")
    columns = ("distribution", "dependencies", "MB", "install s", "import s beyond torch")
    for column in columns:
        table.add_column(column, justify="left" if column == "distribution" else "right")
    table.add_column("README example")
    for trial in trials:
        table.add_row(
            trial.project.distribution,
            str(trial.distributions),
            f"{trial.megabytes:.0f}",
            f"{trial.install_seconds:.0f}",
            f"{trial.import_seconds:.2f}",
            trial.example if not trial.problem else "FAILED",
        )
    Console(width=110).print(table)


def _try_in(folder: Path, project: Project) -> Trial:
    environment = folder / "venv"
    venv.create(environment, with_pip=False, symlinks=os.name != "nt")
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    work = folder / "work"
    work.mkdir()
    start = time.perf_counter()
    _install(python, str(project.wheel))
    seconds = time.perf_counter() - start
    site = next(environment.rglob("site-packages"))
    megabytes = sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) / 1e6
    distributions = len(list(site.glob("*.dist-info"))) - 1
    run(str(python), "-c", IMPORT_ALL, project.module, cwd=work)
    import_seconds = min(_import_seconds(python, project, work) for _ in range(3))
    if import_seconds > MAX_IMPORT_SECONDS:
        raise StepError(
            f"importing {project.module} takes {import_seconds:.2f} s beyond torch; at most "
            f"{MAX_IMPORT_SECONDS} s is wanted: import heavy libraries inside functions"
        )
    example = _run_example(python, project, work)
    return Trial(project, seconds, megabytes, distributions, import_seconds, example)


def _install(python: Path, *requirements: str) -> None:
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet")
    options = ("--find-links", str(DIST), "-c", str(CONSTRAINTS), "--no-compile")
    run(*pip, *options, *requirements, cwd=ROOT)


def _import_seconds(python: Path, project: Project, work: Path) -> float:
    return float(run(str(python), "-c", TIME_IMPORT, project.module, cwd=work))


def _run_example(python: Path, project: Project, work: Path) -> str:
    """Run the first Python block of the README, with the extras that its install line names."""
    found = EXAMPLE.search(project.readme)
    if found is None:
        return "none (planned)" if "Planned." in project.readme else "none"
    extras = re.search(rf"pip install [^\n]*{project.distribution}\[([\w,-]+)\]", project.readme)
    if extras:
        _install(python, f"{project.wheel}[{extras[1]}]")
    script = work / "example.py"
    script.write_text(found[1], encoding="utf-8")
    start = time.perf_counter()
    run(str(python), str(script), cwd=work)
    with_extras = f" with [{extras[1]}]" if extras else ""
    return f"{time.perf_counter() - start:.0f} s{with_extras}"


def run(*command: str, cwd: Path) -> str:
    """Run `command` and return what it printed. Raises `StepError` with its output if it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
    )
    if result.returncode:
        shown = " ".join(part if "\n" not in part else "..." for part in command)
        raise StepError(f"`{shown}` failed:\n{result.stdout[-4000:]}")
    return result.stdout


if __name__ == "__main__":
    sys.exit(main())
