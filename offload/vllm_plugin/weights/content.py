"""SHA-256 of whole files, each from where it is cheapest: the hub, the memory, or every byte.

SHA-256 and not a faster hash, because then a model in Hugging Face's cache, of which nothing need
be read, and its copy in a directory have the same name, on every host. A file is one sequence for
SHA-256: threads and ranks share files, not pieces of one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias, TypeVar

from kvstrata.offload.vllm_plugin.weights.hub import hub_digest
from kvstrata.offload.vllm_plugin.weights.identity import Identity, identity_of
from kvstrata.offload.vllm_plugin.weights.memory import SETTLED_NS, DigestMemory
from kvstrata.tiers.options import format_bytes

logger = logging.getLogger("kvstrata")

READ_BYTES = 8 << 20  # one system call is nothing beside hashing that much
MOST_THREADS = 16  # of a host; disks are not faster with more
# What is said in the log, and what is worth waiting until it may be remembered
LARGE_BYTES = 1 << 30
T = TypeVar("T")


# A collective of the processes of one host that do this together, in the same order: the value of
# every process, in the order of ranks.
Gather: TypeAlias = Callable[[Any], list[Any]]


class Found(NamedTuple):
    """A file, and its SHA-256 if no byte need be read for it."""

    identity: Identity
    digest: str | None


class Attempt(NamedTuple):
    """What came of an action on one rank: a value, or an error's text."""

    value: Any
    error: str | None = None


def attempt(action: Callable[[], Any]) -> Attempt:
    """The outcome of `action`, so that every rank reaches the next collective."""
    try:
        return Attempt(action())
    except Exception as error:
        return Attempt(None, f"{error}" or type(error).__name__)


def find_digests(paths: Iterable[str], memory: DigestMemory) -> dict[str, Found]:
    """What is known of each file. No file is opened.

    Raises:
        OSError: one is missing or no regular file.
    """
    found = {}
    for path in paths:
        identity = identity_of(path)
        found[path] = Found(identity, hub_digest(path) or memory.get(identity))
    return found


def share(found: dict[str, Found], ranks: int) -> list[list[str]]:
    """The paths that each rank is to read: about as many bytes each, none twice."""
    unread: dict[Identity, str] = {}
    for path, (identity, digest) in found.items():
        if digest is None:
            unread.setdefault(identity, path)  # a link need not be read again
    shares: list[list[str]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for identity, path in sorted(unread.items(), key=lambda each: -each[0].size):
        least = loads.index(min(loads))
        shares[least].append(path)
        loads[least] += identity.size
    return shares


def read_digests(
    paths: Sequence[str], found: dict[str, Found], memory: DigestMemory, threads: int
) -> dict[Identity, str]:
    """Read the files whole, in parallel, and remember what came of it.

    Raises:
        OSError: one cannot be read, or changes meanwhile.
    """
    if not paths:
        return {}
    total = sum(found[path].identity.size for path in paths)
    if total >= LARGE_BYTES:
        logger.info(
            "kvstrata reads %s of weight files to give their pages a name (remembered until "
            "they change, where the file system keeps exact change times)",
            format_bytes(total),
        )

    def read(path: str) -> str:
        identity = found[path].identity
        _settle(identity)
        began = time.time_ns()
        digest = read_digest(path, identity)
        memory.put(identity, digest, began_ns=began)
        return digest

    with ThreadPoolExecutor(max(1, min(threads, len(paths)))) as pool:
        return {
            found[path].identity: digest
            for path, digest in zip(paths, pool.map(read, paths), strict=True)
        }


def read_digest(path: str, identity: Identity) -> str:
    """SHA-256 in hex of every byte.

    Raises:
        OSError: it cannot be read, or is not, before and after, what `identity` says.
    """
    sha = hashlib.sha256()
    buffer = bytearray(min(READ_BYTES, identity.size + 1))
    view = memoryview(buffer)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(fd, "rb", buffering=0) as file:
        same = identity_of(fd) == identity
        while same and (count := file.readinto(buffer)):
            sha.update(view[:count])
        if not same or identity_of(fd) != identity:
            raise OSError(f"{path} changes while it is read")
    return sha.hexdigest()


def threads_for(ranks: int) -> int:
    """Threads of each of `ranks` processes on this host."""
    return max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // ranks))


def _settle(identity: Identity) -> None:
    """Wait out the moment in which a large file could not be remembered."""
    if identity.size >= LARGE_BYTES:
        age = time.time_ns() - identity.ctime_ns
        if 0 <= age < SETTLED_NS:
            time.sleep((SETTLED_NS - age) / 1e9)
