"""What the figures of the kernels are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
from kvstrata.kernels.bench.results.targets import Held, Target


def _target(
    name: str,
    contestant: str,
    metric: str,
    applies: Callable[[Case], bool],
    bound: float,
    against: tuple[str, ...] = (),
    at_most: bool = False,
) -> Target:
    """A target of one metric, in the cases to which it applies."""

    def of(result: Result) -> bool:
        return result.metric == metric and applies(result.case)

    return Target(name, contestant, of, bound, against, at_most)


def _large(case: Case, *operations: str) -> bool:
    return case.nbytes >= LARGE_BYTES and case.operation in operations


def _at_tp8(case: Case) -> bool:
    return case.model == "Llama-3-70B TP8" and _large(case, STORE, LOAD)


TARGETS = (
    _target("staged, of the ceiling", STAGED, SHARE, lambda c: _large(c, STORE, LOAD), 0.95),
    _target("both at once, of the duplex ceiling", OURS, SHARE, lambda c: _large(c, BOTH), 0.9),
    _target(
        "Llama-3-70B TP8 LBNHC, against per-fragment",
        OURS,
        SPEED,
        lambda c: _at_tp8(c) and c.layout == "LBNHC",
        10.0,
        (PER_FRAGMENT,),
    ),
    _target(
        "Llama-3-70B TP8 LBHNC, against per-fragment",
        OURS,
        SPEED,
        lambda c: _at_tp8(c) and c.layout == "LBHNC",
        3.0,
        (PER_FRAGMENT,),
    ),
    _target(
        "Llama-3-8B TP1, against the best baseline",
        OURS,
        SPEED,
        lambda c: c.model == "Llama-3-8B TP1" and _large(c, STORE, LOAD),
        1.0,
        BASELINES,
    ),
    _target(
        "CPU submit at TP8, against per-fragment",
        OURS,
        SUBMIT,
        _at_tp8,
        0.1,
        (PER_FRAGMENT,),
        at_most=True,
    ),
    _target(
        "GEMM beside a transfer", OURS, SLOWDOWN, lambda c: c.operation == GEMM, 1.03, at_most=True
    ),
    _target("host time of a staging slot, us", OURS, HOST, lambda c: True, 20.0, at_most=True),
    _target("CPU path, of one memcpy", cpu.OURS, cpu.RATIO, lambda c: True, 0.8),
)


def held(results: Sequence[Result]) -> list[Held]:
    """The results held against the targets; beside no transfer nothing was slowed down."""
    moved = {result[:2] for result in results if result.metric == BESIDE and result.value}
    counted = [r for r in results if r.metric != SLOWDOWN or r[:2] in moved]
    return [target.held(counted) for target in TARGETS]
