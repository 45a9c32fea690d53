"""The command `unweave`, made of the subcommands of the packages that are installed."""

from unweave.cli.app import app, main
from unweave.cli.discovery import ENTRY_POINT_GROUP
from unweave.cli.group import CommandGroup

__version__ = "0.1.0"

__all__ = ["ENTRY_POINT_GROUP", "CommandGroup", "app", "main"]
