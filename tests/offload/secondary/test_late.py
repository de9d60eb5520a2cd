"""A tier that cannot be used at the start: the engine starts without it, and uses it later."""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kvstrata.offload.config.offload_config import parse_config
from kvstrata.offload.config.precheck import check_here
from kvstrata.offload.secondary import late as late_module
from kvstrata.offload.secondary.opening import TierOpener
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.tiers.base import Lookup, RequestView, TierConfigError, TierContext
from kvstrata.tiers.memory import MemoryTier
from kvstrata.tiers.options import ConfigError
from kvstrata.tiers.registry import TierEntry
from kvstrata.tiers.testing import CONTEXT, REQUEST, Slots, make_data, make_job, make_key, settle
from tests.waiting import wait_until

KEY = make_key(1)
DATA = make_data(1, CONTEXT.layouts[0].nbytes)


class Away(MemoryTier):
    """Cannot be opened while it is `away`; an opening may last until `gate` is set."""

    away: ClassVar[bool] = True
    gate: ClassVar[threading.Event] = threading.Event()
    cause: ClassVar[str] = "server: nobody answers; start it"
    tries: ClassVar[list[str]] = []
    closed: ClassVar[list[float]] = []

    def __init__(self, options: Mapping[str, Any], context: TierContext) -> None:
        if self.away:
            self.tries.append(self.cause)
            if self.cause == "a mistake":
                raise RuntimeError(self.cause)
            raise TierConfigError(self.cause)
        self.gate.wait(60.0)
        super().__init__(options, context)

    def shutdown(self, timeout_s: float) -> bool:
        self.closed.append(timeout_s)
        return super().shutdown(timeout_s)


class Far(Away):
    locality = "REMOTE"


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_module, "FIRST_PAUSE_S", 0.005)
    monkeypatch.setattr(Away, "away", True)
    monkeypatch.setattr(Away, "gate", gate := threading.Event())
    monkeypatch.setattr(Away, "closed", [])
    monkeypatch.setattr(Away, "tries", [])
    gate.set()


def entry(cls: type[Away] = Away, **more: Any) -> TierEntry:
    return TierEntry("cloud", {"type": cls.__name__, "module_path": __name__}, **more)


def opened(which: TierEntry) -> TierLink:
    (link,) = TierOpener([which], CONTEXT, private=False)(10.0, time.monotonic)
    return link


def store(link: TierLink) -> dict[bytes, str]:
    """What of one page could not be stored."""
    slots = Slots.make(1, len(DATA))
    slots.view(0)[:] = DATA
    link.tier.submit_store(make_job(1, [KEY], slots, CONTEXT))
    results: list[Any] = []
    wait_until(lambda: results.extend(link.tier.get_finished()) or results)
    return dict(results[0].failed)


def comes(link: TierLink) -> bool:
    link.tier.on_step_end()
    return link.tier.lookup(KEY, REQUEST) is Lookup.MISS and not store(link)


@pytest.mark.parametrize(
    "which", [entry(), entry(Far, required=True), entry(Far, locality="LOCAL")]
)
def test_a_tier_that_is_required_must_be_there(which: TierEntry) -> None:
    with pytest.raises(TierConfigError, match="server: nobody answers; start it"):
        opened(which)


@pytest.mark.parametrize("which", [entry(required=False), entry(Far), entry(locality="REMOTE")])
def test_one_that_is_not_is_used_from_when_it_is_there(
    which: TierEntry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    link = opened(which)
    assert "tier cloud cannot be used yet (server: nobody answers; start it)" in caplog.text
    assert link.medium == Away.medium
    assert link.tier.lookup(KEY, REQUEST) is Lookup.MISS
    assert store(link) == {KEY: "absent"} and "absent" in link.tier.page_causes
    time.sleep(0.05)
    link.tier.on_step_end()
    assert store(link) == {KEY: "absent"}, "it is still away"
    monkeypatch.setattr(Away, "away", False)
    wait_until(lambda: comes(link))
    assert "tier cloud is in use now" in caplog.text
    assert link.tier.lookup(KEY, RequestView("other")) is Lookup.HIT
    assert link.tier.stats().failures["absent"] >= 2, "totals only grow"
    assert link.tier.locality == (which.locality or "LOCAL"), "as the tier itself says"
    assert link.tier.shutdown(5.0) and Away.closed == [5.0]


def test_a_cause_is_said_once_and_another_one_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(late_module, "LONGEST_PAUSE_S", 0.005)
    link = opened(entry(required=False))
    for cause in ("server: nobody answers; start it", "password_file: wrong", "a mistake"):
        monkeypatch.setattr(Away, "cause", cause)
        begun = len(Away.tries)
        wait_until(lambda begun=begun, cause=cause: Away.tries[begun:].count(cause) >= 3)
    assert link.tier.shutdown(5.0)
    said = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert [text.partition(" cannot be used")[2] for text in said] == [
        " yet (server: nobody answers; start it); the engine starts without it, and looks for it "
        "again and again",
        ", now because of password_file: wrong",
        ", now because of RuntimeError: a mistake",
    ]


def test_what_it_did_not_store_is_said_before_it_gives_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    link = opened(entry(required=False))
    late: Any = link.tier.inner  # type: ignore[attr-defined]
    slots = Slots.make(1, len(DATA))
    link.tier.submit_store(make_job(7, [KEY], slots, CONTEXT))
    monkeypatch.setattr(Away, "away", False)
    wait_until(lambda: late._found is not None)
    link.tier.on_step_end()
    (result,) = link.tier.get_finished()
    assert result.job_id == 7 and result.failed == {KEY: "absent"}
    link.tier.on_step_end()
    assert isinstance(link.tier.inner, Away)  # type: ignore[attr-defined]


def test_nobody_waits_for_one_that_is_being_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes when the engine is gone, or has another: then it is stopped at once."""
    monkeypatch.setattr(Away, "gate", gate := threading.Event())
    link = opened(entry(required=False))
    monkeypatch.setattr(Away, "away", False)
    time.sleep(0.05)
    link.tier.on_step_end()
    assert link.tier.lookup(KEY, REQUEST) is Lookup.MISS
    assert link.tier.shutdown(5.0) and Away.closed == []
    gate.set()
    wait_until(lambda: Away.closed)


def test_one_that_came_and_was_not_used_yet_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    link = opened(entry(required=False))
    late: Any = link.tier.inner  # type: ignore[attr-defined]
    monkeypatch.setattr(Away, "away", False)
    wait_until(lambda: late._found is not None)
    assert link.tier.shutdown(5.0) and Away.closed == [5.0]


def test_wrong_options_are_refused_at_any_rate() -> None:
    wrong = [{"type": "memory", "max_bytes": "much", "required": False}]
    with pytest.raises(ConfigError, match="max_bytes"):
        parse_config({"cpu_bytes_to_use": 2**20, "secondary_tiers": wrong})


def test_a_tier_that_neither_loads_nor_stores_is_refused() -> None:
    wrong = [{"type": "memory", "load_only": True, "store_only": True}]
    with pytest.raises(ConfigError, match="load_only and store_only"):
        parse_config({"cpu_bytes_to_use": 2**20, "secondary_tiers": wrong})


def test_a_threshold_where_nothing_is_stored_is_refused() -> None:
    wrong = [{"type": "memory", "load_only": True, "store_threshold": 2}]
    with pytest.raises(ConfigError, match="store_threshold: 2 is given beside load_only"):
        parse_config({"cpu_bytes_to_use": 2**20, "secondary_tiers": wrong})


def test_a_directory_that_cannot_be_used_yet(tmp_path: Path) -> None:
    """Its I/O processes are children of a thread that found it, and live on."""
    root = tmp_path / "mount" / "kv"
    root.parent.touch()  # a file where the disk will be
    options = {"type": "fs", "root_dir": str(root), "n_read_threads": 2, "n_write_threads": 2}
    extra = {"cpu_bytes_to_use": 2**20, "secondary_tiers": [{**options, "required": False}]}
    config = parse_config(extra)
    check_here(config)
    link = opened(config.tiers[0])
    assert store(link) == {KEY: "absent"}
    root.parent.unlink()
    wait_until(lambda: comes(link))
    time.sleep(0.3)  # the kernel would have ended them by now
    assert store(link) == {} and settle(link.tier, KEY) is Lookup.HIT
    assert link.tier.shutdown(60.0)
