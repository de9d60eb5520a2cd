"""The room that stays free by default, and what is said of limits at the start."""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.tiers.base import TierConfigError
from kvstrata.tiers.fs import startup
from kvstrata.tiers.fs.budget import limits as limits_module
from kvstrata.tiers.fs.budget.ledger import Books
from kvstrata.tiers.fs.budget.limits import Limits, default_floor
from kvstrata.tiers.fs.config import FsConfig
from kvstrata.tiers.fs.startup import limits_of, say_limits
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.machine import disk as disk_module
from kvstrata.tiers.machine.disk import UNBOUNDED, disk_at
from kvstrata.tiers.testing import CONTEXT, make_data, make_key, store

MIB, GIB = 2**20, 2**30


@pytest.fixture(autouse=True)
def the_default(monkeypatch: pytest.MonkeyPatch, disk_of_any_fullness: None) -> None:
    """That of users, which other tests do without."""
    monkeypatch.setattr(startup, "default_floor", limits_module.default_floor)


def pretend(monkeypatch: pytest.MonkeyPatch, total: int, free: int) -> None:
    """A file system of so many bytes."""
    found = SimpleNamespace(f_frsize=4096, f_blocks=total // 4096, f_bavail=free // 4096)
    monkeypatch.setattr(disk_module.os, "statvfs", lambda path: found)


def config_of(root: Path, **options: object) -> FsConfig:
    root.mkdir(exist_ok=True)
    (config,) = FsConfig.parse({"root_dir": str(root), **options})
    return config


@pytest.mark.parametrize(
    ("total", "floor"),
    [
        (0, 0),  # it tells no size
        (64 * MIB, 64 * MIB // 10),
        (5 * GIB, GIB // 2),
        (10 * GIB, GIB),
        (20 * GIB, GIB),
        (100 * GIB, 5 * GIB),
        (4096 * GIB, 4096 * GIB // 20),
    ],
)
def test_the_default_floor(total: int, floor: int) -> None:
    assert default_floor(total) == floor


@given(st.integers(0, 2**60), st.integers(0, 2**60))
def test_more_disk_is_more_room(one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert default_floor(small) <= default_floor(large) <= large // 10
    assert small - default_floor(small) <= large - default_floor(large)


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({}, Limits(0, 0, 5 * GIB)),
        ({"max_bytes": "10GiB", "max_files": 9}, Limits(10 * GIB, 9, 5 * GIB)),
        ({"min_free_bytes": "1%"}, Limits(0, 0, GIB)),
        ({"min_free_bytes": "2MiB"}, Limits(0, 0, 2 * MIB)),
        ({"min_free_bytes": 0}, Limits()),
        ({"min_free_bytes": "0"}, Limits()),
    ],
)
def test_it_is_inherited(
    root: Path, options: dict[str, object], limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(root, **options)
    pretend(monkeypatch, 100 * GIB, 50 * GIB)
    assert limits_of(config) == limits


@pytest.mark.parametrize("key", ["max_bytes", "min_free_bytes"])
def test_a_file_system_without_a_size(
    root: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tmpfs without a limit reports no blocks; that is not a full one."""
    plain, share = config_of(root), config_of(root, **{key: "50%"})
    pretend(monkeypatch, 0, 0)
    assert disk_at(root) == (0, UNBOUNDED) and limits_of(plain) == Limits()
    assert Books().usage(str(root)).free_bytes == UNBOUNDED
    with pytest.raises(TierConfigError, match=f"{key}: .* reports no size, .*; give bytes"):
        limits_of(share)


def test_a_file_system_without_a_size_for_real(tmp_path: Path) -> None:
    unlimited = tmp_path / "unlimited"
    unlimited.mkdir()
    if os.system(f"mount -t tmpfs -o size=0 tmpfs {unlimited} 2>/dev/null") != 0:
        pytest.skip("a file system cannot be mounted here")
    try:
        tier = FsTier({"root_dir": str(unlimited / "kv")}, CONTEXT)
        data = {make_key(n): make_data(n, CONTEXT.layouts[0].nbytes) for n in range(5)}
        failed = store(tier, data).failed
        assert tier.shutdown(60.0)
        assert not failed
    finally:
        os.system(f"umount --lazy {unlimited}")


@pytest.mark.parametrize(
    ("options", "total", "free", "words"),
    [
        ({}, 100 * GIB, 50 * GIB, "no limit is set for .* all but 5.0 GiB .*of the 100.0 GiB"),
        ({"min_free_bytes": 0}, 100 * GIB, 50 * GIB, "no limit is set for .* all of the 100.0 GiB"),
        ({}, 0, 0, "no limit is set for .* all of the space there"),
        ({"max_bytes": "1GiB"}, 100 * GIB, 50 * GIB, None),
        ({"max_files": 9}, 100 * GIB, 50 * GIB, None),
        (
            {"max_bytes": "1GiB"},
            100 * GIB,
            4 * GIB,
            r"4.0 GiB are free .* and 5.0 GiB are to stay free: .* a smaller min_free_bytes",
        ),
    ],
)
def test_what_is_said_at_the_start(
    root: Path,
    options: dict[str, object],
    total: int,
    free: int,
    words: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = config_of(root, **options)
    pretend(monkeypatch, total, free)
    with caplog.at_level(logging.INFO):
        say_limits(config, limits_of(config))
    if words is None:
        assert caplog.messages == []
    else:
        (said,) = caplog.messages
        assert re.search(words, said), said


def test_the_tier_keeps_it(
    root: Path, open_tier: Callable[..., FsTier], caplog: pytest.LogCaptureFixture
) -> None:
    """A file system that is fuller than that takes no page, and one that is not takes some."""
    with caplog.at_level(logging.INFO):
        tier = open_tier()
    assert any("no limit is set for" in message for message in caplog.messages)
    assert tier.drain(60.0)
    least = default_floor(disk_at(root).total)
    assert least > 0 and limits_of(config_of(root)).min_free_bytes == least
