"""The `unweave` application: a group without commands of its own."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer

from unweave.cli.discovery import discover
from unweave.cli.group import CommandGroup

app = typer.Typer(
    name="unweave",
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
"""The typer application; `main` runs it."""


def main() -> None:
    """Run the command line of this process and exit: 0 done, 2 bad input, 130 interrupted."""
    app(prog_name="unweave")


def _show_versions(wanted: bool) -> None:
    if not wanted:
        return
    names = {"unweave"} | {point.dist.name for point in discover().values() if point.dist}
    for name in sorted(names):
        try:
            typer.echo(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            typer.echo(f"{name} (not installed)")
    raise typer.Exit


@app.callback()
def _unweave(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_versions, is_eager=True, help="Show versions and exit."
        ),
    ] = False,
) -> None:
    """Take concepts out of models, put them in, and measure what that did."""
