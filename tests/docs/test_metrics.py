"""The table of docs/metrics.md is made of the definitions in the code.

`python -m tests.docs.test_metrics` writes it anew.
"""

import re

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.v1.kv_offload.base import (  # noqa: E402
    OffloadingCounterMetadata,
    OffloadingMetricMetadata,
)

from kvstrata.offload.metering import names  # noqa: E402
from kvstrata.offload.vllm_plugin.metrics.definitions import metric_definitions  # noqa: E402
from tests.docs.blocks import ROOT  # noqa: E402

DOCUMENT = ROOT / "docs/metrics.md"
REMEDY = "the table is not the code's: run .venv/bin/python -m tests.docs.test_metrics"
_TABLE = re.compile(r"(<!-- metrics -->\n).*?(<!-- end -->)", re.S)


def row(name: str, metric: OffloadingMetricMetadata) -> str:
    kind = type(metric).__name__.removeprefix("Offloading").removesuffix("Metadata").lower()
    total = "_total" if isinstance(metric, OffloadingCounterMetadata) else ""
    labels = f"{{{','.join(metric.labelnames)}}}" if metric.labelnames else ""
    return f"| `{name}{total}{labels}` | {kind} | {metric.documentation} |"


def with_table(text: str) -> str:
    rows = ["| metric | | |", "|---|---|---|"]
    rows += [row(name, metric) for name, metric in metric_definitions().items()]
    return _TABLE.sub(lambda match: "\n".join([match[1], *rows, "", match[2]]), text)


def test_the_table_is_the_definitions() -> None:
    text = DOCUMENT.read_text()
    assert with_table(text) == text, REMEDY


def test_every_name_is_defined() -> None:
    named = {value for name, value in vars(names).items() if name.isupper()} - {names.PRIMARY}
    assert named == metric_definitions().keys()


def test_units_are_in_the_names() -> None:
    """What Prometheus asks for: base units, and no word that Prometheus adds itself."""
    for name in metric_definitions():
        assert name.startswith("kvstrata_") and not name.endswith(("_total", "_count", "_sum"))
        assert not re.search(r"_(ms|us|kib|mib|gib|percent)(_|$)", name), name


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
