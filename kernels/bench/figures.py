"""What a benchmark finds: figures, one per line of the CSV file."""

import csv
import os
import platform
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from importlib import metadata
from pathlib import Path

import torch


@dataclass(frozen=True)
class Figure:
    """One number, the median of its repetitions.

    case: what was moved, in words.
    contestant: who moved it.
    metric, value, unit: what was measured; "ratio" has the unit "".
    """

    case: str
    contestant: str
    metric: str
    value: float
    unit: str


def machine() -> dict[str, str]:
    """What the figures depend on besides kvstrata; in front of each line of the CSV file."""
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": metadata.version("numpy"),
        "kvstrata": metadata.version("kvstrata"),
    }


def append_csv(path: Path, figures: Iterable[Figure]) -> None:
    """Append the figures to the file, which begins with a line of names."""
    here = machine()
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow((*here, *(field.name for field in fields(Figure))))
        writer.writerows((*here.values(), *astuple(figure)) for figure in figures)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()
