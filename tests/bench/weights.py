"""`python -m tests.bench.weights MODEL`: what a start pays for the weights' name.

The first start reads every byte of the weight files, the second remembers. The memory of the
user's cache directory is neither used nor changed.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from kvstrata.offload.vllm_plugin.weights.content import (
    find_digests,
    read_digests,
    share,
    threads_for,
)
from kvstrata.offload.vllm_plugin.weights.memory import DigestMemory
from kvstrata.offload.vllm_plugin.weights.source import WeightSource


def start(source: WeightSource, memory: DigestMemory) -> tuple[int, int, float]:
    """(bytes of the weights, bytes that were read, seconds) of one start of one process."""
    began = time.perf_counter()
    source.state()
    found = find_digests([path for _, path in source.files()], memory)
    [unread] = share(found, 1)
    read_digests(unread, found, memory, threads_for(1))
    seconds = time.perf_counter() - began
    read = sum(found[path].identity.size for path in unread)
    return sum(file.identity.size for file in found.values()), read, seconds


def main(
    model: Annotated[Path, typer.Argument(help="a model's directory or file", exists=True)],
    load_format: Annotated[str, typer.Option(help="as vLLM's")] = "auto",
) -> None:
    """Print bytes and seconds of a first and a second start."""
    source = WeightSource(str(model), None, None, load_format)
    with tempfile.TemporaryDirectory() as folder:
        memory = DigestMemory(folder)
        for name in ("first", "second"):
            total, read, seconds = start(source, memory)
            typer.echo(
                f"{name} start: {total / 1e9:.1f} GB of weights, {read / 1e9:.1f} GB read "
                f"in {seconds:.3f} s"
            )


if __name__ == "__main__":
    typer.run(main)
