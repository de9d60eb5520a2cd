"""Namespaces as operators name them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import typer

from kvstrata.offload.cli.printing import printable

if TYPE_CHECKING:
    from kvstrata.tiers.fs.files.layout import NamespacePaths


def named_namespace(root: str, known: Sequence[NamespacePaths], asked: str) -> NamespacePaths:
    """The one namespace whose name or digest is, or begins with, `asked`; a path to it will do.

    Raises:
        typer.Exit: with 2: it fits none or several.
    """
    wanted = os.path.basename(asked.rstrip("/")).removesuffix("_r0")
    exact = [paths for paths in known if paths.name == wanted]
    fits = exact or [
        paths
        for paths in known
        if wanted and (paths.name.startswith(wanted) or paths.name[-12:].startswith(wanted))
    ]
    if len(fits) == 1:
        return fits[0]
    several = [paths.name for paths in fits]
    if several:
        refuse(f"{asked!r} fits {len(fits)} namespaces below {root!r}", several)
    refuse(f"no namespace below {root!r} is called {asked!r}", [paths.name for paths in known])


def refuse(reason: str, names: Sequence[str] = ()) -> NoReturn:
    """Say why, and which names there are; exit with 2."""
    typer.echo(f"kvstrata: {reason}{':' if names else ''}", err=True)
    for name in names:
        typer.echo(f"    {printable(name)}", err=True)
    raise typer.Exit(2)
