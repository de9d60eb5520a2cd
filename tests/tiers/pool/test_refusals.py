"""A pool that cannot be is refused at start, in one sentence with the remedy."""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstrata.tiers.base import PageRegion, TierConfigError
from kvstrata.tiers.fs.budget.ledger import BOOKS_NAME, LEDGER_NAME
from kvstrata.tiers.machine.disk import Disk, Mount
from kvstrata.tiers.pool import place
from kvstrata.tiers.pool.tier import PoolTier
from kvstrata.tiers.testing import CONTEXT, make_data, make_key, store
from tests.tiers.pool.pool_world import pool_dir

OpenTier = Callable[..., PoolTier]
MIB, GIB = 2**20, 2**30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, 'name is missing: give the pool\'s name, for example "node"'),
        (
            {"name": "node"},
            'max_bytes is missing: give most bytes of the pool, for example "64GiB"',
        ),
        ({"name": "a/b", "max_bytes": 1}, "name: 'a/b' is wrong; give a plain file name"),
        ({"name": "..", "max_bytes": 1}, "name: '..' is wrong; give a plain file name"),
        ({"name": "", "max_bytes": 1}, "name: '' is wrong; give a plain file name"),
        ({"name": 3, "max_bytes": 1}, "name: 3 is wrong; give a plain file name"),
        ({"name": "a" * 65, "max_bytes": 1}, "is wrong; give a plain file name"),
        ({"name": "node", "max_bytes": "50%"}, "max_bytes: '50%' is not a size"),
        ({"name": "node", "size": "1GiB"}, "unknown key 'size': use max_bytes"),
        ({"name": "node", "max_bytes": 1, "io": "direct"}, "pool tier: unknown key 'io'"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str, shm: Path) -> None:
    with pytest.raises(TierConfigError, match=re.escape(message)):
        PoolTier.check_options(options)
    assert list(shm.iterdir()) == []


def test_its_directory_is_named(shm: Path) -> None:
    options = {"name": "node", "max_bytes": "1GiB"}
    assert PoolTier.directories(options) == (str(pool_dir(shm)),)


@pytest.mark.parametrize("max_bytes", ["900TiB", 1])
def test_what_is_refused_leaves_nothing(open_tier: OpenTier, shm: Path, max_bytes: object) -> None:
    with pytest.raises(TierConfigError, match=r"^max_bytes: "):
        open_tier(max_bytes=max_bytes)
    assert list(shm.iterdir()) == []
    pool_dir(shm).mkdir(mode=0o700)
    with pytest.raises(TierConfigError, match=r"^max_bytes: "):
        open_tier(max_bytes=max_bytes)
    assert list(shm.iterdir()) == [pool_dir(shm)]


@pytest.mark.parametrize(
    ("options", "slow"), [(("rw",), True), (("rw", "huge=within_size"), False)]
)
def test_memory_in_small_pages_is_slow(
    options: tuple[str, ...],
    slow: bool,
    open_tier: OpenTier,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(place, "mount_of", lambda path: Mount("tmpfs", options))
    caplog.set_level(logging.INFO, "kvstrata.tiers.pool")
    open_tier()
    assert ("mount -o remount,huge=within_size" in caplog.text) is slow


def test_shared_memory_is_missing(
    open_tier: OpenTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "SHM", tmp_path / "absent")
    said = (
        r"^type: 'pool' keeps its pages in \S+, which is missing: mount a tmpfs there, or use the"
    )
    with pytest.raises(TierConfigError, match=said):
        open_tier()


def test_shared_memory_is_a_disk(open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "file_system", lambda path: "ext4")
    with pytest.raises(TierConfigError, match="which is no tmpfs: mount a tmpfs there, or use"):
        open_tier()


def test_a_link_in_its_place(open_tier: OpenTier, shm: Path, tmp_path: Path) -> None:
    pool_dir(shm).symlink_to(tmp_path)
    with pytest.raises(
        TierConfigError, match=r"^name: 'node': \S+ is a symbolic link, .*remove it"
    ):
        open_tier()
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_its_place(open_tier: OpenTier, shm: Path) -> None:
    pool_dir(shm).touch()
    with pytest.raises(TierConfigError, match=r"^name: 'node': \S+ is not a directory; remove it"):
        open_tier()


def test_a_directory_that_lets_others_in(open_tier: OpenTier, shm: Path) -> None:
    pool_dir(shm).mkdir(0o755)
    pool_dir(shm).chmod(0o755)
    with pytest.raises(TierConfigError, match=r"^name: 'node': \S+ has mode 0755, .*chmod 700 it"):
        open_tier()


def test_a_directory_of_another_user(open_tier: OpenTier, shm: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make one")
    pool_dir(shm).mkdir(0o700)
    os.chown(pool_dir(shm), 65534, 65534)
    said = r"^name: 'node': \S+ belongs to user 65534, and not to this one \(0\); remove it, or"
    with pytest.raises(TierConfigError, match=said):
        open_tier()


def test_what_the_fs_tier_refuses_names_the_pool(open_tier: OpenTier, shm: Path) -> None:
    (pool_dir(shm) / BOOKS_NAME / LEDGER_NAME).mkdir(parents=True)
    pool_dir(shm).chmod(0o700)
    with pytest.raises(TierConfigError, match=r"^name: 'node': '\S+' cannot keep a disk budget"):
        open_tier()


def test_a_directory_that_is_made_is_ours_alone(open_tier: OpenTier, shm: Path) -> None:
    before = os.umask(0o077 ^ 0o777)
    try:
        open_tier()
    finally:
        os.umask(before)
    assert pool_dir(shm).stat().st_mode & 0o7777 == 0o700


# ---- memory ----


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Says how much of /dev/shm, of 100 GiB, and of memory is free."""

    def say(disk: int, memory: int) -> None:
        monkeypatch.setattr(place, "disk_at", lambda path: Disk(100 * GIB, disk))
        monkeypatch.setattr(place, "available_memory", lambda: memory)

    return say


def region(slots: int) -> PageRegion:
    """A CPU tier of so many MiB, none of which has memory yet."""
    return PageRegion(os.memfd_create("region"), 0, MIB, slots)


def fits(path: str, max_bytes: int, slots: int = 0) -> bool:
    try:
        place.check_fit(path, max_bytes, place.without_memory(region(slots) if slots else None))
    except TierConfigError as error:
        assert str(error).startswith("max_bytes: ") and "lower cpu_bytes_to_use" in str(error)
        return False
    return True


def test_it_must_fit_beside_the_cpu_tier(free: Callable[[int, int], None]) -> None:
    path = place.make_pool("node")
    free(65 * GIB, 80 * GIB)  # 5 GiB of /dev/shm stay free
    assert fits(path, 60 * GIB) and not fits(path, 60 * GIB + 1)
    free(90 * GIB, 60 * GIB)
    assert fits(path, 60 * GIB) and not fits(path, 60 * GIB + 1)
    assert fits(path, 50 * GIB, 10 * 1024) and not fits(path, 50 * GIB + 1, 10 * 1024)
    free(90 * GIB, 8 * GIB)
    assert not fits(path, MIB, 10 * 1024)


def test_a_cpu_tier_with_memory_takes_no_more(free: Callable[[int, int], None]) -> None:
    path = place.make_pool("node")
    free(90 * GIB, 8 * MIB)
    made = region(4)
    assert not fits(path, 8 * MIB, 4)
    os.posix_fallocate(made.fd, 0, 4 * MIB)
    place.check_fit(path, 8 * MIB, place.without_memory(made))


def test_the_remedy_is_one(free: Callable[[int, int], None]) -> None:
    path = place.make_pool("node")
    free(90 * GIB, 10 * GIB + 5)
    said = (
        "max_bytes: 64.0 GiB do not fit: the pool has 0 B, 10.0 GiB of memory can be had, and "
        '4.0 GiB of that are for the CPU tier; give at most "6144MiB", lower cpu_bytes_to_use'
    )
    with pytest.raises(TierConfigError, match=f"^{re.escape(said)}"):
        place.check_fit(path, 64 * GIB, place.without_memory(region(4 * 1024)))
    place.check_fit(path, 6144 * MIB, place.without_memory(region(4 * 1024)))


@pytest.mark.parametrize("books", [True, False])
def test_what_the_pool_holds_is_room(
    open_tier: OpenTier, free: Callable[[int, int], None], shm: Path, books: bool
) -> None:
    tier = open_tier()
    store(tier, {make_key(n): make_data(n, CONTEXT.layouts[0].nbytes) for n in range(40)})
    assert tier.shutdown(60.0)
    if not books:
        (pool_dir(shm) / BOOKS_NAME / LEDGER_NAME).unlink()
    free(90 * GIB, 0)
    assert fits(str(pool_dir(shm)), 40 * 8192) and not fits(str(pool_dir(shm)), MIB)


def test_the_tier_asks(open_tier: OpenTier, free: Callable[[int, int], None]) -> None:
    free(90 * GIB, 3 * GIB)
    with pytest.raises(TierConfigError, match=r"^max_bytes: 8\.0 GiB do not fit: "):
        open_tier(max_bytes="8GiB")
