"""The curves of a sweep as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence

from kvstrata.offload.simulate.results import Result
from kvstrata.tiers.options import ConfigError, WrongValue

_GIB = 2**30


def check(path: str) -> None:
    """That curves can be drawn to this file.

    Raises:
        ConfigError: matplotlib is missing, the file's name says no form that it knows, or the file
            cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "--chart: matplotlib is not installed; pip install 'kvstrata[tools]'"
        ) from None
    known = Figure().canvas.get_supported_filetypes()
    if os.path.splitext(path)[1][1:].lower() not in known:
        raise WrongValue("--chart", path, f"a file that ends in one of {', '.join(known)}")
    # of a file that exists its own permissions count, of a new one the directory's
    directory = os.path.dirname(path) or "."
    if not os.path.isdir(directory) or os.path.isdir(path):
        raise WrongValue("--chart", path, "a file in a directory that exists")
    if not os.access(path if os.path.exists(path) else directory, os.W_OK):
        raise WrongValue("--chart", path, "a file that you may write")


def draw(results: Sequence[Result], path: str) -> None:
    """Hit rate and p90 of TTFT by the size of the CPU tier, a line for each size of the fs tier and
    each policy.

    Args:
        results: of a sweep.
        path: of the picture, as `check` takes it.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    lines: dict[str, list[Result]] = {}
    for result in results:
        _, _, rest = result.name.partition(", ")
        lines.setdefault(rest, []).append(result)
    picture = Figure(figsize=(10, 4), layout="constrained")
    rates, times = picture.subplots(1, 2)
    for name, points in lines.items():
        points = sorted(points, key=lambda result: result.setup.config.cpu_bytes)
        at = [point.setup.config.cpu_bytes / _GIB for point in points]
        rates.plot(at, [100 * point.hit_rate for point in points], marker="o", label=name)
        if points[0].ttft:
            times.plot(at, [point.ttft[90] for point in points], marker="o", label=name)
    for axes, title in ((rates, "tokens found, %"), (times, "p90 of TTFT, s")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("CPU tier, GiB")
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    rates.legend(fontsize="small")
    picture.savefig(path)
