"""`python -m tests.bench.tiers --root DIR`: each tier against its client's own loop.

Both move the same pages between the same shared memory and the same medium, with as many threads
in as many processes, in turns. The loop knows no header, checksum, jobs or engine: it is what
would be left if kvstrata cost nothing. All figures are medians.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import pytest
import typer

from kvstrata.kernels.bench.results.figures import append_csv, machine_line
from kvstrata.kernels.bench.results.tables import print_table
from kvstrata.kernels.bench.results.targets import summary
from tests.bench.fs.figures import Figure
from tests.bench.tiers.measure import measure
from tests.bench.tiers.media import MEDIA
from tests.bench.tiers.report import rows
from tests.bench.tiers.targets import TARGETS

SIZES_KIB = [512, 2048, 5120]
ALL = list(MEDIA)


def main(
    root: Annotated[Path, typer.Option(help="A directory on the disk to measure.")],
    tier: Annotated[list[str], typer.Option(help="Which tiers.")] = ALL,
    csv: Annotated[Path | None, typer.Option(help="Append the figures to this file.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds of each case.")] = 7,
    kib: Annotated[list[int], typer.Option(min=4, help="Page sizes.")] = SIZES_KIB,
) -> None:
    """Measure each tier against its client's own loop."""
    print(machine_line())
    root.mkdir(parents=True, exist_ok=True)
    figures: list[Figure] = []
    for name in tier:
        folder = tempfile.TemporaryDirectory(dir=root.resolve())
        try:
            with folder as directory, MEDIA[name](Path(directory)) as medium:
                for each in kib:
                    figures += measure(name, medium, each * 1024, repeat)
        except pytest.skip.Exception as skipped:
            print(f"{name} is not measured: {skipped}")
    print_table([*rows(figures)], 2)
    if csv:
        append_csv(csv, figures)
    print(summary(target.held(figures) for target in TARGETS))


if __name__ == "__main__":
    typer.run(main)
