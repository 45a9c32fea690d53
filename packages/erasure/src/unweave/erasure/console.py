"""What the commands print: results on stdout, all else on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import typer


@contextmanager
def stdout_for_results() -> Iterator[Callable[[str], None]]:
    """Send what libraries print to stderr; what is yielded prints a result on stdout."""
    stdout = sys.stdout

    def show(text: str) -> None:
        print(text, file=stdout, flush=True)

    with redirect_stdout(sys.stderr):
        yield show


def quiet_libraries() -> None:
    """Let diffusers and transformers show errors only, and no bars while they read files."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_transformers, of_diffusers):
        library.set_verbosity_error()
        library.disable_progress_bar()


def say(text: str) -> None:
    """Print on stderr."""
    print(text, file=sys.stderr)


def described(plan: Mapping[str, Any]) -> str:
    """Return the plan of a dry run, an option a line."""
    shown = [f"{key}: {value}" for key, value in plan.items() if value not in (None, [], {})]
    return "\n".join([*shown, "nothing was written (--dry-run)"])


def table_of_rates(result: Mapping[str, Any]) -> str:
    """Return the result of `unweave erase` as a table, the time it took and the files."""
    rows = [
        ("target", result["target"], result["target_rate"]),
        *(("preserved", name, rate) for name, rate in result["preserved"].items()),
    ]
    table = rendered_table(
        ("", "concept", "seen before", "seen after"),
        [
            (role, name, _percent(rate["before"]), _percent(rate["after"]))
            for role, name, rate in rows
        ],
    )
    files = [f"{name}: {path}" for name, path in result["files"].items()]
    return "\n".join([table, f"erased in {result['seconds']:.1f} s", *files])


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.0f} %"


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout."""
    typer.echo(rendered_table(headers, rows))


def rendered_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as plain text."""
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(*(Column(Text(header)) for header in headers), box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")
