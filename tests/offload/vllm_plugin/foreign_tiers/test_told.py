"""Events, metrics and labels of tiers that were made for vLLM's own manager."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.v1.kv_offload.base import Locality, Medium, ScheduleEndContext  # noqa: E402

from kvstrata.offload.primary.region import create_region  # noqa: E402
from kvstrata.offload.vllm_plugin.foreign_tiers import told  # noqa: E402
from kvstrata.offload.vllm_plugin.metrics.old_names import TIER_EVENTS  # noqa: E402
from kvstrata.offload.vllm_plugin.scheduler import KVStrataScheduler  # noqa: E402
from kvstrata.offload.vllm_plugin.spec import KVStrataSpec  # noqa: E402
from tests.offload.manager_world import chunk  # noqa: E402
from tests.offload.vllm_plugin.foreign_tiers.made_for_vllm import DictTier  # noqa: E402
from tests.offload.vllm_plugin.foreign_tiers.region_world import (  # noqa: E402
    EXAMPLE,
    RegionWorld,
    made,
)

PAGE = chunk(0, 0)
STEP = ScheduleEndContext((), ())


def scheduler_of(world: RegionWorld, folder: Path) -> KVStrataScheduler:
    region = create_region("e", {"slots": 8, "slot_bytes": 4096, "workers": 1}, directory=folder)
    return KVStrataScheduler(world.manager, region, events=True, info=lambda: [{"tier": "tier0"}])


def extra(*tiers: dict[str, Any]) -> dict[str, Any]:
    return {"cpu_bytes_to_use": "1MiB", "secondary_tiers": list(tiers)}


def test_a_tier_that_tells_its_events_tells_all_of_them(tmp_path: Path) -> None:
    world = RegionWorld(made("TellingTier"))
    scheduler = scheduler_of(world, tmp_path)
    world.store([PAGE], world.request())
    world.finish()
    cpu, gone = scheduler.take_events()
    assert (cpu.medium, cpu.locality, cpu.removed) == (Medium.CPU, Locality.LOCAL, False)
    assert (gone.keys, gone.medium, gone.removed) == ([PAGE[0]], Medium.STORAGE, True)
    assert gone.ownership == "tier0"
    assert not list(scheduler.take_events())


def test_of_one_that_tells_none_the_manager_does(tmp_path: Path) -> None:
    world = RegionWorld(made("DictTier"))
    scheduler = scheduler_of(world, tmp_path)
    world.store([PAGE], world.request())
    world.finish()
    assert [(each.medium, each.ownership) for each in scheduler.take_events()] == [
        (Medium.CPU, None),
        (Medium.STORAGE, "tier0"),
    ]


def test_its_metrics_are_among_ours(tmp_path: Path) -> None:
    world = RegionWorld(made("TellingTier"))
    scheduler = scheduler_of(world, tmp_path)
    world.store([PAGE], world.request())
    world.finish()
    stats = scheduler.get_stats()
    assert stats is not None
    counted = stats.data["data"]
    assert "'telling_rows': {('all',): 1}" in str(counted)
    assert TIER_EVENTS in counted
    defined = KVStrataSpec.build_metric_definitions(extra(made("TellingTier"), EXAMPLE))
    assert defined.keys() >= {"telling_rows", TIER_EVENTS}


def test_its_hits_have_its_own_word() -> None:
    """vLLM 0.31 has none."""
    (link,) = RegionWorld(made("DictTier")).manager.links
    word = told.hit_source(link)
    assert word is getattr(DictTier, "cache_hit_source", None)
    assert word is None or word.name == "DISK"


def test_one_that_asks_for_steps_gets_them() -> None:
    assert RegionWorld(made("TellingTier")).manager.has_pending_work()
    assert not RegionWorld(made("DictTier")).manager.has_pending_work()


def test_its_labels_are_beside_ours(tmp_path: Path) -> None:
    """vLLM 0.33 asks for them; before that no tier has any."""
    world = RegionWorld({**EXAMPLE, "custom_param": 5})
    has_labels = hasattr(type(world.foreign[0]), "config_info")
    keys = ("example_info",) if has_labels else ()
    assert KVStrataSpec.config_info_keys(extra(EXAMPLE))[-1:] == keys or not keys
    info = {"example_info": 5} if has_labels else {}
    assert scheduler_of(world, tmp_path).config_info() == [{"tier": "tier0", **info}]
    assert told.config_info(world.manager.links[0]) == info
