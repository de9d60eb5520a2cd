"""What the demos print while they work, and how they end."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

console = Console(highlight=False)


@contextmanager
def step(text: str) -> Iterator[Callable[[str], None]]:
    """Show that `text` is going on and for how long; yields a function that adds a detail."""
    started = time.monotonic()
    if console.is_terminal:
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(text, total=None)
            yield lambda detail: progress.update(task, description=f"{text}: {detail}")
    else:
        console.print(f"  ... {text}")
        yield lambda detail: None
    console.print(f"  [green]done[/] {text} [dim]{time.monotonic() - started:.1f} s[/]")


def end_with(main: Callable[[], int]) -> NoReturn:
    """Run a demo and exit with what it returns; SIGTERM and SIGHUP end it as Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    try:
        sys.exit(main())
    except (RuntimeError, FileNotFoundError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
