"""File hits in a row on one server: how long each takes to its first token, and whether it comes.

Run it with `make bench-file-hits HITS=1000`. Three prompts are asked in turn; before each round the
GPU cache and the CPU tier are emptied, so that every answer needs files. It prints the distribution
and exits 0 only if no hit was lost. That p99 is at most twice the median is a target, not a test.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import sys
import time
import urllib.request
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.progress import track
from server import BLOCK_SIZE, Answer, Server, kv_transfer_config, serve_args
from smollm2 import smollm2

from kvstrata.kernels.bench.results.figures import append_csv, machine_line

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
MODEL = CACHE / "smollm2-135m"
KV_DIR = CACHE / "file-hits-kv"

WORDS = (ROOT / "LICENSE").read_text().split()
PROMPTS = 3
PROMPT_WORDS = 1100  # about 1,900 tokens
MIN_SERVED = 0.9  # share of the prompt that a hit must serve
FILES_DEADLINE_S = 120
MOST_P99 = 2.0  # times the median

console = Console(highlight=False)


class Figure(NamedTuple):
    """Time to first token of so many file hits, in milliseconds; `lost` served too little."""

    hits: int
    lost: int
    computed_ms: float
    median_ms: float
    p99_ms: float
    worst_ms: float


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


def wait_for_files(cold: list[Answer]) -> None:
    """Wait until every full block of the prompts has its file."""
    wanted = sum((answer.prompt_tokens - 1) // BLOCK_SIZE for answer in cold)
    deadline = time.monotonic() + FILES_DEADLINE_S
    while (found := sum(1 for _ in KV_DIR.rglob("*.safetensors"))) < wanted:
        if time.monotonic() > deadline:
            raise RuntimeError(f"only {found} of {wanted} pages were written to {KV_DIR}")
        time.sleep(0.2)


def measure(server: Server, hits: int) -> Figure:
    """Ask for so many file hits, in rounds of `PROMPTS`."""
    server.ask("Hello!", max_tokens=1)  # the first request pays for more than its prompt
    texts = [prompt(number) for number in range(PROMPTS)]
    cold = [server.ask(text, max_tokens=1) for text in texts]
    wait_for_files(cold)
    times: list[float] = []
    lost = 0
    for _ in track(range(-(-hits // PROMPTS)), "asking", console=console, transient=True):
        empty_caches(server)
        for text, first in zip(texts, cold, strict=True):
            answer = server.ask(text, max_tokens=1)
            if answer.token_ids != first.token_ids:
                raise RuntimeError(f"a file hit was answered {answer.text!r}, not {first.text!r}")
            if not is_hit(answer):
                lost += 1
                console.print(f"lost: {answer.cached_tokens} of {answer.prompt_tokens} tokens")
            times.append(1e3 * answer.ttft_s)
    times.sort()
    return Figure(
        len(times),
        lost,
        1e3 * statistics.median(answer.ttft_s for answer in cold),
        statistics.median(times),
        times[int(0.99 * len(times))],
        times[-1],
    )


def main(
    hits: Annotated[int, typer.Option(min=PROMPTS, help="How many file hits.")] = 1000,
    csv: Annotated[Path | None, typer.Option(help="Append the figures to this file.")] = None,
) -> None:
    """Measure the time to first token of file hits in a row."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server is stopped
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # vLLM's endpoint that empties the caches
    shutil.rmtree(KV_DIR, ignore_errors=True)
    smollm2(MODEL)
    log = CACHE / "file-hits.log"
    arguments = serve_args(max_model_len=2560)
    server = Server(
        MODEL, kv_transfer_config("1GiB", type="fs", root_dir=str(KV_DIR)), arguments, log
    )
    try:
        server.wait_until_ready()
        figure = measure(server, hits)
    finally:
        server.stop()
        shutil.rmtree(KV_DIR, ignore_errors=True)
    console.print(machine_line())
    for name, value in figure._asdict().items():
        console.print(f"{name:12} {value:>10,.0f}")
    ratio = figure.p99_ms / figure.median_ms
    met = "met" if ratio <= MOST_P99 else "missed"
    console.print(f"target: p99 at most {MOST_P99:g} times the median: {met}, {ratio:.2f}")
    if csv:
        append_csv(csv, [figure])
    raise typer.Exit(figure.lost > 0)


if __name__ == "__main__":
    typer.run(main)
