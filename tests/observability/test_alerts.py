"""Each alert is raised by what it is for, and by nothing else: by promtool, with Prometheus' own
rules, of engines that are healthy, idle, or sick."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.blocks import ROOT
from tests.observability.prometheus import needs_prometheus
from tests.observability.queries import ALERTS, alert_rules

LATER = "3h"  # of one sample a minute
GIB = 2**30
# Series by name and labels, in promtool's notation: the first value, and what each minute adds
Values = dict[str, str]


def constant(value: float) -> str:
    return f"{value}+0x180"


def growing(each_minute: float) -> str:
    return f"0+{each_minute}x180"


def jumping(by: float, at: int = 170) -> str:
    """From 0, in one minute."""
    return f"0+0x{at} {by}+0x{180 - at}"


def born(value: float, at: int = 170) -> str:
    """A series that is not there before, as of what never happened."""
    return f"_x{at} {value}+0x{180 - at}"


def histogram(name: str, labels: str, seconds: float, each_minute: float) -> Values:
    """All observations in the bucket that ends at so many seconds."""
    bounds = ("60", "300", "3600", "14400", "+Inf")
    buckets = {
        f'{name}_bucket{{{labels},le="{bound}"}}': growing(
            each_minute if float(bound) >= seconds else 0
        )
        for bound in bounds
    }
    return {
        **buckets,
        f"{name}_count{{{labels}}}": growing(each_minute),
        f"{name}_sum{{{labels}}}": growing(each_minute * seconds),
    }


FS, PRIMARY = 'tier="fs"', 'tier="primary"'
GAPS, AGES = "kvstrata_reuse_gap_seconds", "kvstrata_eviction_age_seconds"
# Nothing is asked, since the engine started: a full disk and a full CPU tier are how it should be.
IDLE: Values = {
    'kvstrata_info{version="0.1.0",kv_namespace="9a0e",hashing="sha256/1f"}': constant(1),
    **{
        f"kvstrata_tier_{state}{{{FS}}}": constant(0)
        for state in ("breaker_open", "stores_failing", "distrusted")
    },
    f"kvstrata_tier_disk_used_bytes{{{FS}}}": constant(200 * GIB),
    f"kvstrata_tier_capacity_bytes{{{FS}}}": constant(200 * GIB),
    f"kvstrata_tier_disk_free_bytes{{{FS}}}": constant(20 * GIB),
    "kvstrata_prefill_tokens_per_second": constant(0),
    "vllm:prompt_tokens_total": constant(0),
    "vllm:prefix_cache_hits_total": constant(0),
    "vllm:request_prompt_tokens_sum": constant(0),
    "vllm:request_prompt_tokens_count": constant(0),
    'vllm:request_success_total{finished_reason="stop"}': constant(0),
}
# 20 requests a minute of 5,000 tokens; hits pay; pages leave late, and few come again soon.
# A few deadlines are missed, some pages are gone, a process was replaced: such things happen.
HEALTHY: Values = {
    **IDLE,
    "kvstrata_prefill_tokens_per_second": constant(8000),
    "vllm:prompt_tokens_total": growing(100_000),
    "vllm:prefix_cache_hits_total": growing(20_000),
    "vllm:request_prompt_tokens_sum": growing(100_000),
    "vllm:request_prompt_tokens_count": growing(20),
    'vllm:request_success_total{finished_reason="stop"}': growing(20),
    f"kvstrata_tier_query_tokens_total{{{PRIMARY}}}": growing(80_000),
    f"kvstrata_prefill_saved_seconds_total{{{PRIMARY}}}": growing(5),
    f"kvstrata_prefill_saved_seconds_total{{{FS}}}": growing(2),
    "kvstrata_load_wait_seconds_total": growing(2),
    'kvstrata_deadline_misses_total{wait="look-up"}': growing(0.1),
    f'kvstrata_tier_failures_total{{{FS},cause="missing"}}': growing(1),
    f"kvstrata_tier_evicted_pages_total{{{PRIMARY}}}": growing(100),
    **histogram(GAPS, PRIMARY, 14400, 2),
    **histogram(AGES, PRIMARY, 3600, 100),
    f"kvstrata_tier_io_process_restarts_total{{{FS}}}": born(1),
    'kvstrata_audit_pages_total{result="close"}': growing(1),
}
# What makes a healthy engine sick; a value of None takes the series away.
SICK: dict[str, list[dict[str, str | None]]] = {
    "KvstrataBreakerOpen": [{f"kvstrata_tier_breaker_open{{{FS}}}": jumping(1)}],
    "KvstrataTierDistrusted": [{f"kvstrata_tier_distrusted{{{FS}}}": jumping(1)}],
    "KvstrataWrongPages": [
        {'kvstrata_audit_pages_total{result="different"}': born(1)},
        {'kvstrata_audit_pages_total{result="different"}': jumping(1)},
    ],
    "KvstrataPagesQuarantined": [
        {f'kvstrata_tier_quarantined_pages_total{{{FS},cause="checksum"}}': born(1)},
        {f'kvstrata_tier_quarantined_pages_total{{{FS},cause="checksum"}}': jumping(1)},
    ],
    "KvstrataStoresFailing": [{f"kvstrata_tier_stores_failing{{{FS}}}": jumping(1, at=165)}],
    "KvstrataNoRoomForStores": [
        {f'kvstrata_tier_failures_total{{{FS},cause="{cause}"}}': growing(1)}
        for cause in ("budget", "no-space")
    ],
    "KvstrataDiskNearlyFull": [{f"kvstrata_tier_disk_free_bytes{{{FS}}}": constant(GIB)}],
    "KvstrataOverBudget": [{f"kvstrata_tier_disk_used_bytes{{{FS}}}": constant(220 * GIB)}],
    "KvstrataThrashing": [{**histogram(GAPS, PRIMARY, 60, 30)}],
    "KvstrataWaitsEatSavings": [
        {"kvstrata_load_wait_seconds_total": growing(8)},
        {
            f"kvstrata_prefill_saved_seconds_total{{{PRIMARY}}}": None,
            f"kvstrata_prefill_saved_seconds_total{{{FS}}}": None,
        },
    ],
    "KvstrataDeadlineMisses": [
        {f'kvstrata_deadline_misses_total{{wait="{wait}"}}': growing(1)}
        for wait in ("look-up", "promotion", "gpu")
    ],
    "KvstrataIoProcessesRestart": [
        {f"kvstrata_tier_io_process_restarts_total{{{FS}}}": born(3)},
        {f"kvstrata_tier_io_process_restarts_total{{{FS}}}": growing(0.1)},
    ],
    "KvstrataNoLookups": [
        {f"kvstrata_tier_query_tokens_total{{{PRIMARY}}}": None},
        {f"kvstrata_tier_query_tokens_total{{{PRIMARY}}}": constant(5000)},
    ],
}
# What looks like a fault and is none
WELL: dict[str, dict[str, str | None]] = {
    "nothing": {},
    "old faults": {
        'kvstrata_audit_pages_total{result="different"}': jumping(5, at=60),
        f'kvstrata_tier_quarantined_pages_total{{{FS},cause="checksum"}}': jumping(5, at=60),
        f"kvstrata_tier_io_process_restarts_total{{{FS}}}": jumping(5, at=60),
        f"kvstrata_tier_breaker_open{{{FS}}}": "0x60 1x60 0x60",
    },
    "no limit": {f"kvstrata_tier_capacity_bytes{{{FS}}}": constant(0)},
    "pages that leave come again, but after a long time": histogram(GAPS, PRIMARY, 14400, 90),
    "few of those that leave come again soon": histogram(GAPS, PRIMARY, 60, 5),
    "waits before the speed is known": {
        "kvstrata_load_wait_seconds_total": growing(8),
        "kvstrata_prefill_tokens_per_second": constant(0),
    },
    "short prompts, of which none fills a chunk": {
        f"kvstrata_tier_query_tokens_total{{{PRIMARY}}}": None,
        "vllm:request_prompt_tokens_count": growing(1000),
    },
    "all is in the GPU's cache": {
        f"kvstrata_tier_query_tokens_total{{{PRIMARY}}}": None,
        "vllm:prefix_cache_hits_total": growing(100_000),
    },
    "a vLLM without kvstrata": {name: None for name in HEALTHY if name.startswith("kvstrata_")},
}


def labelled(name: str) -> str:
    """With the labels that vLLM and Prometheus put to every series."""
    metric, _, labels = name.removesuffix("}").partition("{")
    ours = 'model_name="llama",engine="0",job="vllm",instance="one:8000"'
    return f"{metric}{{{labels + ',' if labels else ''}{ours}}}"


def check(folder: Path, series: Values, changes: dict[str, str | None], firing: set[str]) -> None:
    """Only these alerts are raised at the end."""
    values = {**series, **changes}
    test = {
        "interval": "1m",
        "input_series": [
            {"series": labelled(name), "values": value} for name, value in values.items() if value
        ],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": LATER,
                "exp_samples": [
                    {"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(firing)
                ],
            }
        ],
    }
    document: dict[str, Any] = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "1m",
        "tests": [test],
    }
    file = folder / "test.yml"
    file.write_text(yaml.safe_dump(document))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_prometheus_takes_the_rules() -> None:
    """Also by the configuration in docs/board.md, which names them."""
    for command in (["rules", "docs/alerts.yml"], ["config", "docs/prometheus.yml"]):
        done = subprocess.run(
            ["promtool", "check", *command], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{len(SICK)} rules found" in done.stdout


def test_every_alert_has_a_test_and_says_what_to_do() -> None:
    rules = alert_rules()
    assert [rule["alert"] for rule in rules] == list(SICK)
    for rule in rules:
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["annotations"]["summary"].endswith(".")
        assert rule["labels"]["severity"] in ("warning", "critical")
        for document in re.findall(r"docs/\w+\.md", rule["annotations"]["description"]):
            assert (ROOT / document).exists()


def test_the_document_names_them_all() -> None:
    """With their severity, in docs/board.md."""
    text = (ROOT / "docs" / "board.md").read_text()
    shown = re.findall(r"^\| `(Kvstrata\w+)` \| (\w+) \|", text, re.M)
    assert shown == [(rule["alert"], rule["labels"]["severity"]) for rule in alert_rules()]


@needs_prometheus
@pytest.mark.parametrize(
    ("alert", "number"), [(name, n) for name, ways in SICK.items() for n in range(len(ways))]
)
def test_an_alert_is_raised(alert: str, number: int, tmp_path: Path) -> None:
    check(tmp_path, HEALTHY, SICK[alert][number], {alert})


@needs_prometheus
@pytest.mark.parametrize("what", WELL)
def test_a_healthy_engine_raises_none(what: str, tmp_path: Path) -> None:
    check(tmp_path, HEALTHY, WELL[what], set())


@needs_prometheus
def test_an_idle_engine_raises_none(tmp_path: Path) -> None:
    check(tmp_path, IDLE, {}, set())
