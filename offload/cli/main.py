"""The command `kvstrata`: look at files, tend them, and see whether kvstrata would work here.

Commands import what they need when they run, so that each starts at once and `doctor` runs
where something is missing.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvstrata.offload.cli.config import config
from kvstrata.offload.cli.copy.command import copy
from kvstrata.offload.cli.inspecting.inspect import inspect
from kvstrata.offload.cli.pool import pool
from kvstrata.offload.cli.printing import AsJson, print_json, printable
from kvstrata.offload.cli.roots.check import check
from kvstrata.offload.cli.roots.gc import gc
from kvstrata.offload.cli.roots.ls import list_root
from kvstrata.offload.cli.roots.trust import trust

app = typer.Typer(
    help="Look at the files that kvstrata keeps, tend them, and see whether it would work here.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_UNWRAPPED = 10_000  # columns, more than any check takes
_WORKS = "works", "does not work"
_STYLES = {"ok": "green", "warning": "yellow", "problem": "red"}


def main() -> None:
    """The console script."""
    app(prog_name="kvstrata")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"kvstrata {version('kvstrata')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


app.command()(inspect)
app.command("ls")(list_root)
app.command()(check)
app.command()(gc)
app.command()(copy)
app.command()(trust)
app.command()(config)
app.add_typer(pool, name="pool")


@app.command()
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
    as_json: AsJson = False,
) -> None:
    """Say what would work here, what not, and why.

    Exits with 1 if kvstrata could not run at all, or not with files at PATH, the configuration or
    the tier.
    """
    from dataclasses import asdict

    from kvstrata.offload.cli.doctor.config import examine_config
    from kvstrata.offload.cli.doctor.machine import PROBLEM, examine

    if sum(given is not None for given in (path, config, tier)) > 1:
        raise typer.BadParameter("give one of PATH, --config and --tier")
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
