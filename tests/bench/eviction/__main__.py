"""`python -m tests.bench.eviction`: what is loaded by each order of eviction.

The same requests are played on stock's manager and on ours, both called as vLLM's scheduler calls
them. A figure is the share of the chunks asked for that were loaded.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Annotated, NamedTuple

import typer

from kvstrata.kernels.bench.results.figures import append_csv
from kvstrata.kernels.bench.results.tables import print_table
from kvstrata.kernels.bench.results.targets import Held, summary
from tests.bench.eviction.player import Player
from tests.bench.eviction.prefixes import (
    CYCLES,
    MIXED,
    SLOTS,
    Load,
    chunks_of,
    fitting,
    in_turn,
    trace,
)
from tests.bench.manager.contestants import OURS, STOCK, make

ORDERS = ((STOCK, "lru"), (STOCK, "arc"), (OURS, "lru"), (OURS, "arc"), (OURS, "auto"))
AUTO = (OURS, "auto")
SEEDS = 3
TRACE_SLOTS = (1_000, 3_000, 10_000)
NOT_BELOW = 0.01  # the best of the others
OF_FITTING = 0.8  # of what keeping what fits would load


class Figure(NamedTuple):
    """What was loaded of a load, as a share; `target`: the least that `auto` should load."""

    load: str
    groups: int
    step: int
    contestant: str
    policy: str
    value: float
    target: float

    @property
    def case(self) -> str:
        """What was asked for, in words."""
        return f"{self.load}, {self.groups} groups, {self.step} a step"


def share(order: tuple[str, str], slots: int, groups: int, step: int, load: Load) -> float:
    """The share of a load's chunks that a manager of so many slots per group loads."""
    manager = make(order[0], slots * groups, False, policy=order[1], groups=groups)
    player = Player(manager, groups, step)
    loaded = sum(player.play(chunks) for chunks in load)
    manager.shutdown()
    return loaded / chunks_of(load)


def measure(groups: int, step: int) -> list[Figure]:
    """All loads of `prefixes`."""
    figures = []
    for name, make_load in MIXED.items():
        loads = [make_load(random.Random(seed)) for seed in range(SEEDS)]
        values = {
            order: mean(share(order, SLOTS, groups, step, load) for load in loads)
            for order in ORDERS
        }
        figures += _figures(name, groups, step, values, _best_of_stock(values) - NOT_BELOW)
    for name, (prompts, chunks) in CYCLES.items():
        load = in_turn(prompts, chunks)
        values = {order: share(order, SLOTS, groups, step, load) for order in ORDERS}
        # The first time around nothing can be loaded.
        most = fitting(prompts, chunks) * (1 - prompts / len(load))
        figures += _figures(name, groups, step, values, OF_FITTING * most)
    return figures


def measure_trace(path: Path) -> list[Figure]:
    """A published trace."""
    figures = []
    load = trace(path)
    for slots in TRACE_SLOTS:
        print(f"{path.name} at {slots:,} slots", file=sys.stderr)
        values = {order: share(order, slots, 1, 64, load) for order in ORDERS}
        name = f"trace, {slots:,} slots"
        best = max(value for order, value in values.items() if order != AUTO)
        figures += _figures(name, 1, 64, values, best - NOT_BELOW)
    return figures


def _best_of_stock(values: Mapping[tuple[str, str], float]) -> float:
    return max(value for (contestant, _), value in values.items() if contestant == STOCK)


def _figures(
    load: str, groups: int, step: int, values: Mapping[tuple[str, str], float], target: float
) -> list[Figure]:
    return [
        Figure(load, groups, step, *order, round(value, 4), round(target, 4))
        for order, value in values.items()
    ]


def rows(figures: list[Figure]) -> list[list[str]]:
    """The columns' names; then a line per load: what each order loads, and what `auto` should."""
    lines: dict[tuple[str, int, int], list[Figure]] = {}
    for figure in figures:
        lines.setdefault(figure[:3], []).append(figure)
    orders = (f"{contestant} {policy}" for contestant, policy in ORDERS)
    table = [["load", "groups", "chunks a step", *orders, "target"]]
    for names, line in lines.items():
        values = [*(figure.value for figure in line), line[0].target]
        table.append([*map(str, names), *(f"{value:.3f}" for value in values)])
    return table


def held(figures: list[Figure]) -> Held:
    """What `auto` loads by what it should."""
    ours = [figure for figure in figures if (figure.contestant, figure.policy) == AUTO]
    values = [(100 * figure.value / figure.target, figure.case) for figure in ours]
    return Held("auto, per cent of what it should load", values, 100.0)


def main(
    csv: Annotated[Path | None, typer.Option(help="Append the figures to this file.")] = None,
    trace_file: Annotated[
        Path | None, typer.Option("--trace", help="A trace of hash_ids, one JSON object a line.")
    ] = None,
) -> None:
    """Measure what each order of eviction loads, against stock vLLM's."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    figures: list[Figure] = []
    for groups in (1, 2):
        for step in (8, 64):
            print(f"{groups} groups, {step} chunks a step", file=sys.stderr)
            figures += measure(groups, step)
    if trace_file:
        figures += measure_trace(trace_file)
    print_table(rows(figures), 3)
    if csv:
        append_csv(csv, figures)
    print(summary([held(figures)]))


if __name__ == "__main__":
    typer.run(main)
