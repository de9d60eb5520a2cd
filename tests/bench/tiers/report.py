"""The figures for people: a line per case and metric, with our ratio to the client's own loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvstrata.kernels.bench.results.tables import shown
from kvstrata.kernels.bench.results.targets import ratios
from tests.bench.fs.figures import Figure
from tests.bench.tiers.contestants import Ours, Raw


def rows(figures: Sequence[Figure]) -> Iterator[list[str]]:
    """The columns' names, and then the lines."""
    yield ["case", "metric", Ours.name, Raw.name, "ratio"]
    by = ratios(figures, Ours.name, Raw.name)
    for figure in figures:
        if figure.contestant == Ours.name:
            ratio = by.get(figure)
            raw = figure.value / ratio if ratio else None
            cells = map(shown, (figure.value, raw, ratio))
            yield [figure.case, figure.metric, *cells]
