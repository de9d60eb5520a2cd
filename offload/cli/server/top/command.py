"""`kvstrata top`: a server's tiers, live."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from kvstrata.offload.cli.roots.root import refuse
from kvstrata.offload.cli.spans import seconds


def top(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="The server, such as http://localhost:8000.")
    ],
    every: Annotated[str, typer.Option(metavar="TIME", help="How often to look.")] = "2s",
) -> None:
    """Show a server's tiers live: hit rates, speeds, what they hold, what they save; q quits.

    Exits with 2 if the server cannot be read at the start.
    """
    if find_spec("textual") is None:
        refuse("top needs Textual: pip install 'kvstrata[tools]'")
    from kvstrata.offload.cli.server.scrape import ScrapeError, read
    from kvstrata.offload.cli.server.top.app import Top

    pause_s = max(1, seconds(every, "time", '"2s" or "1min"'))
    try:
        first = read(url)
    except ScrapeError as error:
        refuse(str(error))
    Top(first, pause_s).run()
