"""What others can do to an engine through the ports that its I/O processes open."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.tiers.base import TierConfigError
from kvstrata.tiers.mooncake import rdma
from kvstrata.tiers.testing import CONTEXT, find, load, make_data, make_key, store
from tests.tiers.mooncake.conftest import OpenTier
from tests.tiers.mooncake.pool import LEAST_SEGMENT, Master, Peer

PAGE = {make_key(1): make_data(1, CONTEXT.layouts[0].nbytes)}


def test_nobody_reaches_the_engines_pages(open_tier: OpenTier, master: Master, peer: Peer) -> None:
    """Only the memory that is lent, whose pages are verified when they are loaded."""
    tier = open_tier(master, segment=LEAST_SEGMENT)
    assert not store(tier, PAGE).failed
    find(tier, *PAGE)
    assert load(tier, list(PAGE))[1] == PAGE
    reader, writer = tier.processes[0].pids()
    assert [0, 0] in [peer.peek(port) for port in listening(writer)]
    for process in (reader, writer):
        for port in listening(process):
            read, written = peer.peek(port, pages_of(process))
            assert read != 0 and written != 0


def test_without_a_device_there_is_no_rdma(
    open_tier: OpenTier, master: Master, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library would take TCP, and lay open what is registered."""
    monkeypatch.setattr(rdma, "DEVICES", tmp_path / "class")
    monkeypatch.setattr(rdma, "NODES", tmp_path / "dev")
    refused = r"^protocol: 'rdma' needs a device .*give \"tcp\"$"
    with pytest.raises(TierConfigError, match=refused):
        open_tier(master, protocol="rdma")
    for port, state in ((1, "1: DOWN"), (2, "4: ACTIVE")):
        folder = tmp_path / "class" / "mlx5_0" / "ports" / str(port)
        folder.mkdir(parents=True)
        (folder / "state").write_text(f"{state}\n")
    (tmp_path / "class/mlx5_0/device/infiniband_verbs/uverbs0").mkdir(parents=True)
    with pytest.raises(TierConfigError, match=refused):
        open_tier(master, protocol="rdma")
    assert not rdma.has_device()
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/uverbs0").touch(0o600)
    assert rdma.has_device()
    (tmp_path / "class/mlx5_0/ports/2/state").write_text("1: DOWN\n")
    assert not rdma.has_device()


def listening(pid: int) -> list[int]:
    """The ports on which the process waits for others; there are some."""
    sockets = {os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()}
    found = [port for port, inode in _waiting(pid) if f"socket:[{inode}]" in sockets]
    assert found
    return found


def _waiting(pid: int) -> Iterator[tuple[int, str]]:
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                yield int(fields[1].rpartition(":")[2], 16), fields[9]


def pages_of(pid: int) -> int:
    """Where the engine's pages lie in the process."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "kvstrata-test-pages" in line:
            return int(line.partition("-")[0], 16)
    raise AssertionError("they are not there")
