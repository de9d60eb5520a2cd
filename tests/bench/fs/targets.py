"""What the figures are held against."""

from __future__ import annotations

from collections.abc import Callable

from kvstrata.kernels.bench.results.targets import Target
from tests.bench.fs import budget
from tests.bench.fs.contestants import Ours, Raw, Stock
from tests.bench.fs.figures import Figure

_KIB = 1024
_MOVES = ("store", "load cold")


def _target(
    name: str,
    metric: str,
    applies: Callable[[Figure], bool],
    bound: float,
    *against: str,
    at_most: bool = False,
) -> Target:
    """A target of one metric of ours."""

    def of(figure: Figure) -> bool:
        return figure.metric == metric and applies(figure)

    return Target(name, Ours.name, of, bound, against, at_most)


def _long(f: Figure, kib: int, *operations: str) -> bool:
    whole = f.shape.startswith("one job") and f.engine == "idle"
    return whole and f.page_bytes == kib * _KIB and f.operation in operations


TARGETS = (
    _target(
        "idle, against stock",
        "GB/s",
        lambda f: f.engine == "idle" and f.operation in _MOVES,
        0.95,
        Stock.name,
    ),
    _target(
        "busy, against stock",
        "GB/s",
        lambda f: f.engine == "busy" and f.operation in _MOVES,
        1.0,
        Stock.name,
    ),
    _target(
        "load warm, against stock",
        "GB/s",
        lambda f: f.operation == "load warm" and f.page_bytes >= 512 * _KIB,
        4.0,
        Stock.name,
    ),
    _target(
        "long prefix of 128 KiB, store", "GB/s", lambda f: _long(f, 128, "store"), 1.6, Stock.name
    ),
    _target(
        "long prefix of 128 KiB, load cold",
        "GB/s",
        lambda f: _long(f, 128, "load cold"),
        1.4,
        Stock.name,
    ),
    _target("long prefix of 2 MiB", "GB/s", lambda f: _long(f, 2048, *_MOVES), 1.1, Stock.name),
    _target(
        "long prefix of 2 MiB, against the device",
        "GB/s",
        lambda f: _long(f, 2048, *_MOVES),
        0.9,
        Raw.name,
    ),
    _target(
        "2 MiB and more, against the device",
        "GB/s",
        lambda f: f.engine == "idle" and f.operation in _MOVES and f.page_bytes >= 2048 * _KIB,
        0.9,
        Raw.name,
    ),
    _target(
        "lookup, against stock",
        "us/key",
        lambda f: f.operation.startswith("lookup"),
        1.0,
        Stock.name,
        at_most=True,
    ),
    _target(
        "at the budget, against stock's plain store",
        "GB/s",
        lambda f: f.operation == budget.OPERATION,
        1.0,
        Stock.name,
    ),
    _target(
        "start on many files, first look-up",
        "s",
        lambda f: f.operation.startswith("first look-up"),
        0.1,
        at_most=True,
    ),
    _target("start, index loaded", "s", lambda f: f.operation == "index loaded", 2.0, at_most=True),
    _target("index memory", "bytes/file", lambda f: f.operation == "index", 250.0, at_most=True),
)
