"""What `kvstrata simulate` prints: a table, or JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvstrata.offload.cli.printing import print_json, printable
from kvstrata.tiers.options import format_bytes

if TYPE_CHECKING:
    from kvstrata.offload.simulate.costs import Prices
    from kvstrata.offload.simulate.results import Result
    from kvstrata.offload.simulate.sweep import Target
    from kvstrata.offload.simulate.traces import Trace

_WIDE = 10_000  # columns, more than any line takes


class Report:
    """What is said of the results.

    Args:
        trace: that was replayed.
        prices: of the tiers, where they are known.
        per_day: bytes that the SSD may be written each day, where that is known.
        target: what is good enough, where something is.
    """

    def __init__(
        self, trace: Trace, prices: Prices | None, per_day: float | None, target: Target | None
    ) -> None:
        self._trace = trace
        self._prices, self._per_day, self._target = prices, per_day, target

    def show(self, results: Sequence[Result]) -> None:
        """Print a table, and the cheapest configuration that is good enough."""
        trace = self._trace
        seconds = trace.requests[-1].at
        typer.echo(
            f"{len(trace.requests)} requests in {seconds:.0f} s, {trace.tokens} tokens, "
            f"{trace.chunks} chunks of {trace.tokens_per_chunk} tokens"
        )
        rows = [self._row(result) for result in results]
        columns = max(rows, key=len)  # the others lack some of these
        table = Table(box=None, pad_edge=False)
        for name in columns:
            table.add_column(name, justify="left" if name == "configuration" else "right")
        for row in rows:
            table.add_row(*(Text(row.get(name, "")) for name in columns))
        console = Console(width=_WIDE)
        with console.capture() as shown:
            console.print(table)
        for line in shown.get().splitlines():
            typer.echo(line.rstrip())
        if self._target is not None:
            found = self._cheapest(results)
            words = "none" if found is None else printable(found.name)
            typer.echo(f"cheapest with {self._target}: {words}")

    def print_json(self, results: Sequence[Result]) -> None:
        """The same as one JSON object."""
        found = self._cheapest(results)
        trace = self._trace
        print_json(
            {
                "trace": {
                    "requests": len(trace.requests),
                    "seconds": trace.requests[-1].at,
                    "tokens": trace.tokens,
                    "chunks": trace.chunks,
                    "tokens_per_chunk": trace.tokens_per_chunk,
                },
                "results": [self._json(result) for result in results],
                "cheapest": None if found is None else found.name,
            }
        )

    def _json(self, result: Result) -> Mapping[str, Any]:
        price = None if self._prices is None else self._prices.of(result)
        return {**result.to_json(), "price": price, "endurance_share": self._wear(result)}

    def _wear(self, result: Result) -> float | None:
        """Written in a day by what may be written in a day."""
        written = result.written_per_day
        if written is None or self._per_day is None:
            return None
        return written / self._per_day

    def _cheapest(self, results: Sequence[Result]) -> Result | None:
        from kvstrata.offload.simulate.sweep import cheapest

        if self._target is None or self._prices is None:
            return None
        return cheapest(results, self._prices, self._target)

    def _row(self, result: Result) -> dict[str, str]:
        """Cells by the name of their column; empty ones may be left out."""
        row = {"configuration": printable(result.name), "hit rate": f"{result.hit_rate:.3f}"}
        if result.ttft:
            row |= {tier: f"{result.rate(tier):.3f}" for tier in result.served}
            row |= {way: format_bytes(nbytes) for way, nbytes in result.moved.items()}
            row |= {f"{tier} evicted pages": f"{pages}" for tier, pages in result.evicted.items()}
        if (written := result.written_per_day) is not None:
            row["fs written a day"] = format_bytes(round(written))
        if (wear := self._wear(result)) is not None:
            row["endurance"] = f"{100 * wear:.0f} %"
        row |= {f"TTFT p{percent}": f"{value:.2f} s" for percent, value in result.ttft.items()}
        if self._prices is not None:
            row["price"] = f"{self._prices.of(result):.2f}"
        return row
