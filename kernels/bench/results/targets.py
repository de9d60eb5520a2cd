"""Targets of any benchmark: what its figures are held against, and which were met.

A figure is a named tuple with a `contestant`, a `case` that reads as words, and a `value`. Two that
differ in contestant and value alone say the same of two contestants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

_SHOWN = 8  # of the cases that missed a target


class Held(NamedTuple):
    """What was measured of a target.

    name: what it is called in the summary.
    values: each with its case in words.
    bound: what they must reach, or with `at_most` not exceed.
    """

    name: str
    values: Sequence[tuple[float, str]]
    bound: float
    at_most: bool = False


class Target(NamedTuple):
    """A bound for some figures of a contestant.

    name, bound, at_most: see `Held`.
    applies: to which of its figures.
    against: whose largest value they are divided by; empty: they count as they are.
    """

    name: str
    contestant: str
    applies: Callable[[Any], bool]
    bound: float
    against: tuple[str, ...] = ()
    at_most: bool = False

    def held(self, figures: Sequence[Any]) -> Held:
        """What the figures say of it."""
        mine = {f: f.value for f in figures if f.contestant == self.contestant}
        if self.against:
            mine = ratios(figures, self.contestant, *self.against)
        values = [(value, str(f.case)) for f, value in mine.items() if self.applies(f)]
        return Held(self.name, values, self.bound, self.at_most)


def of(metric: str, applies: Callable[[Any], bool] = lambda figure: True) -> Callable[[Any], bool]:
    """What a target applies to: figures of one metric, all of them or some."""
    return lambda figure: figure.metric == metric and applies(figure)


def ratios(figures: Sequence[Any], contestant: str, *others: str) -> dict[Any, float]:
    """The contestant's figures, each by the others' largest for the same, where that is not 0."""
    largest: dict[Any, float] = {}
    for figure in figures:
        if figure.contestant in others:
            same = figure._replace(contestant=contestant, value=0.0)
            largest[same] = max(figure.value, largest.get(same, 0.0))
    found = {}
    for figure in figures:
        by = largest.get(figure._replace(value=0.0))
        if figure.contestant == contestant and by:
            found[figure] = figure.value / by
    return found


def summary(targets: Iterable[Held]) -> str:
    """The targets met, missed and not measured, in one line."""
    words: dict[str, list[str]] = {"met": [], "missed": [], "not measured": []}
    for held in targets:
        verdict, detail = _judge(held)
        words[verdict].append(f"{held.name}{detail}")
    parts = [f"{len(names)} {word} ({'; '.join(names)})" for word, names in words.items() if names]
    return f"targets: {', '.join(parts)}"


def _judge(held: Held) -> tuple[str, str]:
    if not held.values:
        return "not measured", ""
    _, values, bound, at_most = held
    sign = "<=" if at_most else ">="
    found = sorted(values, reverse=at_most)  # the worst first
    missed = [(v, c) for v, c in found if (v > bound if at_most else v < bound)]
    if not missed:
        cases = f"{len(found)} case" + "s" * (len(found) > 1)
        return "met", f": {found[0][0]:.2f} {sign} {bound:g}, the worst of {cases}"
    worst = "; ".join(f"{value:.2f} {case}" for value, case in missed[:_SHOWN])
    return "missed", f" {sign} {bound:g} in {len(missed)} of {len(found)}, worst: {worst}"
