"""`python -m tests.bench.manager`: the scheduler's time in our manager and in stock's.

Both play the same requests in turns, in one process, called as vLLM's scheduler calls them.
All figures are medians.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from kvstrata.kernels.bench.results.figures import append_csv, machine_line
from kvstrata.kernels.bench.results.tables import print_table, shown
from kvstrata.kernels.bench.results.targets import Held, Target, ratios, summary
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
AGAINST_STOCK = Target(
    "time against stock",
    OURS,
    lambda figure: figure.operation in TARGETED,
    0.7,
    against=(STOCK,),
    at_most=True,
)
FLAT = 1.5  # the most that it may take with the most pages, of its time with the fewest


def growth(figures: Sequence[Figure]) -> Held:
    """Our figures with the most pages by those with the fewest."""
    ours = [f for f in figures if f.contestant == OURS and f.operation in TARGETED]
    fewest, most = (pick(f.resident for f in ours) for pick in (min, max))
    small = {f._replace(resident=most)[:-1]: f.value for f in ours if f.resident == fewest}
    values = [(f.value / small[f[:-1]], f.case) for f in ours if f.resident == most]
    return Held("most pages against fewest", values, FLAT, at_most=True)


def rows(figures: Sequence[Figure]) -> Iterator[list[str]]:
    """The columns' names; then a line per operation: ours, stock's and the ratio per size."""
    sizes = sorted({figure.resident for figure in figures})
    headings = ([f"{size:,} {OURS}", STOCK, "ratio"] for size in sizes)
    yield ["tiers", "operation", "unit", *(name for each in headings for name in each)]
    by_stock = ratios(figures, OURS, STOCK)
    values = {figure[:-1]: figure.value for figure in figures}
    for first in (f for f in figures if f.contestant == OURS and f.resident == sizes[0]):
        cells = [str(first.tiers), first.operation, first.unit]
        for size in sizes:
            case = first._replace(resident=size)[:-1]
            ours = Figure(*case, values[case])
            cells.append(shown(ours.value))
            cells.append(shown(values.get(ours._replace(contestant=STOCK)[:-1])))
            cells.append(shown(by_stock.get(ours)))
        yield cells


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
    print(machine_line())
    figures: list[Figure] = []
    for count in tiers:
        for size in resident:
            print(f"measuring {size:,} pages, {count} secondary tiers", file=sys.stderr)
            figures += measure(size, count, rounds)
    print_table([*rows(figures)], 3)
    if csv:
        append_csv(csv, figures)
    print(summary([AGAINST_STOCK.held(figures), growth(figures)]))


if __name__ == "__main__":
    typer.run(main)
