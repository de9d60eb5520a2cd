"""`python -m tests.bench.fs --root DIR`: this tier, stock vLLM's and the device.

All move the same pages between the same shared memory and the same disk, in turns, so that a
device whose speed drifts treats them alike. "busy" means that a Python thread spins in the
calling process, as vLLM's engine does. All figures are medians.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from kvstrata.kernels.bench.results.figures import append_csv, machine_line
from kvstrata.kernels.bench.results.tables import print_table
from kvstrata.kernels.bench.results.targets import summary
from tests.bench.fs import budget, lookups, starting, transfers
from tests.bench.fs.contestants import has_stock
from tests.bench.fs.figures import Figure
from tests.bench.fs.report import plot, rows
from tests.bench.fs.targets import TARGETS

SIZES_KIB = [128, 512, 2048, 5120]


def measure(root: Path, sizes_kib: list[int], repeat: int, files: int) -> Iterator[Figure]:
    """All figures. A case is a function that yields its figures."""
    for kib in sizes_kib:
        yield from transfers.measure(root / f"{kib}k", kib * 1024, repeat)
    yield from lookups.measure_time(root / "lookups", repeat)
    yield from lookups.measure_memory()
    yield from budget.measure(root / "budget", repeat)
    if files:
        yield from starting.measure(root / "starting", files)


def main(
    root: Annotated[Path, typer.Option(help="A directory on the disk to measure.")],
    csv: Annotated[Path | None, typer.Option(help="Append the figures to this file.")] = None,
    picture: Annotated[
        Path | None, typer.Option("--plot", help="Draw them into this file; needs matplotlib.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds of each case.")] = 5,
    files: Annotated[
        int, typer.Option(min=0, help="In a directory to start on; 0 leaves that out.")
    ] = 1_000_000,
    kib: Annotated[list[int], typer.Option(min=4, help="Page sizes.")] = SIZES_KIB,
) -> None:
    """Measure the filesystem tier against stock vLLM's and against the device."""
    print(machine_line())
    if not has_stock():
        print("stock vLLM is not installed: measuring against the device only")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.resolve()) as directory:
        figures = list(measure(Path(directory), kib, repeat, files))
    print_table([*rows(figures)], 2)
    if csv:
        append_csv(csv, figures)
    if picture:
        plot(figures, picture)
    print(summary(target.held(figures) for target in TARGETS))


if __name__ == "__main__":
    typer.run(main)
