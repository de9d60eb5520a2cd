"""The targets that the figures are held against, and which of them were met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvstrata.kernels.bench import cpu
from kvstrata.kernels.bench.neighbours import GEMM
from kvstrata.kernels.bench.results.cases import (
    BASELINES,
    BESIDE,
    BOTH,
    HOST,
    LARGE_BYTES,
    LOAD,
    OURS,
    PER_FRAGMENT,
    SHARE,
    SLOWDOWN,
    SPEED,
    STAGED,
    STORE,
    SUBMIT,
    Case,
    Result,
)

_SHOWN = 3  # of the cases that missed a target


class Target(NamedTuple):
    """A bound for some results.

    name: what it is called in the summary.
    contestant, metric, applies: whose results, and in which cases.
    bound: what they must reach, or with `at_most` not exceed.
    against: whose best value they are divided by; empty: they count as they are.
    """

    name: str
    contestant: str
    metric: str
    applies: Callable[[Case], bool]
    bound: float
    against: tuple[str, ...] = ()
    at_most: bool = False


def _large(case: Case, *operations: str) -> bool:
    return case.nbytes >= LARGE_BYTES and case.operation in operations


def _at_tp8(case: Case) -> bool:
    return case.model == "Llama-3-70B TP8" and _large(case, STORE, LOAD)


TARGETS = (
    Target("staged, of the ceiling", STAGED, SHARE, lambda c: _large(c, STORE, LOAD), 0.95),
    Target("both at once, of the duplex ceiling", OURS, SHARE, lambda c: _large(c, BOTH), 0.9),
    Target(
        "Llama-3-70B TP8 LBNHC, against per-fragment",
        OURS,
        SPEED,
        lambda c: _at_tp8(c) and c.layout == "LBNHC",
        10.0,
        (PER_FRAGMENT,),
    ),
    Target(
        "Llama-3-70B TP8 LBHNC, against per-fragment",
        OURS,
        SPEED,
        lambda c: _at_tp8(c) and c.layout == "LBHNC",
        3.0,
        (PER_FRAGMENT,),
    ),
    Target(
        "Llama-3-8B TP1, against the best baseline",
        OURS,
        SPEED,
        lambda c: c.model == "Llama-3-8B TP1" and _large(c, STORE, LOAD),
        1.0,
        BASELINES,
    ),
    Target(
        "CPU submit at TP8, against per-fragment",
        OURS,
        SUBMIT,
        _at_tp8,
        0.1,
        (PER_FRAGMENT,),
        at_most=True,
    ),
    Target(
        "GEMM beside a transfer", OURS, SLOWDOWN, lambda c: c.operation == GEMM, 1.03, at_most=True
    ),
    Target("host time of a staging slot, us", OURS, HOST, lambda c: True, 20.0, at_most=True),
    Target("CPU path, of one memcpy", cpu.OURS, cpu.RATIO, lambda c: True, 0.8),
)


def summary(results: Sequence[Result]) -> str:
    """The targets met, missed and not measurable here, in one line."""
    words: dict[str, list[str]] = {"met": [], "missed": [], "not measurable here": []}
    values = {result[:3]: result.value for result in results}
    for target in TARGETS:
        verdict, detail = _judge(target, values)
        words[verdict].append(f"{target.name}{detail}")
    parts = [f"{len(names)} {word} ({'; '.join(names)})" for word, names in words.items() if names]
    return f"targets: {', '.join(parts)}"


def _judge(target: Target, values: dict[tuple[Case, str, str], float]) -> tuple[str, str]:
    found = []
    for (case, contestant, metric), value in values.items():
        ours = (contestant, metric) == (target.contestant, target.metric)
        if not ours or not target.applies(case):
            continue
        if metric == SLOWDOWN and not values.get((case, contestant, BESIDE), 0.0):
            continue  # there was no transfer
        if target.against:
            others = [values.get((case, other, metric), 0.0) for other in target.against]
            if not any(others):
                continue
            value /= max(others)
        found.append((value, str(case)))
    if not found:
        return "not measurable here", ""
    sign = "<=" if target.at_most else ">="
    found.sort(reverse=target.at_most)  # the worst first
    missed = [
        (v, c) for v, c in found if (v > target.bound if target.at_most else v < target.bound)
    ]
    if not missed:
        cases = f"{len(found)} case" + "s" * (len(found) > 1)
        return "met", f": {found[0][0]:.2f} {sign} {target.bound:g}, the worst of {cases}"
    worst = "; ".join(f"{value:.2f} {case}" for value, case in missed[:_SHOWN])
    return "missed", f" {sign} {target.bound:g} in {len(missed)} of {len(found)}, worst: {worst}"
