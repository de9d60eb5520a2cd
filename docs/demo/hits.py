"""Hits of a tier in a row on one server: whether each comes, and how long its first token takes.

Run it with `make bench-hits HITS=1000 TIER=fs`. Three prompts are asked in turn; before each round
the GPU cache and the CPU tier are emptied, so that every answer needs the tier. It prints the
distribution and exits 0 only if no hit was lost. That p99 is at most twice the median is a target,
not a test.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import sys
import threading
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple

import typer
from media import TIERS
from rich.console import Console
from rich.progress import track
from server import BLOCK_SIZE, Answer, Server, kv_transfer_config, serve_args, serving
from smollm2 import smollm2

from kvstrata.kernels.bench.results.figures import append_csv, machine_line

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
MODEL = CACHE / "smollm2-135m"

WORDS = (ROOT / "LICENSE").read_text().split()
PROMPTS = 3
PROMPT_WORDS = 1100  # about 1,900 tokens
MIN_SERVED = 0.9  # share of the prompt that a hit must serve
STORED_DEADLINE_S = 120
MOST_P99 = 2.0  # times the median

console = Console(highlight=False)


class Figure(NamedTuple):
    """Time to first token of so many hits of a tier, in ms; `lost` served too little."""

    tier: str
    hits: int
    lost: int
    computed_ms: float
    median_ms: float
    p99_ms: float
    worst_ms: float
    stood_still_ms: float  # the longest time in which the whole machine did nothing


class StandStill(threading.Thread):
    """Sees for how long the whole machine does nothing, as virtual ones do."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.longest_s = 0.0

    def run(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(0.01)
            now = time.monotonic()
            self.longest_s, last = max(self.longest_s, now - last), now


def prompt(number: int) -> str:
    """One of the texts; they share no prefix."""
    choose = random.Random(number)
    return f"Text {number}: " + " ".join(choose.choices(WORDS, k=PROMPT_WORDS))


def is_hit(answer: Answer) -> bool:
    """Whether nearly all of the prompt came from a cache."""
    return answer.cached_tokens >= MIN_SERVED * answer.prompt_tokens


def empty_caches(server: Server) -> None:
    """Empty the GPU cache and the CPU tier; the files stay."""
    url = f"http://127.0.0.1:{server.port}/reset_prefix_cache?reset_external=true"
    urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=60).close()


def wait_until_stored(server: Server, cold: list[Answer]) -> None:
    """Wait until every full block of the prompts is in the tier."""
    wanted = sum((answer.prompt_tokens - 1) // BLOCK_SIZE for answer in cold)
    deadline = time.monotonic() + STORED_DEADLINE_S
    while (found := server.tier_pages("cascaded_pages")) < wanted:
        if time.monotonic() > deadline:
            raise RuntimeError(f"only {found} of {wanted} pages were stored; see {server.log}")
        time.sleep(0.2)


def measure(server: Server, tier: str, hits: int) -> Figure:
    """Ask for so many hits of the tier, in rounds of `PROMPTS`."""
    server.ask("Hello!", max_tokens=1)  # the first request pays for more than its prompt
    texts = [prompt(number) for number in range(PROMPTS)]
    cold = [server.ask(text, max_tokens=1) for text in texts]
    wait_until_stored(server, cold)
    times: list[float] = []
    lost = 0
    still = StandStill()
    still.start()
    for _ in track(range(-(-hits // PROMPTS)), "asking", console=console, transient=True):
        empty_caches(server)
        for text, first in zip(texts, cold, strict=True):
            answer = server.ask(text, max_tokens=1)
            if answer.token_ids != first.token_ids:
                raise RuntimeError(f"a hit was answered {answer.text!r}, not {first.text!r}")
            if not is_hit(answer):
                lost += 1
                console.print(f"lost: {answer.cached_tokens} of {answer.prompt_tokens} tokens")
            times.append(1e3 * answer.ttft_s)
    times.sort()
    return Figure(
        tier,
        len(times),
        lost,
        1e3 * statistics.median(answer.ttft_s for answer in cold),
        statistics.median(times),
        times[int(0.99 * len(times))],
        times[-1],
        1e3 * still.longest_s,
    )


def main(
    tier: Annotated[str, typer.Option(help=f"Of which type: {', '.join(TIERS)}.")] = "fs",
    hits: Annotated[int, typer.Option(min=PROMPTS, help="How many hits.")] = 1000,
    csv: Annotated[Path | None, typer.Option(help="Append the figures to this file.")] = None,
) -> None:
    """Measure the time to first token of hits in a row."""
    if tier not in TIERS:
        raise typer.BadParameter(f"{tier!r} is none of {', '.join(TIERS)}", param_hint="--tier")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server is stopped
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # vLLM's endpoint that empties the caches
    smollm2(MODEL)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="hits-", dir=CACHE)))
        options = stack.enter_context(TIERS[tier](folder))
        config = kv_transfer_config("1GiB", type=tier, **options)
        arguments = serve_args(max_model_len=2560)
        server = stack.enter_context(serving(MODEL, config, arguments, CACHE / "hits.log"))
        figure = measure(server, tier, hits)
    console.print(machine_line())
    for name, value in figure._asdict().items():
        console.print(f"{name:14} {value if name == 'tier' else format(value, ',.0f'):>10}")
    ratio = figure.p99_ms / figure.median_ms
    met = "met" if ratio <= MOST_P99 else "missed"
    console.print(f"target: p99 at most {MOST_P99:g} times the median: {met}, {ratio:.2f}")
    if csv:
        append_csv(csv, [figure])
    raise typer.Exit(figure.lost > 0)


if __name__ == "__main__":
    typer.run(main)
