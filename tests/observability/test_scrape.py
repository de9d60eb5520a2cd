"""The real Prometheus scrapes vLLM's metrics and answers what the dashboard and the alerts ask."""

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.v1.kv_offload.base import OffloadingHistogramMetadata  # noqa: E402

from kvstrata.offload.vllm_plugin.metrics.definitions import metric_definitions  # noqa: E402
from tests.docs.blocks import ROOT  # noqa: E402
from tests.observability.prometheus import needs_prometheus, prometheus  # noqa: E402
from tests.observability.queries import (  # noqa: E402
    ALERTS,
    Query,
    alert_queries,
    alert_rules,
    answers,
    board,
    board_queries,
    with_values,
)
from tests.waiting import wait_until  # noqa: E402

# What Prometheus writes in place of what it does not know, and where a label is empty
_UNFILLED = re.compile(r"<no value>|<error|%!|NaN|{{| of  | tier  ")
# Of every series that vLLM serves and Prometheus scrapes; `le` is a histogram's
OF_ALL = {"model_name", "engine", "job", "instance", "le"}
_SELECTOR = re.compile(r"\b(kvstrata_\w+)(?:\{([^}]*)\})?")
_LABEL = re.compile(r'(\w+) *[=!]~? *"')


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server without an engine in which everything happens all the time."""
    log = tmp_path_factory.mktemp("exposition") / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            [sys.executable, "-m", "tests.observability.exposition"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        # vLLM may say something before
        url = next((line for line in process.stdout if line.startswith("http://")), None)
        assert url, log.read_text()
        yield url.strip()
        process.stdin.close()


def variables() -> list[Query]:
    """The series of which the dashboard lists labels."""
    found = []
    for each in board()["templating"]["list"]:
        if each["type"] == "query":
            ((selector, label),) = re.findall(
                r"^label_values\((.*), (\w+)\)$", each["query"]["query"]
            )
            expression = f"count by ({label}) ({with_values(selector)})"
            found.append(Query(f"variable {each['name']}", expression))
    return found


ALL = [*board_queries(), *alert_queries()]


@pytest.mark.parametrize("query", ALL, ids=lambda query: query.where)
def test_metrics_and_labels_are_defined(query: Query) -> None:
    series = {}
    for name, metric in metric_definitions().items():
        if isinstance(metric, OffloadingHistogramMetadata):
            series |= {f"{name}_{part}": metric for part in ("bucket", "sum", "count")}
        else:
            series |= {name: metric, f"{name}_total": metric}
    for name, labels in _SELECTOR.findall(query.expression):
        assert name in series, f"{name} is no metric"
        assert set(_LABEL.findall(labels)) <= {*series[name].labelnames, *OF_ALL}
    for grouped in re.findall(r"\b(?:by|without|on|ignoring) *\(([^)]*)\)", query.expression):
        known = {label for each in series.values() for label in each.labelnames}
        assert {each.strip() for each in grouped.split(",")} <= {*known, *OF_ALL, "finished_reason"}


@needs_prometheus
def test_every_query_is_answered(url: str) -> None:
    """By numbers: of nothing Prometheus makes a series without one, too."""
    for query, series in answers([*ALL, *variables()], url).items():
        assert all(math.isfinite(each.value) for each in series), f"{query}: {series}"


@needs_prometheus
def test_alerts_say_what_they_mean(url: str, tmp_path: Path) -> None:
    """The real Prometheus loads them, and fills in their texts."""
    with prometheus(tmp_path, [url], ALERTS) as running:

        def raised() -> dict[str, dict[str, str]]:
            alerts = running.get("alerts")["alerts"]
            return {each["labels"]["alertname"]: each["annotations"] for each in alerts}

        wanted = {rule["alert"] for rule in alert_rules()}
        wait_until(lambda: raised().keys() == wanted)
        for name, texts in raised().items():
            for text in texts.values():
                assert not re.search(r"<no value>|<error|%!|NaN|{{| of  | tier  ", text), (
                    name,
                    text,
                )
