"""A typer group whose commands are imported when they run, and whose errors take one line."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from unweave.cli.discovery import discover, summary

_ROOT = "unweave"
_USAGE_STATUS = 2
_INTERRUPTED_STATUS = 130


class CommandGroup(TyperGroup):
    """Lists the commands of all installed packages and imports the one that is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands."""
        return sorted({*self.commands, *discover()})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, not yet imported, or None when no package has it."""
        own = self.commands.get(cmd_name)
        if own is not None:
            return own
        point = discover().get(cmd_name)
        return None if point is None else LazyCommand(point)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line; in standalone mode exit with its status, errors shown on one line."""

        def run() -> Any:
            return super(CommandGroup, self).main(
                args=args,
                prog_name=prog_name,
                complete_var=complete_var,
                standalone_mode=False,
                windows_expand_args=windows_expand_args,
                **extra,
            )

        return _exit_after(run) if standalone_mode else run()


class LazyCommand(TyperCommand):
    """A command that knows its name and docstring, and becomes the real one when it is called."""

    def __init__(self, point: metadata.EntryPoint) -> None:
        """Read the docstring; nothing is imported."""
        super().__init__(name=point.name, help=summary(point))
        self._point = point

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        """Import the command and return a context of it, so that it is what runs."""
        return self.load().make_context(info_name, args, parent, **extra)

    def load(self) -> Any:
        """Import the function or group behind the command and return what typer makes of it."""
        try:
            loaded = self._point.load()
        except ImportError as error:
            package = self._point.dist.name if self._point.dist else self._point.module
            raise typer.BadParameter(
                f"the command {self.name!r} of {package} cannot be imported: {error}; install it "
                f"again with pip install --force-reinstall {package}"
            ) from error
        if isinstance(loaded, typer.Typer):
            return typer.main.get_command(loaded)
        commands = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        commands.command(self.name)(loaded)
        return typer.main.get_command(commands)


def _exit_after(run: Callable[[], Any]) -> None:
    try:
        status = run()
    except KeyboardInterrupt:
        _show("interrupted")
        sys.exit(_INTERRUPTED_STATUS)
    except typer.Abort:
        _show("aborted")
        sys.exit(1)
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.exit(0)
        message = _message(error)
        if message is None:
            raise
        _show(f"error: {message}")
        sys.exit(_USAGE_STATUS)
    sys.exit(status if isinstance(status, int) else 0)


def _message(error: Exception) -> str | None:
    """Return what to tell about an error a user can cause; None for a bug.

    These are errors of the command line, of the operating system, and those that unweave's
    packages raise on purpose, hence of classes defined in one of them.
    """
    if hasattr(error, "format_message"):
        text = error.format_message()
    elif type(error).__module__.split(".")[0] == _ROOT:
        text = str(error)
    elif isinstance(error, OSError):
        text = str(error) if error.strerror is None else _os_message(error)
    else:
        return None
    if any(isinstance(cause, OSError) and cause.errno == errno.ENOSPC for cause in _chain(error)):
        text += "; free some space or write to another disk"
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _os_message(error: OSError) -> str:
    name = "" if error.filename is None else f"{os.fsdecode(error.filename)!r}: "
    return f"{name}{error.strerror}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _show(message: str) -> None:
    print(message, file=sys.stderr)
