"""`kvstrata ls`: the namespaces of a root, and the books of its disk budget."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstrata.offload.cli.printing import AsJson, age, byte_bar, fail, print_json, printable
from kvstrata.offload.cli.roots.root import Root, books_json, no_namespaces
from kvstrata.offload.cli.roots.why import explain
from kvstrata.tiers.options import format_bytes

if TYPE_CHECKING:
    from kvstrata.tiers.fs.tools.listing import NamespaceReport


def list_root(
    root: Root,
    why: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="NAMESPACE NAMESPACE",
            help="Instead, show the fields in which these two differ. A digest, or the start of "
            "one or of a name, will do.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the namespaces: for which model and settings files are kept, how many, and their use.

    Says so on stderr if there is none.

    Exits with 2 if ROOT is no readable directory, or holds things but no namespace, or --why cannot
    be answered.
    """
    if why is not None:
        explain(root, why, as_json)
        return
    from kvstrata.tiers.fs.tools.listing import list_namespaces
    from kvstrata.tiers.fs.tools.trim import last_uses

    try:
        with byte_bar("listing") as advance:
            namespaces = list_namespaces(root, advance)
        misplaced = not namespaces and no_namespaces(root)
        books = books_json(root)
    except OSError as error:
        fail(root, error)
    used = last_uses(root)
    total = sum(each.bytes for each in namespaces)
    rows = [
        (each, used.get(os.path.basename(each.path)), each.bytes / total if total else 0.0)
        for each in namespaces
    ]
    if as_json:
        listed = [_namespace_json(*row) for row in rows]
        print_json({"path": root, "books": books, "namespaces": listed})
    elif namespaces:
        _show_books(root, books)
        for row in rows:
            _show_namespace(*row)
    raise typer.Exit(2 if misplaced else 0)


def _show_books(root: str, books: Mapping[str, Any] | None) -> None:
    if books is None:
        typer.echo(f"{printable(root)}: no books of a disk budget that can be read")
        return
    files, nbytes = f"{books['files']} files", format_bytes(books["bytes"])
    if (most := books["max_files"]) is not None:
        files += f" of at most {most}"
    if (most := books["max_bytes"]) is not None:
        nbytes += f" of at most {format_bytes(most)}"
    free = (
        f"{format_bytes(books['free_bytes'])} free"
        if books["free_bytes"] is not None
        else "unbounded"
    )
    if (least := books["min_free_bytes"]) is not None:
        free += f" of at least {format_bytes(least)}"
    counted = "" if books["counted"] else "not counted yet: "
    keeper = f", the keeper is {books['keeper'][:8]}" if books["keeper"] else ""
    damage = "".join(f"; {reason}" for reason in books["damage"])
    typer.echo(
        f"{printable(root)}: {counted}{files}, {nbytes}, {free}; "
        f"{books['servers']} members{keeper}{damage}"
    )


def _namespace_json(report: NamespaceReport, used: float | None, share: float) -> dict[str, Any]:
    now, found = time.time(), {**asdict(report), "share": share}
    times = {"oldest": found.pop("oldest"), "newest": found.pop("newest"), "used": used}
    ages = {name: None if t is None else max(0.0, now - t) for name, t in times.items()}
    return {**found, **{f"{name}_age_s": since for name, since in ages.items()}}


def _show_namespace(report: NamespaceReport, used: float | None, share: float) -> None:
    """Three lines: the name, the main fields, the files."""
    now = time.time()
    fields = report.fields or {}
    settings = (
        f"KV dtype {fields.get('kv_dtype')!s:.40}, tokens per chunk "
        f"{_tokens(fields)}, weights {fields.get('weights')!s:.12}"
    )
    if report.config is not None:
        settings = f"config.json: {report.config}"
    files = f"{report.files} files, {format_bytes(report.bytes)} ({share:.0%})"
    if report.oldest is not None and report.newest is not None:
        ages = f"{age(report.oldest, now)} ago, the newest {age(report.newest, now)} ago"
        files += f", the oldest written {ages}"
    if used is not None:
        files += f", used {age(used, now)} ago"
    others = f"{report.temporary} temporary, {report.quarantined} quarantined"
    typer.echo(f"{printable(report.model)} {report.digest}")
    typer.echo(f"    {printable(settings)}")
    typer.echo(f"    {files}; {others}")
    if not report.trusted:
        typer.echo("    NOT IN USE: audits found pages that are not the model's (kvstrata trust)")


def _tokens(fields: Mapping[str, Any]) -> str:
    """Tokens per chunk of each group, where config.json tells."""
    from kvstrata.tiers.base import layouts_from_json

    try:
        layouts = layouts_from_json(fields["pages"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return "unknown"
    return ", ".join(str(tokens) for tokens in sorted({x.tokens for x in layouts.values()}))
