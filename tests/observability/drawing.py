"""Panels as matplotlib draws them: stand-ins for Grafana's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

SCRAPE_S = 5  # between two values of a line
PREFIXES = {
    "bytes": (1024, ("B", "KiB", "MiB", "GiB", "TiB")),
    "Bps": (1000, ("B/s", "kB/s", "MB/s", "GB/s")),
}


@dataclass(frozen=True)
class Line:
    """One series over time: its legend, the seconds since the start, and the values."""

    legend: str
    times: list[float]
    values: list[float]


def draw_panel(axes: Axes, panel: dict[str, Any], found: list[Line], minutes: float) -> None:
    """A panel of the board, of so many minutes."""
    axes.set_title(panel["title"], size=9, weight="bold")
    axes.tick_params(labelsize=7)
    config = panel["fieldConfig"]
    if not found:
        draw_text(axes, config["defaults"].get("noValue", "No data"))
    elif panel["type"] == "stat":
        draw_stat(axes, found, config["defaults"]["unit"])
    elif panel["type"] == "state-timeline":
        draw_states(axes, found)
    else:
        draw_lines(axes, found, config, minutes)


def draw_text(axes: Axes, text: str, size: int = 10) -> None:
    """Instead of curves, or over them."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, size=size, ha="center", va="center", transform=axes.transAxes)


def draw_stat(axes: Axes, found: list[Line], unit: str) -> None:
    """The last value, over its course."""
    for line in found:
        axes.fill_between(line.times, line.values, color="tab:blue", alpha=0.15)
        draw_text(axes, words(line.values[-1], unit), size=22)


def draw_states(axes: Axes, found: list[Line]) -> None:
    """A bar for each state, red while it is so."""
    for row, line in enumerate(found):
        for when, value in zip(line.times, line.values, strict=True):
            color = "tab:red" if value else "tab:green"
            axes.barh(row, SCRAPE_S / 60, left=when / 60, height=0.7, color=color, lw=0)
    axes.set_yticks([])
    for row, line in enumerate(found):
        axes.text(0, row, f" {line.legend}", size=8, va="center")


def draw_lines(axes: Axes, found: list[Line], config: dict[str, Any], minutes: float) -> None:
    """Lines, or areas on top of each other; by the board's overrides dashed, or on the right."""
    defaults = config["defaults"]
    custom = defaults["custom"]
    right, unit = None, defaults["unit"]
    below = dict[float, float]()
    for number, line in enumerate(found):
        changes = {
            change["id"]: change["value"]
            for each in config["overrides"]
            if re.fullmatch(each["matcher"]["options"], line.legend)
            for change in each["properties"]
        }
        style = {"label": line.legend, "color": f"C{number}"}
        times = [when / 60 for when in line.times]
        if "stacking" in custom and "custom.stacking" not in changes:
            base = [below.get(when, 0.0) for when in line.times]
            top = [a + b for a, b in zip(base, line.values, strict=True)]
            below.update(zip(line.times, top, strict=True))
            axes.fill_between(times, base, top, alpha=0.5, **style)
            continue
        on = axes
        if "custom.axisPlacement" in changes:
            on = right = right or axes.twinx()
            dress(right, changes.get("unit", unit), minutes)
            axes.plot([], [], **style)  # in its legend
        dashes = "--" if "custom.lineStyle" in changes else "-"
        on.plot(times, line.values, dashes, lw=1.2, **style)
    if "scaleDistribution" in custom:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    elif "min" in defaults:
        for each in {axes, right or axes}:
            each.set_ylim(bottom=0)
    dress(axes, unit, minutes)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="best", framealpha=0.6)


def dress(axes: Axes, unit: str, minutes: float) -> None:
    """Its scales: so many minutes, and values with their unit."""
    axes.set_xlim(0, minutes)
    axes.tick_params(labelsize=7)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: words(value, unit)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def words(value: float, unit: str) -> str:
    """A value with its unit."""
    if unit.startswith("suffix:"):
        return f"{value:.3g} {unit.removeprefix('suffix:').strip()}"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        if 0 < abs(value) < 1:
            return f"{1000 * value:.3g} ms"
        return f"{value:.0f} s" if abs(value) >= 100 else f"{value:.3g} s"
    base, prefixes = PREFIXES.get(unit, (1000, ("", "k", "M")))
    for prefix in prefixes[:-1]:
        if abs(value) < base:
            return f"{value:.3g} {prefix}".strip()
        value /= base
    return f"{value:.3g} {prefixes[-1]}"
