"""What Prometheus is told, through vLLM's own path, of a manager whose tiers do everything."""

import re
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (  # noqa: E402
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.tiering.base import TieringOffloadingMetrics  # noqa: E402

from kvstrata.offload.metering import names  # noqa: E402
from kvstrata.offload.secondary.breaker import Operation  # noqa: E402
from kvstrata.offload.vllm_plugin.metrics.definitions import metric_definitions  # noqa: E402
from kvstrata.offload.vllm_plugin.metrics.info import info_labels  # noqa: E402
from kvstrata.offload.vllm_plugin.metrics.stock_names import stock_definitions  # noqa: E402
from kvstrata.offload.vllm_plugin.metrics.totals import Sizes, StatsReader  # noqa: E402
from kvstrata.offload.vllm_plugin.spec import KVStrataSpec  # noqa: E402
from kvstrata.tiers.base import TierStats  # noqa: E402
from kvstrata.tiers.memory import MemoryTier  # noqa: E402
from tests.offload.manager_world import CONTEXT, LAYOUTS, PAGE, TOKENS, World, chunk  # noqa: E402

EXTRA = {"spec_name": "KVStrataSpec", "cpu_bytes_to_use": "64MiB"}


class Told(MemoryTier):
    """Tells all that a tier may tell."""

    def stats(self) -> TierStats:
        return TierStats(
            {"evicted_pages": 3, "evicted_bytes": 300, "restarted_processes": 1, "lookups": 9},
            {"io-error": 2},
            {"checksum": 4},
            {
                **{"pages": 5.0, "bytes": 500.0, "capacity_bytes": 900.0, "disk_used_bytes": 600.0},
                **{"disk_free_bytes": 7.0, "disk_files": 8.0, "read_queue": 1.0, "odd": 0.5},
            },
            {"eviction_age_s": [1.0, 2.0]},
        )


@pytest.fixture
def world() -> World:
    return World([Told({}, CONTEXT)], slots=4, layouts={0: LAYOUTS[0]})


def values(stats: OffloadingConnectorStats) -> dict[str, dict[tuple[str, ...], Any]]:
    """What was told of each metric; of what grows, only that which did."""
    types, data = stats.data["types"], stats.data["data"]
    grown = {
        name: {k: v for k, v in by_labels.items() if types[name] != "counter" or v}
        for name, by_labels in data.items()
    }
    return {name: by_labels for name, by_labels in grown.items() if by_labels}


def reader() -> StatsReader:
    return StatsReader(Sizes(PAGE, TOKENS), ("0.1", "abc", "sha256/1"))


def run(world: World) -> None:
    """Five prompts of one chunk each in four slots, twice; the second time some are loaded."""
    for again in range(2):
        for prefix in range(5):
            view, item = world.request(f"{prefix} {again}"), chunk(prefix, 0)
            world.now += 1.0
            if world.lookup(item, view).name == "HIT":
                world.manager.prepare_load([item[0]], view)
                world.manager.on_step_end()
                world.manager.complete_load([item[0]], view)
            else:
                world.manager.missed(*item, dict([item]), view)
                world.manager.on_step_end()
                world.store([item], view)
            world.manager.on_request_finished(view)
            for _ in range(2):
                world.manager.on_step_end()


def test_each_thing_is_told_once(world: World) -> None:
    run(world)
    manager, link = world.manager, world.manager.links[0]
    for _ in range(3):
        link.breaker.failed(Operation.LOAD, "io-error")
    manager.counters.update(audit_pages=10, audit_close=2, audit_different=1, stores_declined=6)
    told = values(reader().read(manager))
    counters = manager.counters
    found = manager.found.takings
    assert found[None].query_chunks == 10 and found[None].hit_chunks > 0
    assert told[names.QUERY_CHUNKS][("primary",)] == 10
    assert told[names.HIT_CHUNKS][("primary",)] == counters["primary_hits"]
    assert told[names.HIT_TOKENS][("primary",)] == counters["primary_hits"] * TOKENS
    assert told[names.QUERY_CHUNKS][("tier0",)] == 10 - counters["primary_hits"]
    assert told[names.READ_PAGES][("primary",)] == counters["loaded_pages"]
    assert told[names.WRITTEN_BYTES][("primary",)] == counters["stored_pages"] * PAGE
    assert told[names.WRITTEN_PAGES][("tier0",)] == counters["cascaded_pages:tier0"] > 0
    assert told[names.WRITTEN_BYTES][("tier0",)] == counters["cascaded_bytes:tier0"] > 0
    evicted = told[names.EVICTED_PAGES]
    assert evicted == {("primary",): counters["evicted_pages"], ("tier0",): 3}
    assert len(told[names.EVICTION_AGE][("primary",)]) == counters["evicted_pages"]
    assert told[names.EVICTION_AGE][("tier0",)] == [1.0, 2.0]
    assert told[names.REUSE_GAP][("primary",)], "what was evicted came again"
    assert told[names.PAGES] == {("primary",): 4, ("tier0",): 5.0}
    assert told[names.BYTES] == {("primary",): 4 * PAGE, ("tier0",): 500.0}
    assert told[names.CAPACITY] == {("primary",): 4 * PAGE, ("tier0",): 900.0}
    assert told[names.CAPACITY_TOKENS] == {(): 4 * TOKENS}
    assert told[names.DISK_USED] == {("tier0",): 600.0}
    assert told[names.FAILURES] == {("tier0", "io-error"): 2}
    assert told[names.QUARANTINED] == {("tier0", "checksum"): 4}
    assert told[names.BREAKER_OPEN] == {("tier0",): 1.0}
    assert told[names.BREAKER_OPENINGS] == {("tier0", "load", "io-error"): 1}
    assert told[names.AUDIT_PAGES] == {("equal",): 7, ("close",): 2, ("different",): 1}
    assert told[names.SHED_PAGES] == {("primary", "worth"): 6}
    assert told[names.PROCESS_RESTARTS] == {("tier0",): 1}
    assert told[names.OWN_VALUES] == {("tier0", "odd"): 0.5}
    assert told[names.INFO] == {("0.1", "abc", "sha256/1"): 1.0}
    assert names.OWN_COUNTS not in told, "look-ups are told as what requests found"


def test_only_what_changed_is_told(world: World) -> None:
    run(world)
    told = reader()
    told.read(world.manager)
    again = values(told.read(world.manager))
    assert again.keys() <= {names.EVICTION_AGE}, "which this tier tells each time"
    before = world.manager.counters["stored_pages"]
    world.store([chunk(9, 0)], world.request("one more"))
    assert before + 1 == world.manager.counters["stored_pages"]
    assert values(told.read(world.manager))[names.WRITTEN_PAGES] == {("primary",): 1}


def test_vllms_names_mean_what_they_mean_there(world: World) -> None:
    run(world)
    manager, theirs = world.manager, TieringOffloadingMetrics
    told = values(reader().read(manager))
    primary = ("0:primary",)
    assert told[theirs.CHUNK_QUERIES][primary] == 10
    assert told[theirs.CHUNK_HITS][primary] == manager.counters["primary_hits"]
    written = {("1:tier0",): manager.counters["cascaded_bytes:tier0"]}
    assert told[theirs.WRITE_BYTES] == written
    assert (
        sum(told["vllm:kv_offload_cpu_allocation_size"][()])
        == 10 - told[theirs.CHUNK_HITS][primary]
    )
    assert told["vllm:kv_offload_cpu_cache_usage_perc"] == {(): 0.0}


def test_nothing_is_told_that_is_not_defined(world: World) -> None:
    """vLLM's server would end."""
    run(world)
    defined = KVStrataSpec.build_metric_definitions(dict(EXTRA))
    assert metric_definitions().keys() | stock_definitions().keys() <= defined.keys()
    stats = reader().read(world.manager)
    for name, labelled in values(stats).items():
        for labels in labelled:
            assert len(labels) == len(defined[name].labelnames), name


def test_a_seed_is_not_shown() -> None:
    namespace = {"hash_algorithm": "sha256", "hash_seed": "12345"}
    _, digest, hashing = info_labels(namespace)
    assert re.fullmatch(r"[0-9a-f]{12}", digest) and re.fullmatch(r"sha256/[0-9a-f]{4}", hashing)
    assert info_labels(namespace | {"hash_seed": "0"})[2] != hashing
    assert info_labels({})[1:] == ("", "")
