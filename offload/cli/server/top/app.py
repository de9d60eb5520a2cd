"""The screen of `kvstrata top`."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal
from textual.widgets import DataTable, Footer, Label, Sparkline, Static

from kvstrata.offload.cli.printing import printable
from kvstrata.offload.cli.server.scrape import Scrape, ScrapeError, read
from kvstrata.offload.cli.server.top.figures import Figures, TierFigures, figures
from kvstrata.offload.cli.server.words import count, span
from kvstrata.tiers.options import format_bytes

_PATIENCE_S = 2.0  # for an answer; quitting waits for the read that is under way
_REMEMBERED = 120  # reads in a sparkline: four minutes of 2 s
# The state is where it is seen, and all fit into 80 columns where nothing is wrong.
_COLUMNS = ("tier", "state", "hits", "now", "read/s", "write/s", "holds", "of", "used", "free")
_LINES = ("tokens served a second", "hits now, %", "MB/s read", "MB/s written")


class Top(App[None]):
    """Reads a server again and again, and shows what it does.

    Args:
        first: a read of it.
        pause_s: seconds between two reads.
    """

    CSS = """
    #server, #summary { padding: 0 1; }
    #table { height: auto; margin: 1 0; }
    .line { height: 2; padding: 0 1; }
    .line Label { width: 26; }
    .line Sparkline { width: 1fr; height: 2; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [("q", "quit", "Quit")]
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, first: Scrape, pause_s: float) -> None:
        super().__init__()
        self._last = first
        self._pause_s = pause_s
        self._history = {line: deque[float](maxlen=_REMEMBERED) for line in _LINES}
        # held here: a read that ends while the screen closes finds them all the same
        self._server, self._summary = Static(id="server"), Static(id="summary")
        self._table: DataTable[Text] = DataTable(id="table", cursor_type="none", show_cursor=False)
        self._labels = [Label(line, id=f"label-{k}") for k, line in enumerate(_LINES)]
        self._sparklines = [Sparkline(id=f"line-{k}") for k in range(len(_LINES))]

    def compose(self) -> ComposeResult:
        yield self._server
        yield self._summary
        yield self._table
        for label, sparkline in zip(self._labels, self._sparklines, strict=True):
            yield Horizontal(label, sparkline, classes="line")
        yield Footer()

    def on_mount(self) -> None:
        self._table.add_columns(*_COLUMNS)
        self._show(figures(self._last, self._last))
        self.run_worker(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._pause_s)
            try:
                now = await asyncio.to_thread(read, self._last.url, _PATIENCE_S)
            except ScrapeError as error:
                self._say_gone(str(error))
            else:
                seen = figures(self._last, now)
                self._last = now
                self._remember(seen)
                self._show(seen)

    def _remember(self, seen: Figures) -> None:
        values = (
            seen.serving,
            100 * (seen.hit_rate_now or 0.0),
            sum(tier.read_rate for tier in seen.tiers) / 1e6,
            sum(tier.write_rate for tier in seen.tiers) / 1e6,
        )
        for number, (line, value) in enumerate(zip(_LINES, values, strict=True)):
            history = self._history[line]
            history.append(value)
            self._sparklines[number].data = list(history)
            self._labels[number].update(f"{line}\n{value:,.1f}")

    def _show(self, seen: Figures) -> None:
        self._server.update(Text(f"{self._last.url}"))
        self._summary.update(
            Text(
                f"{count(seen.served)} tokens served ({count(seen.serving)}/s)   "
                f"saved net {span(seen.saved_net)}   "
                f"waited {span(seen.waited)} ({seen.waits:.2f} s/s)   "
                f"{count(seen.running)} running, {count(seen.waiting)} waiting, "
                f"{seen.ended:.1f} ended/s"
            )
        )
        self._table.clear()
        for tier in seen.tiers:
            self._table.add_row(*(Text(cell) for cell in _cells(tier)))

    def _say_gone(self, why: str) -> None:
        """What is on the screen stays, with how old it is."""
        old = span(time.monotonic() - self._last.when)
        text = Text(printable(f"{why} These figures are {old} old; it is asked again."), "bold red")
        self._server.update(text)


def _cells(tier: TierFigures) -> tuple[str, ...]:
    return (
        printable(tier.name),
        tier.state or "well",
        _percent(tier.hit_rate),
        _percent(tier.hit_rate_now),
        _size(tier.read_rate),
        _size(tier.write_rate),
        _size(tier.held),
        "no limit" if tier.capacity == 0 else _size(tier.capacity),
        _size(tier.disk_used),
        _size(tier.disk_free),
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _size(nbytes: float | None) -> str:
    """`174.0M` for 174.0 MiB."""
    return "-" if nbytes is None else format_bytes(int(nbytes)).replace(" ", "").removesuffix("iB")
