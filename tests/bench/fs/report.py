"""The figures for people: a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench.fs.contestants import Ours, Raw, Stock
from tests.bench.fs.figures import Figure
from tests.bench.fs.targets import ratio
from tests.bench.fs.transfers import OPERATIONS, SHAPES

_STYLES = {Ours.name: ("tab:blue", "o"), Stock.name: ("tab:orange", "s"), Raw.name: ("grey", "x")}


def print_table(figures: Sequence[Figure], console: Console) -> None:
    """A line per case and metric: ours, stock, raw, and the ratios to both."""
    table = Table(box=None)
    for name in ("case", "metric"):
        table.add_column(name, no_wrap=True)
    for name in (Ours.name, Stock.name, "ratio", Raw.name, "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    values = {figure[:-1]: figure.value for figure in figures}
    for figure in figures:
        if figure.contestant != Ours.name:
            continue
        cells = [figure.case, figure.metric, f"{figure.value:.2f}"]
        for other in (Stock.name, Raw.name):
            value = values.get(figure._replace(contestant=other)[:-1])
            share = ratio(figure, other, figures)
            cells.append("" if value is None else f"{value:.2f}")
            cells.append("" if share is None else f"{share:.2f}")
        table.add_row(*cells)
    console.print(table)


def plot(figures: Sequence[Figure], path: Path) -> None:
    """GB/s over page size, a panel per operation and shape; the suffix says the format."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(11, 7), layout="constrained")
    panels = picture.subplots(len(SHAPES), len(OPERATIONS), sharex=True, squeeze=False)
    for row, shape in zip(panels, SHAPES, strict=True):
        for panel, operation in zip(row, OPERATIONS, strict=True):
            panel.set_title(f"{operation}, {shape}")
            for name, (colour, marker) in _STYLES.items():
                for engine, line in (("idle", "-"), ("busy", ":")):
                    points = [
                        (f.page_bytes / 1024, f.value)
                        for f in figures
                        if f[:4] == (name, operation, shape, engine) and f.metric == "GB/s"
                    ]
                    if points:
                        sizes, speeds = zip(*points, strict=True)
                        label = f"{name}, engine {engine}"
                        panel.plot(sizes, speeds, line, color=colour, marker=marker, label=label)
            panel.set_xscale("log", base=2)
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
        row[0].set_ylabel("GB/s")
    for panel in panels[-1]:
        ticks = sorted({f.page_bytes // 1024 for f in figures if f.page_bytes})
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.set_xlabel("page size, KiB")
    panels[0][0].legend(fontsize="small")
    picture.savefig(path, dpi=100)
