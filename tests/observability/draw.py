"""Draws the dashboard where there is no Grafana: `python -m` this.

A Prometheus of its own scrapes the servers for some minutes and answers the board's queries.
"""

from __future__ import annotations

import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from PIL import Image

from tests.observability.drawing import SCRAPE_S, Line, draw_panel
from tests.observability.prometheus import Prometheus, prometheus
from tests.observability.queries import board, panels, with_values

RATE = "1m"  # what Grafana would take for rates at this interval
COLUMNS = 24  # Grafana's
WIDTH_INCHES, ROW_INCHES, DPI = 15, 0.32, 80


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
        found = [line for target in panel["targets"] for line in lines(target, running, span)]
        draw_panel(axes, panel, found, (span.end - span.start) / 60)
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and end Prometheus
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
