"""What the figures of the kernels are held against."""

from __future__ import annotations

from collections.abc import Sequence

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
    Result,
)
from kvstrata.kernels.bench.results.targets import Held, Target, of


def _large(result: Result, *operations: str) -> bool:
    return result.case.nbytes >= LARGE_BYTES and result.case.operation in operations


def _at_tp8(result: Result) -> bool:
    return result.case.model == "Llama-3-70B TP8" and _large(result, STORE, LOAD)


TARGETS = (
    Target("staged, of the ceiling", STAGED, of(SHARE, lambda r: _large(r, STORE, LOAD)), 0.95),
    Target("both at once, of the duplex ceiling", OURS, of(SHARE, lambda r: _large(r, BOTH)), 0.9),
    Target(
        "Llama-3-70B TP8 LBNHC, against per-fragment",
        OURS,
        of(SPEED, lambda r: _at_tp8(r) and r.case.layout == "LBNHC"),
        10.0,
        (PER_FRAGMENT,),
    ),
    Target(
        "Llama-3-70B TP8 LBHNC, against per-fragment",
        OURS,
        of(SPEED, lambda r: _at_tp8(r) and r.case.layout == "LBHNC"),
        3.0,
        (PER_FRAGMENT,),
    ),
    Target(
        "Llama-3-8B TP1, against the best baseline",
        OURS,
        of(SPEED, lambda r: r.case.model == "Llama-3-8B TP1" and _large(r, STORE, LOAD)),
        1.0,
        BASELINES,
    ),
    Target(
        "CPU submit at TP8, against per-fragment",
        OURS,
        of(SUBMIT, _at_tp8),
        0.1,
        (PER_FRAGMENT,),
        at_most=True,
    ),
    Target(
        "GEMM beside a transfer",
        OURS,
        of(SLOWDOWN, lambda r: r.case.operation == GEMM),
        1.03,
        at_most=True,
    ),
    Target("host time of a staging slot, us", OURS, of(HOST), 20.0, at_most=True),
    Target("CPU path, of one memcpy", cpu.OURS, of(cpu.RATIO), 0.8),
)


def held(results: Sequence[Result]) -> list[Held]:
    """The results held against the targets; beside no transfer nothing was slowed down."""
    moved = {result[:2] for result in results if result.metric == BESIDE and result.value}
    counted = [r for r in results if r.metric != SLOWDOWN or r[:2] in moved]
    return [target.held(counted) for target in TARGETS]
