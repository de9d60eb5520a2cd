"""The command `kvstrata`: look at servers and files, tend these, see whether it would work here.

Commands import what they need when they run, so that each starts at once and `doctor` runs
where something is missing.
"""

from __future__ import annotations

from typing import Annotated

import typer

from kvstrata.offload.cli.config import config
from kvstrata.offload.cli.copy.command import copy
from kvstrata.offload.cli.doctor.command import doctor
from kvstrata.offload.cli.inspecting.inspect import inspect
from kvstrata.offload.cli.pool import pool
from kvstrata.offload.cli.roots.check import check
from kvstrata.offload.cli.roots.gc import gc
from kvstrata.offload.cli.roots.ls import list_root
from kvstrata.offload.cli.roots.trust import trust
from kvstrata.offload.cli.server.top.command import top
from kvstrata.offload.cli.simulate.command import simulate

app = typer.Typer(
    help="Look at servers and at the files that kvstrata keeps, tend these, and see whether it "
    "would work here.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
app.command()(doctor)
app.command()(top)
app.command()(simulate)
app.add_typer(pool, name="pool")
