"""`kvstrata inspect`: what a file is, whether it is sound, and what it was made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvstrata.offload.cli.printing import AsJson, complain, print_json, printable
from kvstrata.tiers.options import format_bytes

if TYPE_CHECKING:
    from kvstrata.offload.cli.inspecting.inspection import Inspection

_MOST_SHOWN = 100  # characters of a field's value


def inspect(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Pages, config.json, or other files.")
    ],
    as_json: AsJson = False,
) -> None:
    """Say what a file is: its tensors, its key, whether it is sound, and its namespace's fields.

    Exits with 1 if a file is bad, with 2 if one is not there.
    """
    from kvstrata.offload.cli.inspecting.inspection import inspect as inspect_path

    worst = 0
    for number, file in enumerate(files):
        try:
            found = inspect_path(file)
        except OSError as error:
            complain(file, error)
            worst = 2
            continue
        if as_json:
            from dataclasses import asdict

            print_json({"ok": found.reason is None, **asdict(found)})
        else:
            if number:
                typer.echo()
            _show(found)
        worst = max(worst, 0 if found.reason is None else 1)
    raise typer.Exit(worst)


def _show(found: Inspection) -> None:
    """One line per fact, then the tensors, then the fields."""
    facts = {
        "file": found.path,
        "what": found.kind,
        "bytes": f"{found.bytes} ({format_bytes(found.bytes)})",
        "version": found.format_version,
        "key": found.key,
        "group": found.group,
        "tokens": found.tokens,
        "namespace": found.namespace,
        "directory": found.directory,
        "data offset": found.data_offset,
        "checksum": found.checksum or ("not compared" if found.key else None),
        "verdict": "ok" if found.reason is None else f"bad: {found.reason}",
    }
    for tensor in found.tensors:
        shape = f"[{', '.join(map(str, tensor.shape))}]"
        facts[f"tensor {tensor.name}"] = f"{tensor.dtype} {shape}, {tensor.bytes} bytes"
    facts["fields"] = _where_the_fields_are(found)
    width = max(len(printable(name)) for name in facts)
    for name, value in facts.items():
        if value is not None:
            typer.echo(f"{printable(name):{width}}  {printable(str(value))}")
    _show_fields(found)


def _where_the_fields_are(found: Inspection) -> str | None:
    if found.namespace is None:
        return None
    if found.config is not None:
        return f"as {found.config} says"
    where = "below its root" if found.directory else "beside it, and it lies in no namespace"
    return f"unknown: no config.json of namespace {found.namespace} {where}"


def _show_fields(found: Inspection) -> None:
    """A line for each, by name; `--json` has the long values whole."""
    from kvstrata.tiers.fs.files.differences import leaves, short

    for name, value in leaves(found.fields or {}):
        typer.echo(f"    {printable(name)}: {printable(short(value, _MOST_SHOWN))}")
