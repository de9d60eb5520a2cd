"""`kvstrata trust ROOT NAMESPACE`: use pages again that audits took out of service."""

from __future__ import annotations

from typing import Annotated

import typer

from kvstrata.offload.cli.printing import fail, printable
from kvstrata.offload.cli.roots.root import Root, named_namespaces


def trust(
    root: Root,
    namespace: Annotated[
        str, typer.Argument(metavar="NAMESPACE", help="Its name as `ls` prints it, or its digest.")
    ],
) -> None:
    """Let pages be loaded and stored again that audits took out of service.

    Before that, look at what differed: the files in the namespace's quarantine whose names begin
    with a time and "audit" come in pairs, the page that was stored and the one that was computed.
    Where the stored pages are wrong, remove the namespace instead.

    Exits with 2 if there is no such namespace.
    """
    from kvstrata.tiers.fs.files.trust import trust as take_marker

    try:
        (paths,) = named_namespaces(root, [namespace])
        said = take_marker(paths)
    except OSError as error:
        fail(root, error)
    if said is None:
        typer.echo(f"{paths.name} was trusted already")
        return
    details = ", ".join(f"{key} {value}" for key, value in said.items())
    typer.echo(f"{paths.name} is trusted again; it was not, since: {printable(details)}")
