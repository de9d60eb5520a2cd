"""The curves of a sweep as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from kvstrata.offload.simulate.results import Result
from kvstrata.tiers.options import ConfigError

_GIB = 2**30


def draw(results: Sequence[Result], path: str) -> None:
    """Hit rate and p90 of TTFT by the size of the CPU tier, a line for each size of the fs tier and
    each policy.

    Raises:
        ConfigError: matplotlib is missing, or the file's name says no form that it knows.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "--chart: matplotlib is not installed; pip install 'kvstrata[tools]'"
        ) from None
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
    try:
        picture.savefig(path)
    except ValueError as error:
        raise ConfigError(f"--chart: {path!r}: {error}") from None
