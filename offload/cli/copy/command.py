"""`kvstrata copy`: pages from one place to another."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstrata.offload.cli.printing import AsJson, byte_bar, print_json, printable
from kvstrata.offload.cli.roots.root import refuse, refuse_root
from kvstrata.offload.cli.spans import seconds
from kvstrata.tiers.options import format_bytes

if TYPE_CHECKING:
    from kvstrata.offload.cli.copy.pages import Copied
    from kvstrata.offload.cli.copy.place import Place

_AGES = '"90min", "12h" or "7d"'
_PLACE = 'A directory, "s3://bucket/prefix", "valkey://host:6379", or a tier as JSON.'


def copy(
    source: Annotated[str, typer.Argument(metavar="FROM", help=_PLACE)],
    target: Annotated[str, typer.Argument(metavar="TO", help=_PLACE)],
    prefix: Annotated[
        list[str] | None,
        typer.Option(help="Only namespaces whose name or digest begins so; may be given again."),
    ] = None,
    newer: Annotated[
        str | None, typer.Option(metavar="AGE", help='Only pages written within, such as "1d".')
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Copy pages that are not there yet, each verified. If interrupted, run it again to go on.

    Exits with 1 if something was not copied, with 2 if nothing could be.
    """
    from kvstrata.offload.cli.copy.ending import ended_gently
    from kvstrata.offload.cli.copy.namespaces import copy_namespaces, look
    from kvstrata.offload.cli.copy.opening import open_place
    from kvstrata.offload.cli.copy.pages import Copied
    from kvstrata.offload.cli.copy.place import PlaceError
    from kvstrata.tiers.options import ConfigError

    since = None if newer is None else time.time() - seconds(newer, "age", _AGES)
    done, names, more_room = Copied(), list[str](), ""
    try:
        with ended_gently():
            ends = open_place("FROM", source), open_place("TO", target)
            more_room = ends[1].more_room
            names = _selected(ends[0], prefix or ())
            _check_ends(*ends)
            with byte_bar("counting") as advance:
                found = look(ends[0], names, since, done, advance)
            with byte_bar("copying", sum(each.nbytes for each in found)) as advance:
                copy_namespaces(*ends, found, done, advance)
    except (ConfigError, PlaceError) as error:
        refuse(str(error))
    except KeyboardInterrupt:
        done.stopped = "interrupted"
    if as_json:
        _print_copied(done, names)
    else:
        _show_copied(done, more_room)
    raise typer.Exit(1 if done.bad or done.stopped is not None else 0)


def _selected(source: Place, prefixes: Sequence[str]) -> list[str]:
    """The names of the namespaces that are to be copied."""
    known = source.namespaces()
    if not known:
        refuse(f"no namespaces in {source.shown!r}")
    fits = [
        name
        for name in known
        if not prefixes or any(name.startswith(p) or name[-12:].startswith(p) for p in prefixes)
    ]
    if not fits:
        refuse(f"no namespace in {source.shown!r} begins with {' or '.join(prefixes)}", known)
    return fits


def _check_ends(source: Place, target: Place) -> None:
    from kvstrata.offload.cli.copy.directory import DirectoryPlace

    if source.overlaps(target):
        refuse(f"{target.shown!r} is, holds or lies in {source.shown!r}: give two places apart")
    if isinstance(target, DirectoryPlace) and target.exists:
        refuse_root(target.root)


def _print_copied(done: Copied, names: Sequence[str]) -> None:
    found: Mapping[str, Any] = {
        "namespaces": [*names],
        "pages": done.pages,
        "bytes": done.bytes,
        "there": done.there,
        "gone": done.gone,
        "private": done.private,
        "bad": [{"path": where, "reason": reason} for where, reason in sorted(done.bad)],
        "stopped": done.stopped,
    }
    print_json(found)


def _show_copied(done: Copied, more_room: str) -> None:
    for where, reason in sorted(done.bad):
        typer.echo(f"not copied: {printable(where)}: {printable(reason)}")
    for name in done.private:
        typer.echo(f"left out: {printable(name)}: none but its own engine reads it")
    parts = [f"{done.pages} pages, {format_bytes(done.bytes)} copied"]
    parts.append(f"{done.there} were there already")
    if done.gone:
        parts.append(f"{done.gone} went away meanwhile")
    if done.bad:
        parts.append(f"{len(done.bad)} not copied")
    typer.echo(", ".join(parts))
    if done.stopped is not None:
        remedy = f"{more_room}, and run it again" if done.full else "run it again to go on"
        typer.echo(f"stopped: {printable(done.stopped)}; {remedy}")
