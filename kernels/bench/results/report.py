"""The kernels' figures for people: the rows of a table, and a plot."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvstrata.kernels.bench import cpu
from kvstrata.kernels.bench.cost_model import SPEEDS, Prediction
from kvstrata.kernels.bench.results.cases import (
    BASELINES,
    CEILING,
    LARGE_BYTES,
    OPERATIONS,
    OURS,
    SHARE,
    SPEED,
    STAGED,
    Result,
)

_COLOURS = dict(zip((OURS, STAGED, *BASELINES), (f"C{i}" for i in range(10)), strict=False))


def rows(results: Sequence[Result], predictions: Sequence[Prediction]) -> list[list[str]]:
    """A line per case and metric, a column per contestant; what a model says has its own.

    The first line names the columns. A speed is followed by its share of the ceiling.
    """
    values = {(str(r.case), r.metric, r.contestant): r for r in results}
    names = list(dict.fromkeys(r.contestant for r in results))
    table = [["case", "metric", *names, *(["model"] if predictions else [])]]
    lines = dict.fromkeys((str(r.case), r.metric, r.unit) for r in results if r.metric != SHARE)
    for case, metric, unit in lines:
        cells = [
            _cell(values.get((case, metric, name)), values.get((case, SHARE, name)))
            for name in names
        ]
        table.append([case, f"{metric} {unit}", *cells, *([""] if predictions else [])])
    for case, metric, value, unit in predictions:
        table.append([case, f"{metric} {unit}", *[""] * len(names), f"{value:.2f}"])
    return table


def _cell(result: Result | None, share: Result | None) -> str:
    if result is None:
        return ""
    bracket = f" ({share.value:.2f})" if share and result.metric == SPEED else ""
    return f"{result.value:.2f}{bracket}"


def plot(results: Sequence[Result], predictions: Sequence[Prediction], path: Path) -> None:
    """GB/s over fragment size, a panel per operation. Without a GPU, the CPU path and the model.

    The suffix says the format.
    """
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(15, 5), layout="constrained")
    if predictions:
        measured, model = picture.subplots(1, 2)
        _plot_cpu(measured, [r for r in results if r.metric == SPEED])
        _plot_model(model)
    else:
        for panel, operation in zip(picture.subplots(1, 3, sharey=True), OPERATIONS, strict=True):
            _plot_operation(panel, operation, [r for r in results if r.metric == SPEED])
    picture.savefig(path, dpi=100)


def _plot_operation(panel: Any, operation: str, speeds: Sequence[Result]) -> None:
    """The batches of 64 MiB and more; a line joins the medians of the models of one size."""
    mine = [r for r in speeds if r.case.operation == operation]
    ceilings = [r.value for r in mine if r.contestant == CEILING]
    panel.axhline(statistics.median(ceilings), color="black", linestyle="--", label=CEILING)
    for name, colour in _COLOURS.items():
        sizes: dict[int, list[float]] = defaultdict(list)
        for result in mine:
            if result.contestant == name and result.case.nbytes >= LARGE_BYTES:
                sizes[result.case.fragment_bytes].append(result.value)
        points = [(size, value) for size, values in sizes.items() for value in values]
        panel.scatter(*zip(*points, strict=True), s=8, color=colour) if points else None
        line = [(size, statistics.median(values)) for size, values in sorted(sizes.items())]
        if line:
            panel.plot(*zip(*line, strict=True), color=colour, label=name)
    _sizes(panel)
    panel.set_title(operation)
    panel.legend(fontsize="small")


def _plot_cpu(panel: Any, speeds: Sequence[Result]) -> None:
    cases = list(dict.fromkeys(r.case.operation for r in speeds))
    for offset, name in ((-0.2, cpu.OURS), (0.2, cpu.MEMCPY)):
        mine = {r.case.operation: r.value for r in speeds if r.contestant == name}
        panel.barh(
            [i + offset for i in range(len(cases))],
            [mine[case] for case in cases],
            height=0.4,
            label=name,
        )
    panel.set_yticks(range(len(cases)), cases, fontsize="small")
    panel.invert_yaxis()
    panel.set_xlabel("GB/s")
    panel.set_title("CPU path, measured")
    panel.legend(fontsize="small")


def _plot_model(panel: Any) -> None:
    sizes = [1 << power for power in range(9, 23)]
    for (name, speed), style in zip(SPEEDS.items(), ("-", "--", ":"), strict=True):
        speeds = [speed(size) for size in sizes]
        panel.plot(sizes, speeds, style, color="grey", label=f"per fragment: {name}")
    _sizes(panel)
    panel.set_title("GPU, a model and no measurement")
    panel.legend(fontsize="small")


def _sizes(panel: Any) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xlabel("fragment size, bytes")
    panel.set_ylabel("GB/s")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
