"""`python -m tests.bench.manager`: the scheduler's time in our manager and in stock's.

Both play the same requests in turns, in one process, called as vLLM's scheduler calls them.
All figures are medians.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tests.bench.fs.figures import append_csv, machine
from tests.bench.manager.contestants import OURS, STOCK
from tests.bench.manager.rounds import (
    ARRIVE,
    EVICTING,
    EVICTION,
    FREE,
    HIT,
    LOAD,
    LOADED,
    MISS,
    PROMOTING,
    STORED,
    STORING,
    Figure,
    measure,
)

RESIDENT = [1_000, 100_000, 1_000_000]
TIERS = [0, 1]
TARGETED = (
    *(HIT, MISS, STORING, PROMOTING, FREE, EVICTING, EVICTION),
    *(STORED, LOAD, LOADED, ARRIVE),
)
AGAINST_STOCK = 0.7  # the most that an operation may take of stock's time
FLAT = 1.5  # the most that it may take with the most pages, of its time with the fewest


def against_stock(figures: Sequence[Figure]) -> dict[Figure, float]:
    """Each of our figures with its ratio to stock's; infinite where that is nothing."""
    stock = {f[1:-1]: f.value for f in figures if f.contestant == STOCK}
    ours = [f for f in figures if f.contestant == OURS]
    return {f: f.value / stock[f[1:-1]] if stock[f[1:-1]] else math.inf for f in ours}


def growth(figures: Sequence[Figure]) -> dict[Figure, float]:
    """Our figures that have a target: with the most pages against those with the fewest."""
    ours = [f for f in figures if f.contestant == OURS]
    fewest, most = (pick(f.resident for f in ours) for pick in (min, max))
    small = {f._replace(resident=most)[:-1]: f.value for f in ours if f.resident == fewest}
    return {
        f: f.value / small[f[:-1]] for f in ours if f.resident == most and f.operation in TARGETED
    }


def print_table(figures: Sequence[Figure], console: Console) -> None:
    """A line per operation; per number of pages ours, stock's and the ratio."""
    table = Table(box=None)
    for name in ("tiers", "operation", "unit"):
        table.add_column(name, no_wrap=True)
    sizes = sorted({figure.resident for figure in figures})
    for size in sizes:
        for heading in (f"{size:,} {OURS}", STOCK, "ratio"):
            table.add_column(heading, justify="right")
    ratios = against_stock(figures)
    values = {figure[:-1]: figure.value for figure in figures}
    for first in (f for f in ratios if f.resident == sizes[0]):
        cells = [str(first.tiers), first.operation, first.unit]
        for figure in (f for f in ratios if f._replace(resident=sizes[0])[:-1] == first[:-1]):
            stock = values[figure._replace(contestant=STOCK)[:-1]]
            cells += [f"{figure.value:.2f}", f"{stock:.2f}", f"{ratios[figure]:.2f}"]
        table.add_row(*cells)
    console.print(table)


def summary(figures: Sequence[Figure]) -> str:
    """The ratios that have a target, in one line."""
    return "targets: " + "; ".join(
        _judge(name, bound, {f: ratio for f, ratio in ratios.items() if f.operation in TARGETED})
        for name, bound, ratios in (
            ("time against stock", AGAINST_STOCK, against_stock(figures)),
            ("most pages against fewest", FLAT, growth(figures)),
        )
    )


def _judge(name: str, bound: float, ratios: dict[Figure, float]) -> str:
    missed = sorted(((r, f) for f, r in ratios.items() if r > bound), reverse=True)
    if not missed:
        return f"{name} met, worst of {len(ratios)}: {max(ratios.values()):.2f} <= {bound:g}"
    worst = ", ".join(f"{r:.2f} {f.operation} ({f.resident:,}, {f.tiers} tiers)" for r, f in missed)
    return f"{name} <= {bound:g} missed in {len(missed)} of {len(ratios)}: {worst}"


def main(
    csv: Annotated[Path | None, typer.Option(help="Append the figures to this file.")] = None,
    resident: Annotated[
        list[int], typer.Option(min=1_000, help="Pages in the primary tier.")
    ] = RESIDENT,
    tiers: Annotated[list[int], typer.Option(min=0, max=1, help="Secondary tiers.")] = TIERS,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each case.")] = 300,
) -> None:
    """Measure the time that the manager takes from vLLM's scheduler, against stock vLLM's."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    figures: list[Figure] = []
    for count in tiers:
        for size in resident:
            print(f"measuring {size:,} pages, {count} secondary tiers", file=sys.stderr)
            figures += measure(size, count, rounds)
    print_table(figures, Console(width=None if sys.stdout.isatty() else 160))
    if csv:
        append_csv(csv, figures, Figure._fields)
    print(summary(figures))


if __name__ == "__main__":
    typer.run(main)
