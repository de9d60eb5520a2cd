"""The figures for people: the rows of a table, and a plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from kvstrata.kernels.bench.results.tables import shown
from kvstrata.kernels.bench.results.targets import ratios
from tests.bench.fs.contestants import Ours, Raw, Stock
from tests.bench.fs.figures import Figure
from tests.bench.fs.transfers import OPERATIONS, SHAPES

_STYLES = {Ours.name: ("tab:blue", "o"), Stock.name: ("tab:orange", "s"), Raw.name: ("grey", "x")}


def rows(figures: Sequence[Figure]) -> Iterator[list[str]]:
    """The columns' names; then a line per case and metric, with our ratios to stock and raw."""
    yield ["case", "metric", Ours.name, Stock.name, "ratio", Raw.name, "ratio"]
    values = {figure[:-1]: figure.value for figure in figures}
    by = {name: ratios(figures, Ours.name, name) for name in (Stock.name, Raw.name)}
    for figure in figures:
        if figure.contestant == Ours.name:
            cells = [figure.case, figure.metric, shown(figure.value)]
            for name in by:
                cells.append(shown(values.get(figure._replace(contestant=name)[:-1])))
                cells.append(shown(by[name].get(figure)))
            yield cells


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
