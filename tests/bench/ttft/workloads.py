"""The five workloads: which prompts an engine has seen before it is asked, and in which order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from tests.bench.ttft.model import VOCABULARY
from tests.engine.driver import BLOCK

CHUNK_BLOCKS = 4
BATCH_TOKENS = 256  # of a step: most prompts take several
LONG, MIDDLE, SHORT = 2048, 1024, 160  # tokens; SHORT is a chunk and a bit
# One long prompt fits into GPU memory, and two do not.
GPU_BLOCKS = LONG // BLOCK + 8
# A long prompt fits into the half of the CPU tier that promotions may take. Each workload's
# prompts together do not fit, so what is asked for in turn has always left it.
CPU_TOKENS = 2 * LONG + 4 * CHUNK_BLOCKS * BLOCK

Prompt = Sequence[int]


class Workload(NamedTuple):
    """Prompts to ask for: first those that prepare, then those that are measured."""

    name: str
    prepare: list[Prompt]
    measured: list[Prompt]


def workloads(seed: int, rounds: int) -> list[Workload]:
    """The workloads by name; the measured prompts of the reused ones come `rounds` times."""
    choose = random.Random(seed)

    def prompts(count: int, tokens: int) -> list[Prompt]:
        return [choose.choices(range(2, VOCABULARY), k=tokens) for _ in range(count)]

    middle, short, long = prompts(6, MIDDLE), prompts(48, SHORT), prompts(3, LONG)
    starts = [prompt[: MIDDLE // 2] for prompt in prompts(10, MIDDLE)]
    halves: list[Prompt] = [
        [*start, *end]
        for _ in range(rounds)
        for start, end in zip(starts, prompts(len(starts), MIDDLE // 2), strict=True)
    ]
    return [
        Workload("no reuse", [], prompts(6 * rounds, MIDDLE)),
        Workload("full reuse", middle, middle * rounds),
        Workload("half reuse", starts, halves),
        Workload("many short", short, short * rounds),
        Workload("few long", long, long * rounds),
    ]


def warm_up(seed: int) -> list[Prompt]:
    """From these an engine learns what its prefill and its tier cost."""
    choose = random.Random(seed)
    new = [choose.choices(range(2, VOCABULARY), k=MIDDLE) for _ in range(12)]
    return [*new, *new[:6]]
