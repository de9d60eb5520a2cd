"""What prefilling apart changes for those who wait, against prefilling on the decoder.

While one answer is running, new prompts are asked one after another, first of the decoder itself
and then through the proxy, in turn. Only ratios are printed: they are of one run on one machine.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import string
import time
from collections.abc import AsyncIterator
from contextlib import suppress

import aiohttp
from rich.console import Console
from rich.table import Table

ROUNDS = 4


async def tokens(
    session: aiohttp.ClientSession, url: str, model: str, prompt: str, max_tokens: int
) -> AsyncIterator[float]:
    """When each token of an answer came, in seconds from when it was asked for."""
    asked = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    started = time.perf_counter()
    async with session.post(
        f"{url}/v1/completions", json={**asked, "stream": True, "ignore_eos": True}
    ) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                yield time.perf_counter() - started


class Contestant:
    """One of the two ways, and what was measured of it, in seconds."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.first_tokens: list[float] = []  # of each prompt
        self.gaps: list[float] = []  # between tokens of the running answer

    async def measure(self, session: aiohttp.ClientSession, given: argparse.Namespace) -> None:
        """Ask a round of new prompts."""
        running = asyncio.create_task(self._run(session, given))
        before = len(self.gaps)
        while len(self.gaps) == before and not running.done():
            await asyncio.sleep(0.05)
        for _ in range(given.prompts):
            prompt = text(given.characters)
            async for first in tokens(session, self.url, given.model, prompt, 1):
                self.first_tokens.append(first)
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    async def _run(self, session: aiohttp.ClientSession, given: argparse.Namespace) -> None:
        while True:
            last = None
            async for at in tokens(session, self.url, given.model, text(32), given.tokens):
                if last is not None:
                    self.gaps.append(at - last)
                last = at


def text(characters: int) -> str:
    """One that nobody has asked before."""
    return "".join(random.choices(string.ascii_lowercase + " ", k=characters))


def table(apart: Contestant, together: Contestant) -> Table:
    """Ratios of the two."""
    found = Table("", "on the decoder", "apart")

    def add(name: str, here: float, there: float) -> None:
        found.add_row(name, "1.00", f"{there / here:.2f}")

    medians = [statistics.median(each.first_tokens) for each in (together, apart)]
    add("time to first token, median", *medians)
    add("time between tokens of a running answer, mean", *map(mean_gap, (together, apart)))
    add("the longest, 99 of 100 are shorter", *map(long_gap, (together, apart)))
    return found


def mean_gap(each: Contestant) -> float:
    """In seconds."""
    return statistics.fmean(each.gaps)


def long_gap(each: Contestant) -> float:
    """In seconds; one of a hundred is longer."""
    return sorted(each.gaps)[int(0.99 * len(each.gaps))]


async def main() -> None:
    """Measure both, in turn."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--proxy", default="http://127.0.0.1:8000")
    parser.add_argument("--decode", default="http://127.0.0.1:8200")
    parser.add_argument("--model", required=True, help="its name, as the servers have it")
    parser.add_argument("--prompts", type=int, default=8, help="in each of four rounds")
    parser.add_argument("--characters", type=int, default=8000, help="of each prompt")
    parser.add_argument("--tokens", type=int, default=256, help="of each running answer")
    given = parser.parse_args()
    apart, together = Contestant(given.proxy), Contestant(given.decode)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        for _ in range(ROUNDS):
            for each in (together, apart):
                await each.measure(session, given)
    Console().print(table(apart, together))


if __name__ == "__main__":
    asyncio.run(main())
