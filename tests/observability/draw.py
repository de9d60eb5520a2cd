"""Draws the dashboard as Grafana would show it, where there is no Grafana: `python -m` this.

A Prometheus of its own scrapes the servers for some minutes and answers the board's queries.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from tests.observability.prometheus import Prometheus, prometheus
from tests.observability.queries import board, panels, with_values

SCRAPE_S = 5
RATE = "1m"  # what Grafana would take for rates at this interval
COLUMNS = 24  # Grafana's
WIDTH_INCHES, ROW_INCHES, DPI = 15, 0.32, 80
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


@dataclass(frozen=True)
class Span:
    """The time that is shown, in seconds since 1970."""

    start: float
    end: float

    def variables(self) -> dict[str, str]:
        """Grafana's that depend on it."""
        return {"$__range": f"{self.end - self.start:.0f}s", "$__rate_interval": RATE}


def lines(target: dict[str, Any], running: Prometheus, span: Span) -> Iterator[Line]:
    """What a target of a panel shows."""
    found = running.get(
        "query_range",
        query=with_values(target["expr"], span.variables()),
        start=str(span.start),
        end=str(span.end),
        step=str(SCRAPE_S),
    )
    for series in found["result"]:
        legend = target["legendFormat"]
        for label, value in series["metric"].items():
            legend = legend.replace(f"{{{{{label}}}}}", value)
        points = [(float(when) - span.start, float(value)) for when, value in series["values"]]
        yield Line(legend, [when for when, _ in points], [value for _, value in points])


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


def draw_row(row: str, running: Prometheus, span: Span) -> Figure:
    """A row of the board, its panels where they are there."""
    places = [panel["gridPos"] for panel in panels(row)]
    top = min(place["y"] for place in places)
    height = max(place["y"] + place["h"] for place in places) - top
    picture = Figure(figsize=(WIDTH_INCHES, ROW_INCHES * height))
    for panel, place in zip(panels(row), places, strict=True):
        # of the panel's cells some are left to its title and its scales
        left, width = place["x"] + 0.9, place["w"] - 1.6
        bottom, tall = height - (place["y"] - top) - place["h"] + 0.9, place["h"] - 1.8
        axes = picture.add_axes(
            (left / COLUMNS, bottom / height, width / COLUMNS, tall / height),
        )
        axes.set_title(panel["title"], size=9, weight="bold")
        axes.tick_params(labelsize=7)
        found = [line for target in panel["targets"] for line in lines(target, running, span)]
        if not found:
            draw_text(axes, panel["fieldConfig"]["defaults"].get("noValue", "No data"))
        elif panel["type"] == "stat":
            draw_stat(axes, found, panel["fieldConfig"]["defaults"]["unit"])
        elif panel["type"] == "state-timeline":
            draw_states(axes, found)
        else:
            draw_lines(axes, found, panel["fieldConfig"], (span.end - span.start) / 60)
    return picture


def save(picture: Figure, path: Path) -> None:
    """As a small PNG: a few colours are all it has."""
    drawn = BytesIO()
    picture.savefig(drawn, dpi=DPI)
    Image.open(drawn).convert("RGB").quantize(128).save(path, optimize=True)


def main(
    urls: Annotated[list[str], typer.Argument(help="The servers, such as http://localhost:8000.")],
    minutes: Annotated[float, typer.Option(help="How long they are watched.")] = 10,
    folder: Annotated[Path, typer.Option(help="Where the pictures go, one a row.")] = Path("."),
) -> None:
    """Watch servers, and draw the board."""
    with (
        tempfile.TemporaryDirectory() as data,
        prometheus(Path(data), urls, interval=f"{SCRAPE_S}s") as running,
    ):
        start = time.time()
        time.sleep(60 * minutes)
        span = Span(start + 2 * SCRAPE_S, time.time())
        folder.mkdir(parents=True, exist_ok=True)
        for row in (each["title"] for each in board()["panels"] if each["type"] == "row"):
            name = re.sub(r"\W+", "-", row.lower()).strip("-")
            save(draw_row(row, running, span), folder / f"{name}.png")


if __name__ == "__main__":
    typer.run(main)
