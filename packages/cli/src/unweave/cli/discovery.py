"""Subcommands found by entry point, and what can be said about them without importing them."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

ENTRY_POINT_GROUP = "unweave.commands"
"""The group in which a package registers functions for typer, or typer groups, by name."""


def discover() -> dict[str, metadata.EntryPoint]:
    """Return the entry points of installed subcommands by command name, sorted."""
    points = metadata.entry_points(group=ENTRY_POINT_GROUP)
    return {point.name: point for point in sorted(points, key=lambda point: point.name)}


def summary(point: metadata.EntryPoint) -> str:
    """Return the docstring of a command or the `help` of a group, read from its source file.

    Empty when there is none. Nothing is imported, since packages with commands may take seconds to
    import.
    """
    spec = _find_spec(point.module)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return ""
    try:
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == point.attr:
            return ast.get_docstring(node) or ""
        if isinstance(node, ast.Assign) and point.attr in map(ast.unparse, node.targets):
            return _help(node.value)
    return ""


def _help(call: ast.expr) -> str:
    """Return the `help` that is given to `typer.Typer(...)`."""
    keywords = call.keywords if isinstance(call, ast.Call) else []
    given = [keyword.value for keyword in keywords if keyword.arg == "help"]
    return str(ast.literal_eval(given[0])) if given else ""


def _find_spec(module: str) -> ModuleSpec | None:
    """Find a module like `importlib.util.find_spec`, but without importing its parents."""
    path: Sequence[str] | None = None
    spec: ModuleSpec | None = None
    names = module.split(".")
    for end in range(1, len(names) + 1):
        spec = PathFinder.find_spec(".".join(names[:end]), path)
        if spec is None:
            return None
        locations = spec.submodule_search_locations
        path = None if locations is None else list(locations)
    return spec
