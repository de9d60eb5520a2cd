"""Loads of prefixes for the order of eviction: which chunks each request asks for, from its first.

A chunk is named by its prompt and its place in it; requests that share a beginning share chunks.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

SLOTS = 256  # of the tier that the loads are made for
REQUESTS = 400
Chunk = tuple[int, int]
Load = Sequence[Sequence[Chunk]]

_ONCE = 10_000  # prompts from here on are asked for once
_CYCLES = {"5 x 64": (5, 64), "3 x 128": (3, 128), "9 x 32": (9, 32)}
# Prompts in turn whose sum is so many times the tier
_SETS = {"1.1 x tier": (11, 26), "1.5 x tier": (6, 64), "2 x tier": (8, 64)}


def documents(choose: random.Random) -> Load:
    """Questions about 60 documents of 32 chunks, some far more popular than others (Pareto)."""
    return [
        [*_prompt(min(59, int(choose.paretovariate(0.9)) - 1), 32), *_prompt(_ONCE + number, 2)]
        for number in range(REQUESTS)
    ]


def conversations(choose: random.Random) -> Load:
    """24 conversations, asked for at any length of up to 33 chunks."""
    return [_prompt(choose.randrange(24), 3 * choose.randrange(1, 12)) for _ in range(REQUESTS)]


def system_prompts(choose: random.Random) -> Load:
    """Six beginnings of 8 chunks, each time with another end of 24."""
    return [
        [*_prompt(choose.randrange(6), 8), *_prompt(_ONCE + number, 24)]
        for number in range(REQUESTS)
    ]


def in_turn(prompts: int, chunks: int) -> Load:
    """Prompts of so many chunks, asked for one after the other, again and again."""
    return [_prompt(number % prompts, chunks) for number in range(max(40, 8 * prompts))]


def trace(path: Path) -> Load:
    """A trace of one JSON object a line with `hash_ids`, as Mooncake publishes them (FAST 2025)."""
    lines = path.read_text().splitlines()
    return [[(number, 0) for number in json.loads(line)["hash_ids"]] for line in lines]


# Of these stock's LRU or ARC loads much; of the others they load nothing.
MIXED: Mapping[str, Callable[[random.Random], Load]] = {
    "documents": documents,
    "conversations": conversations,
    "system prompts": system_prompts,
}
CYCLES: Mapping[str, tuple[int, int]] = {**_CYCLES, **_SETS}


def fitting(prompts: int, chunks: int) -> float:
    """Share of the chunks of prompts in turn that is loaded by keeping what fits in SLOTS."""
    return SLOTS / (prompts * chunks)


def _prompt(number: int, chunks: int) -> list[Chunk]:
    return [(number, place) for place in range(chunks)]


def chunks_of(load: Iterable[Sequence[Chunk]]) -> int:
    """How many chunks the requests of a load ask for."""
    return sum(map(len, load))
