"""Figures as sentences have them."""

from __future__ import annotations

from collections.abc import Mapping


def span(seconds: float) -> str:
    """`90 s`, `1.5 h`, `-3 ms`."""
    if seconds < 0:
        return f"-{span(-seconds)}"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def count(number: float) -> str:
    """`12,345`."""
    return f"{number:,.0f}"


def share(part: float, whole: float) -> str:
    """`12.5 %`."""
    return f"{100 * part / whole:.3g} %" if whole else "0 %"


def causes(numbers: Mapping[str, float]) -> str:
    """`io-error 12, budget 3`: the largest first, three at most."""
    return ", ".join(f"{name} {count(n)}" for name, n in list(numbers.items())[:3] if n)
