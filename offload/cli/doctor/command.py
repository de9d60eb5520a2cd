"""`kvstrata doctor`: what would work here, or what is wrong at a server."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvstrata.offload.cli.printing import AsJson, print_json, printable
from kvstrata.offload.cli.spans import seconds

_UNWRAPPED = 10_000  # columns, more than any check takes
_WORKS = "works", "does not work"
_STYLES = {"ok": "green", "warning": "yellow", "problem": "red"}


def doctor(
    path: Annotated[
        str | None,
        typer.Argument(metavar="PATH", help="The root_dir of the filesystem tier to be."),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="Look at this kv_connector_extra_config, or --kv-transfer-config, instead: its "
            "keys, values and directories.",
        ),
    ] = None,
    tier: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="Try this entry of secondary_tiers instead: pages of no model are stored, found, "
            "loaded and deleted, and timed.",
        ),
    ] = None,
    server: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="Look at a server that runs instead: what is wrong there, and what to change; may "
            "be given again, for servers that share pages.",
        ),
    ] = None,
    span: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="TIME", help="How long to look at servers; 10s if it is not given."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what would work here, what not, and why; or what is wrong at a server that runs.

    Exits with 1 if kvstrata could not run at all, or not with files at PATH, the configuration or
    the tier, or if something is wrong at a server; with 2 if that cannot be read or has
    told nothing yet.
    """
    from dataclasses import asdict

    from kvstrata.offload.cli.doctor.config import examine_config
    from kvstrata.offload.cli.doctor.machine import PROBLEM, examine

    if sum(given is not None for given in (path, config, tier, server or None)) > 1:
        raise typer.BadParameter("give one of PATH, --config, --tier and --server")
    if span is not None and not server:
        raise typer.BadParameter("--for goes with --server")
    if server:
        from kvstrata.offload.cli.server.doctor import examine_servers

        examine_servers(server, seconds(span or "10s", "time", '"30s" or "5min"'), as_json)
    what, words, found = "kvstrata", ("can run", "cannot run"), examine(path)
    if config is not None:
        what, words, found = "this configuration", _WORKS, examine_config(config)
    elif tier is not None:
        from kvstrata.offload.cli.doctor.tier import examine_tier

        what, words, found = "this tier", _WORKS, examine_tier(tier)
    checks = list(found)
    problems = [check.name for check in checks if check.status == PROBLEM]
    if as_json:
        print_json({"ok": not problems, "checks": [asdict(check) for check in checks]})
    else:
        table = Table(box=None, show_header=False, pad_edge=False)
        for check in checks:
            status = Text(check.status, style=_STYLES[check.status])
            cells = (check.name, check.found, check.meaning)
            table.add_row(status, *(Text(printable(cell)) for cell in cells))
        # in a file or a pipe each check is one line
        console = Console(width=None if sys.stdout.isatty() else _UNWRAPPED)
        with console.capture() as shown:
            console.print(table)
        for line in shown.get().splitlines():
            typer.echo(line.rstrip())
        named = f": {', '.join(problems)}" if problems else ""
        typer.echo(f"{what} {words[bool(problems)]} here{named}")
    raise typer.Exit(1 if problems else 0)
