"""The targets that the figures are held against, and which of them were met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tests.bench.fs import budget
from tests.bench.fs.contestants import Ours, Raw, Stock
from tests.bench.fs.figures import Figure

_KIB = 1024
_MOVES = ("store", "load cold")


class Target(NamedTuple):
    """A bound for some of our figures.

    Attributes:
        name: what it is called in the summary.
        metric: the figures' metric.
        applies: to which of our figures with this metric.
        bound: what they must reach, or with `at_most` not exceed.
        against: whose figures ours are divided by; None: they count as they are.
    """

    name: str
    metric: str
    applies: Callable[[Figure], bool]
    bound: float
    against: str | None = None
    at_most: bool = False


def _long(f: Figure, kib: int, *operations: str) -> bool:
    whole = f.shape.startswith("one job") and f.engine == "idle"
    return whole and f.page_bytes == kib * _KIB and f.operation in operations


TARGETS = (
    Target(
        "idle, against stock",
        "GB/s",
        lambda f: f.engine == "idle" and f.operation in _MOVES,
        0.95,
        Stock.name,
    ),
    Target(
        "busy, against stock",
        "GB/s",
        lambda f: f.engine == "busy" and f.operation in _MOVES,
        1.0,
        Stock.name,
    ),
    Target(
        "load warm, against stock",
        "GB/s",
        lambda f: f.operation == "load warm" and f.page_bytes >= 512 * _KIB,
        4.0,
        Stock.name,
    ),
    Target(
        "long prefix of 128 KiB, store", "GB/s", lambda f: _long(f, 128, "store"), 1.6, Stock.name
    ),
    Target(
        "long prefix of 128 KiB, load cold",
        "GB/s",
        lambda f: _long(f, 128, "load cold"),
        1.4,
        Stock.name,
    ),
    Target("long prefix of 2 MiB", "GB/s", lambda f: _long(f, 2048, *_MOVES), 1.1, Stock.name),
    Target(
        "long prefix of 2 MiB, against the device",
        "GB/s",
        lambda f: _long(f, 2048, *_MOVES),
        0.9,
        Raw.name,
    ),
    Target(
        "2 MiB and more, against the device",
        "GB/s",
        lambda f: f.engine == "idle" and f.operation in _MOVES and f.page_bytes >= 2048 * _KIB,
        0.9,
        Raw.name,
    ),
    Target(
        "lookup, against stock",
        "us/key",
        lambda f: f.operation.startswith("lookup"),
        1.0,
        Stock.name,
        at_most=True,
    ),
    Target(
        "at the budget, against stock's plain store",
        "GB/s",
        lambda f: f.operation == budget.OPERATION,
        1.0,
        Stock.name,
    ),
    Target(
        "start on many files, first look-up",
        "s",
        lambda f: f.operation.startswith("first look-up"),
        0.1,
        at_most=True,
    ),
    Target("start, index loaded", "s", lambda f: f.operation == "index loaded", 2.0, at_most=True),
    Target("index memory", "bytes/file", lambda f: f.operation == "index", 250.0, at_most=True),
)


def ratio(figure: Figure, against: str, figures: Sequence[Figure]) -> float | None:
    """The figure divided by that of another contestant; None if there is none."""
    wanted = figure._replace(contestant=against)[:-1]
    return next((figure.value / f.value for f in figures if f[:-1] == wanted and f.value), None)


def summary(figures: Sequence[Figure]) -> str:
    """The targets met, missed and not measured, in one line."""
    words: dict[str, list[str]] = {"met": [], "missed": [], "not measured": []}
    for target in TARGETS:
        verdict, detail = _judge(target, figures)
        words[verdict].append(f"{target.name}{detail}")
    parts = [f"{len(names)} {word} ({'; '.join(names)})" for word, names in words.items() if names]
    return f"targets: {', '.join(parts)}"


def _judge(target: Target, figures: Sequence[Figure]) -> tuple[str, str]:
    values = []
    for figure in figures:
        ours = figure.contestant == Ours.name and figure.metric == target.metric
        if ours and target.applies(figure):
            value = ratio(figure, target.against, figures) if target.against else figure.value
            if value is not None:
                values.append((value, figure.case))
    if not values:
        return "not measured", ""
    sign = "<=" if target.at_most else ">="
    values.sort(reverse=target.at_most)  # the worst first
    missed = [
        (v, c) for v, c in values if (v > target.bound if target.at_most else v < target.bound)
    ]
    if not missed:
        return "met", f": {values[0][0]:.2f} {sign} {target.bound:g}"
    cases = ", ".join(f"{value:.2f} {case}" for value, case in missed)
    return "missed", f" {sign} {target.bound:g} in {len(missed)} of {len(values)}: {cases}"
