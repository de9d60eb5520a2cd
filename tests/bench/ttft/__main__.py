"""`python -m tests.bench.ttft`: time to first token with offload and without.

Two engines answer the same requests, one after the other in random order. The CPU tier is small,
so that what is reused comes from a filesystem tier behind a link that is slower than computing,
as fast, or faster. What a request stores is stored before the next one comes.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from kvstrata.kernels.bench.results.figures import append_csv, machine_line
from kvstrata.kernels.bench.results.tables import print_table
from kvstrata.kernels.bench.results.targets import Held, summary
from tests.bench.ttft.model import ARGUMENTS, TOKEN_BYTES, make_model
from tests.bench.ttft.throttled import ThrottledTier
from tests.bench.ttft.workloads import (
    BATCH_TOKENS,
    CHUNK_BLOCKS,
    CPU_TOKENS,
    GPU_BLOCKS,
    MIDDLE,
    Prompt,
    warm_up,
    workloads,
)
from tests.engine.driver import BLOCK, Engine, connector

# How long the link takes for a token, in the time that computing it takes.
SPEEDS = {"slow": 5.0, "equal": 1.0, "fast": 0.1}
CONTROL = ("none", "")  # link and setting of a second engine without offload: how far noise goes
LATENCY_S = 0.001
LINKS = [*SPEEDS]
ON, OFF = SETTINGS = ["on", "off"]  # load_or_recompute
NEVER_HURTS = 1.03  # the largest median ratio with load_or_recompute on
HEADINGS = [
    "link",
    "load or recompute",
    "workload",
    "TTFT without, ms",
    "with, ms",
    "ratio",
    "cached",
]
_SEED = 5


Answer = dict[str, Any]  # of `Engine.ask`


class Figure(NamedTuple):
    """What a workload did; medians over its requests.

    Attributes:
        link: name of the tier's speed; "none" where two engines without offload are compared.
        load_or_recompute: "on" or "off", or "" without offload.
        workload: its name.
        without_ms, with_ms: TTFT without offload and with it, in milliseconds.
        ratio: median of the requests' TTFT with offload by that without.
        cached: share of the prompt tokens that the engine with offload did not compute.
    """

    link: str
    load_or_recompute: str
    workload: str
    without_ms: float
    with_ms: float
    ratio: float
    cached: float

    @property
    def case(self) -> str:
        """What was measured, in words."""
        return f"{self.workload} ({self.link})"


def start(folder: Path, name: str, offload: dict[str, Any] | None) -> Engine:
    """An engine of the model; `offload` is its `kv_connector_extra_config`, if it has one."""
    return Engine(
        make_model(folder),
        folder / f"{name}.log",
        kv_transfer_config=connector(**offload) if offload else None,
        blocks=GPU_BLOCKS,
        max_model_len=(GPU_BLOCKS - 1) * BLOCK,  # vLLM keeps a block to itself
        max_num_batched_tokens=BATCH_TOKENS,
        **ARGUMENTS,
    )


def offload_config(folder: Path, bytes_per_second: float, setting: str) -> dict[str, Any]:
    """`kv_connector_extra_config` with a filesystem tier behind a link."""
    return {
        "cpu_bytes_to_use": CPU_TOKENS * TOKEN_BYTES,
        "blocks_per_chunk": CHUNK_BLOCKS,
        "load_or_recompute": setting == ON,
        "secondary_tiers": [
            {
                "type": ThrottledTier.__name__,
                "module_path": ThrottledTier.__module__,
                "latency_s": LATENCY_S,
                "bytes_per_second": bytes_per_second,
                "tier": {"type": "fs", "root_dir": str(folder), "max_bytes": "50%"},
            }
        ],
    }


def measure(
    root: Path, links: Sequence[str], settings: Sequence[str], rounds: int
) -> Iterator[Figure]:
    """All figures. One engine without offload is compared with one engine after the other."""
    without = start(root, "without", None)
    try:
        replies = [without.ask(prompt, max_tokens=1) for prompt in warm_up(_SEED)]
        per_token = statistics.median(reply["seconds"] for reply in replies) / MIDDLE
        print(f"computing a token takes {per_token * 1e6:.0f} us", file=sys.stderr)
        cases: list[tuple[str, str, dict[str, Any] | None]] = [(*CONTROL, None)]
        for link, setting in product(links, settings):
            speed = TOKEN_BYTES / (per_token * SPEEDS[link])
            folder = root / f"{link}-{setting}-files"
            cases.append((link, setting, offload_config(folder, speed, setting)))
        for link, setting, offload in cases:
            print(f"measuring: link {link}, load_or_recompute {setting}", file=sys.stderr)
            engine = start(root, f"{link}-{setting}", offload)
            try:
                yield from compare(without, engine, link, setting, rounds)
            finally:
                engine.close()
    finally:
        without.close()


def compare(
    without: Engine, engine: Engine, link: str, setting: str, rounds: int
) -> Iterator[Figure]:
    """The figures of one engine with offload."""
    for prompt in warm_up(_SEED + 1):
        _ask_both(without, engine, prompt)
    for name, prepare, measured in workloads(_SEED, rounds):
        for prompt in prepare:
            _ask_both(without, engine, prompt)
        pairs = [_ask_both(without, engine, prompt) for prompt in measured]
        yield Figure(
            link,
            setting,
            name,
            statistics.median(one["seconds"] for one, _ in pairs) * 1e3,
            statistics.median(other["seconds"] for _, other in pairs) * 1e3,
            statistics.median(other["seconds"] / one["seconds"] for one, other in pairs),
            sum(other["cached"] for _, other in pairs) / sum(map(len, measured)),
        )


def _ask_both(without: Engine, engine: Engine, prompt: Prompt) -> tuple[Answer, Answer]:
    """The replies of both engines to a request, which comes to them in random order."""
    replies = {}
    for one in random.sample((without, engine), 2):
        replies[one] = one.ask(prompt, max_tokens=1)
    return replies[without], replies[engine]


def row(figure: Figure) -> list[str]:
    """A figure's line below HEADINGS."""
    times = [f"{figure.without_ms:.1f}", f"{figure.with_ms:.1f}", f"{figure.ratio:.2f}"]
    return [*figure[:3], *times, f"{figure.cached:.0%}"]


def held(figures: Sequence[Figure]) -> list[Held]:
    """The ratios with load_or_recompute on."""
    values = [(f.ratio, f.case) for f in figures if f.load_or_recompute == ON]
    name = "TTFT with load_or_recompute against without offload"
    return [Held(name, values, NEVER_HURTS, at_most=True)]


def main(
    root: Annotated[Path, typer.Option(help="A directory on the disk for the tier's files.")],
    csv: Annotated[Path | None, typer.Option(help="Append the figures to this file.")] = None,
    link: Annotated[list[str], typer.Option(help="Speeds of the link.")] = LINKS,
    load_or_recompute: Annotated[list[str], typer.Option(help="on, off.")] = SETTINGS,
    rounds: Annotated[int, typer.Option(min=1, help="How often prompts are reused.")] = 3,
) -> None:
    """Measure time to first token with offload against without, in five workloads."""
    for name in {*link} - {*SPEEDS}:
        raise typer.BadParameter(f"{name} is none of {', '.join(SPEEDS)}")
    for name in {*load_or_recompute} - {ON, OFF}:
        raise typer.BadParameter(f"{name} is none of {ON}, {OFF}")
    print(machine_line())
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.resolve()) as directory:
        figures = list(measure(Path(directory), link, load_or_recompute, rounds))
    print_table([HEADINGS, *map(row, figures)], 3)
    if csv:
        append_csv(csv, figures)
    print(summary(held(figures)))


if __name__ == "__main__":
    typer.run(main)
