"""What a benchmark finds: figures, one per line of the CSV file."""

import csv
import os
import platform
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from importlib import metadata
from pathlib import Path

import torch

from kvstrata.kernels.gpu.device import cuda


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
        "gpu": cuda.get_device_name() if cuda.is_available() else "none",
        "driver": _driver(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "kvstrata": _version("kvstrata"),
        "vllm": _version("vllm"),
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


def _version(package: str) -> str:
    """Of an installed package; a checkout on the path is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    """Version of NVIDIA's kernel module."""
    try:
        line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except OSError:
        return "none"
    return next((word for word in line.split() if word[0].isdigit()), line)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()
