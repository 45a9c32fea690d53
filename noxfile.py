"""Sessions that set up what they need and run it: `nox -l` lists them."""

from __future__ import annotations

import hashlib
import os
import sys
import venv
from pathlib import Path

import nox

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
HOUSE = ROOT / ".nox" / "house"
BIN = HOUSE / ("Scripts" if sys.platform == "win32" else "bin")
PROJECTS = sorted(path.parent for path in ROOT.glob("*/pyproject.toml")) + sorted(
    path.parent for path in ROOT.glob("packages/*/pyproject.toml")
)
CODE = ("noxfile.py", "benchmarks", "integration", "kernels", "packages")
TOOLS = (
    "pytest",
    "pytest-timeout",
    "hypothesis",
    "scikit-learn",
    "scipy",
    "torchmetrics",
    "ruff",
    "mypy",
    "import-linter",
    "faiss-cpu",
    "nvidia-cuda-nvrtc-cu12",
    "nvidia-cuda-nvcc-cu12",
)
EXTRAS = {"kernels": "[numba]", "erasure": "[plots]"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "TOKENIZERS_PARALLELISM": "false"}
OLD_STACK = (
    "diffusers==0.32.1",
    "transformers==4.54.1",
    "peft==0.17.*",
    "huggingface_hub<1",
    "accelerate",
    "torch==2.13.0",
)

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "tests"]


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Erase "cat face" from the embedded pipeline and print where the report is."""
    install_house(session)
    run_in_house(
        session,
        *("unweave", "erase", "cat face", "--model", "emoji-world", "--method", "few-shot"),
        *("--preserve", "dog face", "--out", "runs/demo", *session.posargs),
    )


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run all tests; `-- packages/erasure` narrows, other arguments go to pytest."""
    install_house(session)
    run_pytest(session, "--durations=10")


@nox.session(venv_backend="none")
def stress(session: nox.Session) -> None:
    """Run the long reliability tests at their full numbers."""
    install_house(session)
    run_pytest(session, "-m", "stress", "--timeout=3600")


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Check style, types, import contracts and generated tables."""
    install_house(session)
    run_in_house(session, "ruff", "check", *CODE)
    run_in_house(session, "ruff", "format", "--check", *CODE)
    run_in_house(session, "mypy", *(str(project / "src") for project in PROJECTS), "benchmarks")
    run_in_house(session, "lint-imports")
    run_in_house(session, "python", "benchmarks/readme_tables.py", "--check")


@nox.session(reuse_venv=True)
def packages(session: nox.Session) -> None:
    """Build every distribution and try each wheel alone; `-- erasure` narrows the trying."""
    session.install("-c", str(CONSTRAINTS), "build", "hatchling", "rich")
    session.run("python", "integration/try_wheels.py", *session.posargs, env=OFFLINE)


@nox.session(venv_backend="none")
def claims(session: nox.Session) -> None:
    """Measure claims: `-- erasure [--seed N] [--quick] [--only ID]`."""
    install_house(session)
    run_in_house(session, "python", "benchmarks/claims_runner.py", *session.posargs)
    if "--quick" not in session.posargs:
        run_in_house(session, "python", "benchmarks/readme_tables.py")


@nox.session(reuse_venv=True)
def docs(session: nox.Session) -> None:
    """Build the user guide into site/; `-- serve` shows it."""
    session.install("-c", str(CONSTRAINTS), "mkdocs", "mkdocs-material")
    quiet = {"NO_MKDOCS_2_WARNING": "1"}
    session.run("mkdocs", *(session.posargs or ("build", "--strict")), env=quiet)


@nox.session(reuse_venv=True)
def compat(session: nox.Session) -> None:
    """Read every kind of file that unweave writes with diffusers 0.32 and transformers 4.54."""
    install_house(session)
    folder = str(ROOT / ".nox" / "artifacts")
    run_in_house(session, "python", "integration/compat/write_artifacts.py", folder)
    session.install(*OLD_STACK)
    session.run("python", "integration/compat/read_artifacts.py", folder, env=OFFLINE)


@nox.session(venv_backend="none")
def release(session: nox.Session) -> None:
    """Bump a version, date its changelog, commit and tag: `-- erasure minor`."""
    session.run(sys.executable, "integration/release.py", *session.posargs)


def install_house(session: nox.Session) -> None:
    """Install all distributions, editable, and the tools in the environment of most sessions.

    Does nothing when that was done for the same tools, constraints and pyproject files.
    """
    stamp = HOUSE / "installed.sha256"
    inputs = (CONSTRAINTS, *(project / "pyproject.toml" for project in PROJECTS))
    content = " ".join(TOOLS).encode() + b"".join(path.read_bytes() for path in inputs)
    digest = hashlib.sha256(content).hexdigest()
    if stamp.exists() and stamp.read_text(encoding="utf-8") == digest:
        return
    session.log("setting up %s (minutes the first time)", HOUSE.relative_to(ROOT))
    venv.create(HOUSE, with_pip=True, symlinks=os.name != "nt")
    quiet = () if sys.stdout.isatty() else ("--quiet",)
    install = ("python", "-m", "pip", "install", *quiet, "--no-compile", "-c", str(CONSTRAINTS))
    run_in_house(session, *install, "torch==2.13.0", "hatchling", "editables", *TOOLS)
    editable = [
        part for project in PROJECTS for part in ("-e", f"{project}{EXTRAS.get(project.name, '')}")
    ]
    run_in_house(session, *install, "--no-build-isolation", *editable)
    stamp.write_text(digest, encoding="utf-8")


def run_in_house(session: nox.Session, program: str, *arguments: str) -> None:
    """Run a program of the shared environment, without access to any hub."""
    path = os.pathsep.join((str(BIN), os.environ.get("PATH", "")))
    session.run(str(BIN / program), *arguments, env={**OFFLINE, "PATH": path}, external=True)


def run_pytest(session: nox.Session, *options: str) -> None:
    """Run pytest once, on the given paths or on every folder of tests."""
    paths = [argument for argument in session.posargs if Path(argument.split("::")[0]).exists()]
    folders = [project / "tests" for project in PROJECTS] + [ROOT / "integration" / "tests"]
    chosen = paths or [str(folder.relative_to(ROOT)) for folder in folders if folder.is_dir()]
    rest = [argument for argument in session.posargs if argument not in paths]
    run_in_house(session, "pytest", *options, *chosen, *rest)
