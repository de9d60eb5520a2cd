"""What the commands print: ages, JSON, errors, and bars on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def print_json(value: object) -> None:
    """One JSON value on stdout."""
    typer.echo(json.dumps(value, indent=2))


def printable(text: str) -> str:
    """`text` without what could control a terminal: files and their names are anybody's work."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def age(when: float, now: float) -> str:
    """From `when` to `now`, both in seconds since the epoch: `3 min`."""
    seconds = max(0.0, now - when)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def complain(path: str, error: OSError) -> None:
    """Say on stderr why nothing can be done at `path`."""
    typer.echo(f"kvstrata: {path!r}: {error.strerror or error}", err=True)


def fail(path: str, error: OSError) -> NoReturn:
    """Say why nothing can be done at `path`, and exit with 2."""
    complain(path, error)
    raise typer.Exit(2)


@contextmanager
def byte_bar(what: str, total: int | None = None) -> Iterator[Callable[[int], None] | None]:
    """A bar on stderr; yields what is to be called with bytes done, None without a terminal."""
    with _bar(what, total, BarColumn(), DownloadColumn(), TimeRemainingColumn()) as update:
        yield update and (lambda nbytes: update(advance=nbytes))


@contextmanager
def state_bar(what: str) -> Iterator[Callable[[str], None] | None]:
    """A bar without an end on stderr; yields what is to be called with a few words of state."""
    with _bar(what, None, BarColumn(), TextColumn("{task.fields[state]}")) as update:
        yield update and (lambda state: update(state=state))


@contextmanager
def _bar(
    what: str, total: int | None, *columns: ProgressColumn
) -> Iterator[Callable[..., None] | None]:
    """A bar's update; None unless stderr is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    words = TextColumn("{task.description}")
    with Progress(words, *columns, console=Console(stderr=True), transient=True) as bar:
        yield partial(bar.update, bar.add_task(what, total=total, state=""))
