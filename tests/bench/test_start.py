"""The benchmark of the CPU tier's start runs."""

import pytest

from kvstrata.offload.primary import region
from kvstrata.offload.primary.region import region_path
from tests.bench import start


def test_all_becomes_usable() -> None:
    first, served, complete, spent = start.measure(0.03, 2)
    assert first == 15 * start.SLOT_BYTES / 2**30, "a small tier is there at once"
    assert 0 < served <= complete and spent > 0
    assert not region_path(f"bench-start-{start.os.getpid()}").exists()


def test_one_thread_before_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region.Region, "reserve", None)  # not by ours
    assert min(start.measure_at_once(0.03)) > 0
