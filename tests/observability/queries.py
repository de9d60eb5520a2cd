"""What docs/grafana.json and docs/alerts.yml ask Prometheus, and whether a server answers it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.docs.blocks import ROOT
from tests.observability.prometheus import Series, prometheus
from tests.waiting import wait_until

BOARD = ROOT / "docs" / "grafana.json"
ALERTS = ROOT / "docs" / "alerts.yml"
# What Grafana puts in place of its variables, with "All" chosen
VARIABLES = {
    "$__rate_interval": "5m",
    "$__range": "1h",
    "$model_name": ".*",
    "$engine": ".*",
    "$tier": ".*",
}


@dataclass(frozen=True)
class Query:
    """A PromQL expression, and the panel or alert that has it."""

    where: str
    expression: str


def board() -> dict[str, Any]:
    """The dashboard."""
    found: dict[str, Any] = json.loads(BOARD.read_text())
    return found


def panels(*rows: str) -> Iterator[dict[str, Any]]:
    """The panels of these rows, named by their titles; of all rows if none is named."""
    titles = [each["title"] for each in board()["panels"] if each["type"] == "row"]
    assert set(rows) <= set(titles), f"the board's rows are {titles}"
    row = ""
    for panel in board()["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
        elif not rows or row in rows:
            yield panel


def board_queries(*rows: str) -> list[Query]:
    """The queries of these rows of the dashboard, of all if none is named."""
    return [
        Query(f"{panel['title']}, {target['refId']}", with_values(target["expr"]))
        for panel in panels(*rows)
        for target in panel["targets"]
    ]


def with_values(expression: str, others: Mapping[str, str] = {}) -> str:
    """An expression with values in place of Grafana's variables; `others`: not the usual ones."""
    for variable, value in {**VARIABLES, **others}.items():
        expression = expression.replace(variable, value)
    return expression


def alert_rules() -> list[dict[str, Any]]:
    """The alerts."""
    return [
        rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
    ]


def alert_queries() -> list[Query]:
    """The conditions of the alerts."""
    return [Query(rule["alert"], rule["expr"]) for rule in alert_rules()]


def answers(queries: Iterable[Query], url: str) -> dict[Query, list[Series]]:
    """What a Prometheus that scrapes the server at `url` answers, once it has a series for each.

    Raises:
        AssertionError: it has none for some, after a minute; the text names them.
        ValueError: one is no query.
    """
    waiting = list(queries)
    found: dict[Query, list[Series]] = {}

    def all_have() -> bool:
        for query in waiting.copy():
            if series := running.query(query.expression):
                found[query] = series
                waiting.remove(query)
        return not waiting

    with tempfile.TemporaryDirectory() as folder, prometheus(Path(folder), [url]) as running:
        try:
            wait_until(all_have)
        except AssertionError:
            lines = (f"{query.where}: {query.expression}" for query in waiting)
            raise AssertionError("\n".join(["no series for", *lines])) from None
    return found
