"""What is measured: each tier's options, its client's loop, and the server where it needs one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.machine.memory import SHM
from kvstrata.tiers.pool import place
from kvstrata.tiers.pool.place import pool_path
from kvstrata.tiers.process.tier import ProcessTier
from tests.tiers.mooncake.pool import Master, Peer
from tests.tiers.object.conftest import weed_binary
from tests.tiers.object.server import BUCKET, S3Server, credentials
from tests.tiers.valkey.server import Server


@dataclass(frozen=True)
class Medium:
    """A place for pages.

    Attributes:
        options: the tier's entry of `secondary_tiers`.
        loop: the function of `loops` that moves pages as the client itself does.
        argument: what it is called with.
        threads: of each of its two processes, as many as the tier has.
        before_load: what is to be done before pages are loaded again.
        clear: gives the room of a round's pages back.
    """

    options: Mapping[str, Any]
    loop: str
    argument: Any
    threads: int
    before_load: Callable[[ProcessTier, Sequence[bytes]], None] = lambda tier, keys: None
    clear: Callable[[], None] = lambda: None


@contextmanager
def _fs(folder: Path) -> Iterator[Medium]:
    raw = folder / "raw"
    raw.mkdir()
    yield Medium(
        {"type": "fs", "root_dir": str(folder / "root")}, "files", str(raw), 16, _out_of_cache
    )


def _out_of_cache(tier: ProcessTier, keys: Sequence[bytes]) -> None:
    assert isinstance(tier, FsTier)
    for key in keys:
        fd = os.open(tier.paths[0].page(key), os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


@contextmanager
def _pool(folder: Path, shm: Path = SHM) -> Iterator[Medium]:
    name = f"bench-{os.getpid()}"
    raw = shm / f"kvstrata-bench-{os.getpid()}"
    raw.mkdir()
    options = {"type": "pool", "name": name, "max_bytes": "2GiB"}

    def clear() -> None:
        for file in raw.iterdir():
            file.unlink()

    try:
        yield Medium(options, "memory", str(raw), 16, clear=clear)
    finally:
        shutil.rmtree(raw)
        shutil.rmtree(pool_path(name))


@contextmanager
def _pool_in_huge_pages(folder: Path) -> Iterator[Medium]:
    """Where `/dev/shm` is mounted as docs/tiers.md recommends; another mount takes its place."""
    shm = folder / "shm"
    shm.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "huge=within_size,size=8G", "none", str(shm)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"only root can mount what is measured: {mounted.stderr.strip()}")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, "SHM", shm)
            with _pool(folder, shm) as medium:
                yield medium
    finally:
        subprocess.run(["umount", "--lazy", str(shm)], check=True)


@contextmanager
def _object(folder: Path) -> Iterator[Medium]:
    with pytest.MonkeyPatch.context() as environment:
        for name, value in credentials(folder).items():
            environment.setenv(name, value)
        server = S3Server(weed_binary(), folder)
        options = {"url": f"s3://{BUCKET}/kv", "endpoint": server.endpoint, "timeout_s": 10.0}
        try:
            yield Medium({"type": "object", **options}, "objects", options, 16)
        finally:
            server.close()


@contextmanager
def _valkey(folder: Path) -> Iterator[Medium]:
    server = Server(folder, "--maxmemory", "2gb", "--maxmemory-policy", "allkeys-lru")
    options = {"url": server.url, "timeout_s": 10.0}
    try:
        yield Medium(
            {"type": "valkey", **options},
            "values",
            options,
            4,
            clear=lambda: server.ask("FLUSHALL"),
        )
    finally:
        server.kill()


@contextmanager
def _mooncake(folder: Path) -> Iterator[Medium]:
    master = Master()
    peer = Peer(master, 2**31)
    options = {"master": master.address, "timeout_s": 5.0}
    try:
        yield Medium({"type": "mooncake", **options}, "lent_memory", options, 4, clear=peer.clear)
    finally:
        peer.kill()
        master.kill()


MEDIA: Mapping[str, Callable[[Path], AbstractContextManager[Medium]]] = {
    "fs": _fs,
    "pool": _pool,
    "pool-huge": _pool_in_huge_pages,
    "object": _object,
    "valkey": _valkey,
    "mooncake": _mooncake,
}
