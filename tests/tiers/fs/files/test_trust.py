"""Pages that audits found wrong are put aside; a namespace with several is left alone by all."""

import errno
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors

from kvstrata.tiers.base import JobResult, Lookup
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.trust import distrust, is_trusted, trust
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.fs.tools.scan import inspect_file
from kvstrata.tiers.testing import (
    CONTEXT,
    Slots,
    finish,
    load,
    make_data,
    make_job,
    make_key,
    settle,
    store,
)
from tests.tiers.fs.conftest import Faults
from tests.waiting import wait_until

OpenTier = Callable[..., FsTier]
KEY, OTHER = make_key(1), make_key(2)
SIZE = CONTEXT.layouts[0].nbytes
STORED, COMPUTED = make_data(1, SIZE), make_data(9, SIZE)


def reject(tier: FsTier, *, distrust: bool = False, computed: bytes = COMPUTED) -> JobResult:
    slots = Slots.make(1, SIZE)
    slots.view(0)[:] = computed
    assert tier.submit_reject(make_job(7, [KEY], slots, CONTEXT), distrust=distrust)
    (result,) = finish(tier)
    return result


def content(path: Path) -> bytes:
    return b"".join(bytes(t["data"]) for _, t in safetensors.deserialize(path.read_bytes()))


@pytest.mark.parametrize("budget", [{}, {"max_bytes": 2**26}])
def test_both_pages_are_kept(
    open_tier: OpenTier, paths: NamespacePaths, budget: dict[str, int]
) -> None:
    tier = open_tier(**budget)
    store(tier, {KEY: STORED, OTHER: make_data(2, SIZE)})
    assert not reject(tier).failed
    kept = sorted(Path(paths.quarantine).iterdir(), key=lambda path: len(path.name))
    assert [path.name.split("-", 1)[1] for path in kept] == [
        f"audit-{KEY[:-4].hex()}.safetensors",
        f"audit-computed-{KEY[:-4].hex()}.safetensors",
    ]
    assert [content(path) for path in kept] == [STORED, COMPUTED]
    assert [inspect_file(str(path)).cause for path in kept] == [None, None], "sound pages both"
    assert tier.stats().counters["rejected_pages"] == 1
    assert tier.stats().failures == {"audit": 1}
    # the key is free for whoever computes it right, and the other page is as before
    assert settle(tier, KEY) is Lookup.MISS
    assert load(tier, [OTHER])[1] == {OTHER: make_data(2, SIZE)}
    another = open_tier()
    assert settle(another, KEY) is Lookup.MISS
    store(another, {KEY: COMPUTED})
    assert load(another, [KEY])[1] == {KEY: COMPUTED}


def test_what_is_not_there_is_rejected_all_the_same(
    open_tier: OpenTier, paths: NamespacePaths
) -> None:
    tier = open_tier()
    assert not reject(tier).failed
    assert list(Path(paths.quarantine).iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_takes_no_copy(
    open_tier: OpenTier, faults: Faults, paths: NamespacePaths, number: int
) -> None:
    """The stored page is out of the way in any case."""
    tier = open_tier()
    store(tier, {KEY: STORED})
    faults.set(pwritev=number)
    reject(tier)
    faults.set()
    assert settle(tier, KEY) is Lookup.MISS
    assert [content(path) for path in Path(paths.quarantine).iterdir()] == [STORED]


def test_a_file_that_cannot_be_moved_is_refused(open_tier: OpenTier, faults: Faults) -> None:
    tier = open_tier()
    store(tier, {KEY: STORED})
    faults.set(rename=errno.EROFS)
    reject(tier)
    assert settle(tier, KEY) is Lookup.MISS
    faults.set()
    assert settle(tier, KEY) is Lookup.MISS


def test_all_servers_and_later_ones_leave_it_alone(
    open_tier: OpenTier, paths: NamespacePaths, caplog: pytest.LogCaptureFixture
) -> None:
    tier, neighbour = open_tier(), open_tier()
    store(tier, {KEY: STORED})
    assert tier.trusted and neighbour.trusted
    reject(tier, distrust=True)
    assert not tier.trusted
    said = json.loads(Path(paths.distrust).read_text())
    assert "audits" in said["reason"] and said["process"] in tier.processes[0].pids()

    def hears(each: FsTier) -> bool:
        each.get_finished()
        return not each.trusted

    wait_until(lambda: hears(neighbour))
    with caplog.at_level(logging.ERROR, "kvstrata.tiers.fs"):
        later = open_tier()
    assert not later.trusted
    assert f"kvstrata trust {paths.root} {paths.name}" in caplog.text
    assert f"kvstrata trust {paths.root} {paths.name}" in tier.how_to_trust()
    # the operator's word reaches all of them
    assert trust(paths) == said
    for each in (tier, neighbour, later):
        wait_until(lambda each=each: not hears(each))
    assert open_tier().trusted


def test_the_operator_may_be_faster_than_the_watch(
    open_tier: OpenTier, paths: NamespacePaths
) -> None:
    """The marker is put there and taken away between two looks at it."""
    tier = open_tier()
    reject(tier, distrust=True)
    trust(paths)

    def trusted_again() -> bool:
        tier.get_finished()
        return tier.trusted

    wait_until(trusted_again)


def test_a_disk_that_takes_no_marker(open_tier: OpenTier, faults: Faults, root: Path) -> None:
    """This engine leaves it alone all the same, until it is restarted."""
    tier = open_tier()
    store(tier, {KEY: STORED})
    faults.set(fsync=errno.EIO)
    reject(tier, distrust=True)
    assert not tier.trusted
    assert tier.stats().failures["distrust"] == 1
    assert not list(root.glob("*/distrusted.json"))


def test_the_marker(open_tier: OpenTier, paths: NamespacePaths) -> None:
    open_tier()
    assert is_trusted(paths)
    distrust(paths, 0o600)
    first = Path(paths.distrust).read_text()
    distrust(paths, 0o600)
    assert Path(paths.distrust).read_text() == first, "the first reason stays"
    assert not is_trusted(paths)
    assert trust(paths) == json.loads(first)
    assert trust(paths) is None
    Path(paths.distrust).write_text("anybody's work")
    assert not is_trusted(paths)
    assert trust(paths) == {}
