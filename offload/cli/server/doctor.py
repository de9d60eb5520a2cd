"""`kvstrata doctor --server`: what is wrong at servers that run, and what to change."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from time import sleep
from typing import NoReturn

import typer

from kvstrata.offload.cli.printing import print_json, printable, state_bar
from kvstrata.offload.cli.roots.root import refuse
from kvstrata.offload.cli.server.faults.seeds import seeds
from kvstrata.offload.cli.server.judging import judge
from kvstrata.offload.cli.server.look import Finding, Look
from kvstrata.offload.cli.server.scrape import Scrape, ScrapeError, read

_WIDEST = 110  # columns: longer lines are hard to read


def examine_servers(urls: Sequence[str], seconds: float, as_json: bool) -> NoReturn:
    """Read the servers' metrics twice, so many seconds apart, and print what is wrong.

    Exits with 0 if nothing is, with 1 if something is, with 2 if a server cannot be read
    or has told nothing yet.
    """
    try:
        before = [read(url) for url in urls]
        with state_bar(f"looking for {seconds:g} s"):
            sleep(seconds)
        looks = [
            look
            for url, first in zip(urls, before, strict=True)
            for look in _looks(first, read(url))
        ]
    except ScrapeError as error:
        refuse(str(error))
    found = [(look, judge(look)) for look in looks]
    across = list(seeds(looks))
    wrong = [each for findings in (across, *(f for _, f in found)) for each in findings]
    ok = not any(each.wrong for each in wrong)
    if as_json:
        servers = [
            {
                "url": look.after.url,
                "engine": look.engine,
                "model": look.model,
                "findings": [asdict(each) for each in findings],
            }
            for look, findings in found
        ]
        print_json({"ok": ok, "servers": servers, "across": [asdict(each) for each in across]})
    else:
        for look, findings in found:
            _show(f"{look.name} ({look.model or 'model unknown'})", findings)
        if across:
            _show("all of them together", across)
    raise typer.Exit(0 if ok else 1)


def _looks(before: Scrape, after: Scrape) -> Iterator[Look]:
    """Both reads of each engine; one that was not there before had done nothing till then."""
    earlier, engines = before.by_engine(), after.by_engine()
    if not engines:  # vLLM tells what connectors count only while it runs requests
        raise ScrapeError(
            f"{after.url} has told nothing of its tiers yet, so nothing can be judged: send it a "
            "request, and ask again"
        )
    for engine, now in engines.items():
        then = earlier.get(engine, Scrape(before.url, before.when, {}))
        yield Look(then, now, engine, len(engines))


def _show(title: str, findings: Sequence[Finding]) -> None:
    wrong = sum(each.wrong for each in findings)
    things = "nothing is wrong" if not wrong else "1 thing is wrong" if wrong == 1 else ""
    typer.echo(printable(f"{title}: {things or f'{wrong} things are wrong'}"))
    width = None
    if sys.stdout.isatty():
        width = min(shutil.get_terminal_size().columns, _WIDEST)
    for each in findings:
        mark = "!" if each.wrong else "-"
        text = f"{each.fault}, {each.about}: {_sentence(each.found)} {_sentence(each.remedy)}"
        text = printable(text)  # names of tiers and causes are a server's
        if width:
            text = textwrap.fill(text, width - 4, subsequent_indent="    ")
        typer.echo(f"  {mark} {text}")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
