"""What the figures are held against."""

from __future__ import annotations

from kvstrata.kernels.bench.results.targets import Target, of
from tests.bench.fs import budget
from tests.bench.fs.contestants import Ours, Raw, Stock
from tests.bench.fs.figures import Figure

_KIB = 1024
_MOVES = ("store", "load cold")


def _long(f: Figure, kib: int, *operations: str) -> bool:
    whole = f.shape.startswith("one job") and f.engine == "idle"
    return whole and f.page_bytes == kib * _KIB and f.operation in operations


TARGETS = (
    Target(
        "idle, against stock",
        Ours.name,
        of("GB/s", lambda f: f.engine == "idle" and f.operation in _MOVES),
        0.95,
        (Stock.name,),
    ),
    Target(
        "busy, against stock",
        Ours.name,
        of("GB/s", lambda f: f.engine == "busy" and f.operation in _MOVES),
        1.0,
        (Stock.name,),
    ),
    Target(
        "load warm, against stock",
        Ours.name,
        of("GB/s", lambda f: f.operation == "load warm" and f.page_bytes >= 512 * _KIB),
        4.0,
        (Stock.name,),
    ),
    Target(
        "long prefix of 128 KiB, store",
        Ours.name,
        of("GB/s", lambda f: _long(f, 128, "store")),
        1.6,
        (Stock.name,),
    ),
    Target(
        "long prefix of 128 KiB, load cold",
        Ours.name,
        of("GB/s", lambda f: _long(f, 128, "load cold")),
        1.4,
        (Stock.name,),
    ),
    Target(
        "long prefix of 2 MiB",
        Ours.name,
        of("GB/s", lambda f: _long(f, 2048, *_MOVES)),
        1.1,
        (Stock.name,),
    ),
    Target(
        "long prefix of 2 MiB, against the device",
        Ours.name,
        of("GB/s", lambda f: _long(f, 2048, *_MOVES)),
        0.9,
        (Raw.name,),
    ),
    Target(
        "2 MiB and more, against the device",
        Ours.name,
        of(
            "GB/s",
            lambda f: f.engine == "idle" and f.operation in _MOVES and f.page_bytes >= 2048 * _KIB,
        ),
        0.9,
        (Raw.name,),
    ),
    Target(
        "lookup, against stock",
        Ours.name,
        of("us/key", lambda f: f.operation == "lookup, repeated"),
        1.0,
        (Stock.name,),
        at_most=True,
    ),
    Target(
        "first lookup, against stock",
        Ours.name,
        of("us/key", lambda f: f.operation in ("lookup, first", "lookup, unknown")),
        1.5,
        (Stock.name,),
        at_most=True,
    ),
    Target(
        "at the budget, against stock's plain store",
        Ours.name,
        of("GB/s", lambda f: f.operation == budget.OPERATION),
        1.0,
        (Stock.name,),
    ),
    Target(
        "start on many files, first look-up",
        Ours.name,
        of("s", lambda f: f.operation.startswith("first look-up")),
        0.1,
        at_most=True,
    ),
    Target(
        "start, index loaded",
        Ours.name,
        of("s", lambda f: f.operation == "index loaded"),
        2.0,
        at_most=True,
    ),
    Target(
        "index memory",
        Ours.name,
        of("bytes/file", lambda f: f.operation == "index"),
        250.0,
        at_most=True,
    ),
)
