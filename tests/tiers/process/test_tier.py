"""Any medium as a tier: what it may do, and what its mistakes cost."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvstrata.tiers.base import Lookup, PageKey, SecondaryTier, TierConfigError, TierContext
from kvstrata.tiers.page.identity import namespace_digest
from kvstrata.tiers.process import process as process_module
from kvstrata.tiers.process import supervisor as supervisor_module
from kvstrata.tiers.process.medium import Outcome
from kvstrata.tiers.process.messages import Done, Ready, Task, pack, packet, unpack_tasks
from kvstrata.tiers.testing import (
    CONTEXT,
    REQUEST,
    MakeTier,
    TierContract,
    load,
    make_data,
    make_key,
    settle,
    store,
)
from tests.tiers.fs.test_contract import written_by_the_book
from tests.tiers.process.folder_tier import FolderTier
from tests.waiting import wait_until

SIZE = CONTEXT.layouts[2].nbytes
KEYS = [make_key(n, group=2) for n in range(6)]
PAGES = {key: make_data(n, SIZE) for n, key in enumerate(KEYS)}


OpenTier = Callable[..., FolderTier]


class Files:
    """The folder, reached without the tier."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, tier: SecondaryTier, context: TierContext, key: bytes, data: bytes) -> None:
        digest = namespace_digest(context.namespace)
        (self.folder / key.hex()).write_bytes(written_by_the_book(context, digest, key, data))

    def get(self, tier: SecondaryTier, context: TierContext, key: bytes) -> bytes | None:
        path = self.folder / key.hex()
        return path.read_bytes()[-context.layouts[key[-1]].nbytes :] if path.exists() else None


class TestPlainMedium(TierContract):
    @pytest.fixture(params=["Folder", "Bulk", "Teller"])
    def make_tier(self, request: pytest.FixtureRequest, open_tier: OpenTier) -> MakeTier:
        return lambda context: open_tier(request.param, context)

    @pytest.fixture
    def medium(self, folder: Path) -> Files:
        return Files(folder)


def test_a_page_that_fails_costs_no_other(
    open_tier: OpenTier, caplog: pytest.LogCaptureFixture
) -> None:
    tier = open_tier("Wild")
    store(tier, PAGES)
    result, arrived = load(tier, KEYS)
    cause = result.failed[KEYS[4]]
    assert cause.startswith("? no ? short word") and len(cause) == 50
    assert result.failed == {
        KEYS[1]: "io-error",
        KEYS[2]: "internal",
        KEYS[3]: "checksum",
        KEYS[4]: cause,
    }
    assert arrived == {key: PAGES[key] for key in (KEYS[0], KEYS[5])}
    assert tier.stats().failures == dict.fromkeys(result.failed.values(), 1)
    assert "the wire was cut" in caplog.text and "ZeroDivisionError: a mistake" in caplog.text
    assert {record.name for record in caplog.records} == {"kvstrata.tiers.folder"}


def test_a_bad_page_is_not_believed_until_it_is_stored_again(
    open_tier: OpenTier, folder: Path
) -> None:
    tier = open_tier()
    store(tier, PAGES)
    for key in KEYS[:2]:
        (folder / key.hex()).write_bytes(b"rubbish")
    assert load(tier, KEYS[:2])[0].failed == dict.fromkeys(KEYS[:2], "truncated")
    assert settle(tier, KEYS[0]) is settle(tier, KEYS[1]) is Lookup.MISS
    store(tier, {KEYS[0]: PAGES[KEYS[0]]})
    assert settle(tier, KEYS[0]) is Lookup.HIT and load(tier, KEYS[:1])[1] == {
        KEYS[0]: PAGES[KEYS[0]]
    }
    assert settle(tier, KEYS[1]) is Lookup.MISS


def test_a_medium_that_answers_for_too_few_is_not_believed(open_tier: OpenTier) -> None:
    tier = open_tier("Miscounting")
    store(tier, PAGES)
    assert load(tier, KEYS)[0].failed == dict.fromkeys(KEYS, "internal")
    assert settle(tier, make_key(99, group=2)) is Lookup.MISS
    assert tier.stats().failures == {"internal": len(KEYS), "io-error": 1}


def test_a_medium_that_returns_no_outcomes(
    open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "STALL_S", 1.0)
    tier = open_tier("Careless")
    store(tier, PAGES)
    for number in range(1, 6):
        assert load(tier, [KEYS[number]])[0].failed == {KEYS[number]: "internal"}
    assert load(tier, KEYS[:1])[1] == {KEYS[0]: PAGES[KEYS[0]]}
    assert tier.stats().counters["restarted_processes"] == 0


def test_a_medium_that_cannot_be_opened(
    open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "WAIT_FOR_START_S", 0.0)
    tier = open_tier("Stillborn")
    result = store(tier, PAGES)
    assert result.failed == dict.fromkeys(KEYS, "crashed")
    assert settle(tier, KEYS[0]) is Lookup.MISS


def test_what_a_medium_tells(open_tier: OpenTier, caplog: pytest.LogCaptureFixture) -> None:
    tier = open_tier("Talker")
    store(tier, PAGES)
    assert settle(tier, KEYS[0]) is Lookup.HIT
    tier.on_step_end()  # a promise that fails is nobody's trouble
    assert sorted(tier.take_changes(9)) == [(key, True) for key in sorted(KEYS)]
    tier.touch(KEYS[:3], REQUEST)
    changes: list[tuple[PageKey, bool]] = []

    def heard_all() -> bool:
        failures = tier.stats().failures  # a look, too
        changes.extend(tier.take_changes(9))
        return bool(failures and changes)

    wait_until(heard_all)
    assert tier.stats().failures == {"internal": 1} and changes == [(KEYS[0], False)]
    assert "kvstrata folder tier: used 3, writer" in caplog.text and not tier.trusted
    assert load(tier, KEYS)[1] == PAGES


def is_told(tier: FolderTier) -> bool:
    tier.get_finished()
    return tier._index.told


def test_what_a_medium_that_told_of_all_did_not_tell_of_is_absent(
    open_tier: OpenTier, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "RESTART_S", 0.01)
    store(open_tier(), PAGES)
    tier, unknown = open_tier("Teller"), make_key(99, group=2)
    wait_until(lambda: is_told(tier))
    assert {tier.lookup(key, REQUEST) for key in KEYS} == {Lookup.HIT}
    assert tier.lookup(unknown, REQUEST) is Lookup.MISS
    (folder / "unsure").touch()
    os.kill(tier.processes[0].pids()[1], 9)
    wait_until(lambda: not is_told(tier))
    assert tier.lookup(unknown, REQUEST) is Lookup.RETRY
    assert settle(tier, unknown) is Lookup.MISS and not is_told(tier)


def test_all_of_several_media_must_have_told(open_tier: OpenTier, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for each in folders:
        each.mkdir()
    tier = open_tier("Teller", folders=folders)
    wait_until(lambda: is_told(tier))
    (folders[1] / "unsure").touch()
    tier = open_tier("Teller", folders=folders)
    wait_until(lambda: not is_told(tier) and tier.processes[0].complete)
    assert not is_told(tier) and tier.lookup(KEYS[0], REQUEST) is Lookup.RETRY


def test_each_of_several_media_has_its_pages(open_tier: OpenTier, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for each in folders:
        each.mkdir()
    tier = open_tier(folders=folders)
    many = {make_key(n, group=2): make_data(n, SIZE) for n in range(40)}
    store(tier, many)
    placed = [{path.name for path in each.iterdir()} for each in folders]
    assert sum(map(len, placed)) == 40 and all(placed)
    assert load(tier, list(many))[1] == many
    fewer = open_tier(folders=folders[:2])  # the pages of the others stay where they are
    result, _ = load(fewer, list(many))
    assert {key.hex() for key in result.failed} == placed[2]


def test_without_a_region(folder: Path) -> None:
    with pytest.raises(TierConfigError, match="folder tier: the pages are not in shared memory"):
        FolderTier(replace(CONTEXT, region=None), "Folder", [folder])


@pytest.mark.parametrize("junk", [b"junk", b"\xdd\0\0\0\1\x93"], ids=["junk", "cut off"])
def test_a_broken_packet_ends_the_process_that_gets_it(
    open_tier: OpenTier, junk: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "RESTART_S", 0.01)
    tier = open_tier()
    store(tier, PAGES)
    old = tier.processes[0].pids()
    for group in tier.processes[0]._groups:
        assert group.current is not None and group.current.process.send(junk)
    wait_until(lambda: not tier.get_finished() and not set(old) & set(tier.processes[0].pids()))
    wait_until(lambda: load(tier, KEYS)[1] == PAGES)
    assert tier.stats().failures["crashed"] >= 2


LIES: dict[str, Callable[[Task], object]] = {
    "a task": lambda task: Task(task.kind, task.keys),
    "of another task": lambda task: Done(task.task_id + 1, [], 0.0, 0.0),
    "too few": lambda task: Done(task.task_id, [], 0.0, 0.0),
    "too many": lambda task: Done(task.task_id, [Outcome()] * 9, 0.0, 0.0),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_process_that_talks_nonsense_is_given_up(
    open_tier: OpenTier, lie: Callable[[Task], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages fail, and nothing else happens to the engine."""
    monkeypatch.setattr(supervisor_module, "RESTART_S", 0.01)
    tier = open_tier()
    store(tier, PAGES)
    send, receive = process_module.IoProcess.send, process_module.IoProcess.receive
    lies: list[bytes] = []

    def note(process: process_module.IoProcess, raw: bytes) -> bool:
        lies.extend(packet([pack(lie(task))]) for task in unpack_tasks(raw))
        return send(process, raw)

    with monkeypatch.context() as patch:
        patch.setattr(process_module.IoProcess, "send", note)
        patch.setattr(
            process_module.IoProcess,
            "receive",
            lambda process: lies.pop() if lies else receive(process) and packet([pack(Ready())]),
        )
        assert load(tier, KEYS)[0].failed == dict.fromkeys(KEYS, "crashed")
    wait_until(lambda: load(tier, KEYS)[1] == PAGES)


def test_the_first_word_of_a_process_may_be_nonsense(
    open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    babble = "import socket, sys; socket.socket(fileno=int(sys.argv[1])).send(b'?')"
    monkeypatch.setattr(process_module, "COMMAND", (sys.executable, "-c", babble))
    monkeypatch.setattr(supervisor_module, "WAIT_FOR_START_S", 0.0)
    tier = open_tier()
    assert store(tier, PAGES).failed == dict.fromkeys(KEYS, "crashed")
