"""What a tier of the demos needs: a server, started and ended here, memory, or a directory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from passes import ROOT

from kvstrata.tiers.pool.tools import PoolKept, remove_pool

sys.path.append(str(ROOT))  # for the servers of the tests
from tests.tiers.mooncake.pool import Master, Peer, why_not
from tests.tiers.object.server import BUCKET, S3Server, credentials
from tests.tiers.object.server import server_binary as s3_binary
from tests.tiers.valkey.server import Server as ValkeyServer
from tests.tiers.valkey.server import server_binary as valkey_binary

POOL = "kvstrata-demo"


@contextmanager
def files(folder: Path) -> Iterator[dict[str, Any]]:
    """A directory."""
    yield {"root_dir": str(folder / "kv")}


@contextmanager
def bucket(folder: Path) -> Iterator[dict[str, Any]]:
    """A bucket of SeaweedFS; its credentials are in the environment, as the tier wants them."""
    if (weed := s3_binary()) is None:
        raise RuntimeError("no server that speaks S3 is installed: run `make install`")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(credentials(folder))
    server = S3Server(weed, folder)
    try:
        yield {"url": f"s3://{BUCKET}/kv", "endpoint": server.endpoint}
    finally:
        server.close()


@contextmanager
def values(folder: Path) -> Iterator[dict[str, Any]]:
    """A Valkey server that evicts what was not loaded for long."""
    if valkey_binary() is None:
        raise RuntimeError("no Valkey server is installed: run `make install`")
    server = ValkeyServer(folder, "--maxmemory", "1gb", "--maxmemory-policy", "allkeys-lru")
    try:
        yield {"url": server.url}
    finally:
        server.kill()


@contextmanager
def pool(folder: Path) -> Iterator[dict[str, Any]]:
    """Shared memory; what a killed demo left of it goes first."""
    _remove_pool()
    try:
        yield {"name": POOL, "max_bytes": "1GiB"}
    finally:
        _remove_pool()


def _remove_pool() -> None:
    try:
        with suppress(FileNotFoundError):
            remove_pool(POOL)
    except PoolKept as error:  # by another demo
        raise RuntimeError(str(error)) from error


@contextmanager
def lent_memory(folder: Path) -> Iterator[dict[str, Any]]:
    """A Mooncake master, and a process that lends memory."""
    if why := why_not():
        raise RuntimeError(why)
    with ExitStack() as started:
        master = Master("--client_ttl=60")  # a lender that has no core for a while stays one
        started.callback(master.kill)
        started.callback(Peer(master, 2**29).kill)
        yield {"master": master.address}


# By the tier's type, what starts all that it needs and says the tier's options.
TIERS: dict[str, Callable[[Path], AbstractContextManager[dict[str, Any]]]] = {
    "fs": files,
    "object": bucket,
    "valkey": values,
    "mooncake": lent_memory,
    "pool": pool,
}
