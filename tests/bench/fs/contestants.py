"""Who is measured: kvstrata's tier, stock vLLM's, and the device itself.

All work on the same pages in the same shared memory, with 32 threads each.
"""

from __future__ import annotations

import importlib.util
import mmap
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from kvstrata.tiers.base import Lookup, RequestView
from kvstrata.tiers.fs.files.direct_io import probe_direct
from kvstrata.tiers.fs.tier import FsTier
from tests.bench.jobs import POLL_S, REQUEST, Memory, TierJobs, WrongBytes, context, in_jobs

_THREADS = 16  # of the readers and of the writers, which is the default of both tiers


class Contestant(Protocol):
    """What moves pages between a directory of its own and the memory."""

    name: str

    def move(self, store: bool, keys: Sequence[bytes], per_job: int) -> list[float]:
        """Store or load key i to or from slot i, in jobs of `per_job` pages.

        Returns:
            Seconds from the beginning to the end of each job; a single number from who knows
            no jobs.

        Raises:
            WrongBytes: a job failed.
        """

    def pids(self) -> list[int]:
        """Its processes besides this one."""

    def paths(self, keys: Sequence[bytes]) -> list[str]:
        """The files of the pages."""

    def clear(self, keys: Sequence[bytes]) -> None:
        """Give the space of the pages back."""

    def close(self) -> None:
        """End it."""


class Tier(Contestant, Protocol):
    """A tier is asked for keys, too: `lookup(key, request)` is `hit` where the page is there."""

    lookup: Callable[[Any, Any], object]
    request: Any
    hit: object
    miss: object

    def learn(self, pages: int) -> None:
        """Wait until it knows all pages that are there, so many, if it learns by itself."""

    def end_step(self) -> None:
        """What the scheduler calls at the end of a step."""


class Ours(TierJobs):
    """kvstrata's tier."""

    _tier: FsTier

    def __init__(
        self, root: Path, memory: Memory, options: Mapping[str, Any] | None = None
    ) -> None:
        place = {"root_dir": str(root / self.name), **(options or {})}
        super().__init__(FsTier(place, context(memory)), memory)
        self.lookup: Callable[[Any, Any], object] = self._tier.lookup
        self.request: Any = RequestView(REQUEST)
        self.hit: object = Lookup.HIT
        self.miss: object = Lookup.MISS

    def learn(self, pages: int) -> None:
        while self._tier.stats().gauges["pages"] < pages or not all(
            each.complete for each in self._tier.processes
        ):
            time.sleep(POLL_S)

    def end_step(self) -> None:
        self._tier.on_step_end()

    def paths(self, keys: Sequence[bytes]) -> list[str]:
        return [self._tier.paths[0].page(key) for key in keys]

    def clear(self, keys: Sequence[bytes]) -> None:
        _empty(self.paths(keys))


class Stock:
    """vLLM's FileSystemTierManager, with its C extension."""

    name = "stock"

    def __init__(self, root: Path, memory: Memory) -> None:
        from vllm.v1.kv_offload.base import LookupResult, ReqContext
        from vllm.v1.kv_offload.tiering.base import TransferJob
        from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager

        shape = (memory.region.slots, memory.region.slot_bytes)
        self._tier: Any = FileSystemTierManager(
            _stock_spec(), memory.view.cast("B", shape), "fs", str(root / self.name)
        )
        self._job: Any = TransferJob
        self.lookup: Callable[[Any, Any], object] = self._tier.lookup
        self.request: Any = ReqContext(REQUEST)
        self.hit: object = LookupResult.HIT
        self.miss: object = LookupResult.MISS

    def move(self, store: bool, keys: Sequence[bytes], per_job: int) -> list[float]:
        import numpy as np

        submit_job = self._tier.submit_store if store else self._tier.submit_load

        def submit(job_id: int, slots: range) -> None:
            chosen = keys[slots.start : slots.stop]
            submit_job(self._job(job_id, chosen, np.array(slots), not store, self.request))

        return in_jobs(len(keys), per_job, submit, self._finished)

    def _finished(self) -> list[bool]:
        return [result.success for result in self._tier.get_finished_jobs()]

    def learn(self, pages: int) -> None:
        """It does not."""

    def end_step(self) -> None:
        self._tier.on_schedule_end(None)

    def pids(self) -> list[int]:
        return []

    def paths(self, keys: Sequence[bytes]) -> list[str]:
        return [self._tier.file_mapper.get_file_name(key) for key in keys]

    def clear(self, keys: Sequence[bytes]) -> None:
        _empty(self.paths(keys))

    def close(self) -> None:
        self._tier.shutdown()


class Raw:
    """The device: a file per page in one call, without header, checksum, rename or jobs.

    It overwrites the same files in place, so that the file system has little part in it, and
    works in two processes, as our tier does, so that a busy engine is not in its way.
    """

    name = "raw"

    def __init__(self, root: Path, memory: Memory) -> None:
        self._directory = root / self.name
        self._directory.mkdir()
        direct = os.O_DIRECT if probe_direct(str(self._directory)) else 0
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(2):
            ours, theirs = context.Pipe()
            arguments = (theirs, memory.path, memory.region.slot_bytes, direct)
            process = context.Process(target=_move_raw, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def move(self, store: bool, keys: Sequence[bytes], per_job: int) -> list[float]:
        files = [(path, slot) for slot, path in enumerate(self.paths(keys))]
        start = time.perf_counter()
        for number, pipe in enumerate(self._pipes):
            pipe.send((store, files[number :: len(self._pipes)]))
        if not all([pipe.recv() for pipe in self._pipes]):
            raise WrongBytes(f"{self.name}: a file was written or read in part only")
        return [time.perf_counter() - start]

    def pids(self) -> list[int]:
        return [process.pid for process in self._processes if process.pid]

    def paths(self, keys: Sequence[bytes]) -> list[str]:
        return [str(self._directory / str(slot)) for slot in range(len(keys))]

    def clear(self, keys: Sequence[bytes]) -> None:
        """Nothing: the next store overwrites them."""

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()


def _move_raw(pipe: Connection, memory: str, page_bytes: int, direct: int) -> None:
    """A process of `Raw`."""
    fd = os.open(memory, os.O_RDWR)
    view = memoryview(mmap.mmap(fd, 0))

    def move(store: bool, path: str, slot: int) -> bool:
        page = view[slot * page_bytes : (slot + 1) * page_bytes]
        flags = os.O_WRONLY | os.O_CREAT if store else os.O_RDONLY
        file = os.open(path, flags | direct, 0o600)
        moved = os.pwrite(file, page, 0) if store else os.preadv(file, [page], 0)
        os.close(file)
        return moved == page_bytes

    with ThreadPoolExecutor(_THREADS) as threads:
        while True:
            try:
                store, files = pipe.recv()
            except EOFError:
                return
            moves = [threads.submit(move, store, path, slot) for path, slot in files]
            pipe.send(all([each.result() for each in moves]))


def contestants(root: Path, memory: Memory) -> list[Contestant]:
    """All of them, stock where it is installed."""
    return [*tiers(root, memory), Raw(root, memory)]


def tiers(root: Path, memory: Memory) -> list[Tier]:
    """Those that can be asked for keys."""
    return [Ours(root, memory), *([Stock(root, memory)] if has_stock() else [])]


def has_stock() -> bool:
    """Whether vLLM is installed with the C extension of its filesystem tier."""
    return bool(importlib.util.find_spec("vllm") and importlib.util.find_spec("vllm.fs_io_C"))


def _empty(paths: Sequence[str]) -> None:
    """Give the space back, and keep the files.

    ext4 without a journal looks at every inode that was freed in the last minute before it
    makes a new file (`recently_deleted` in fs/ext4/ialloc.c), so to remove them would slow
    down the stores that follow.
    """
    for path in paths:
        os.truncate(path, 0)


def _stock_spec() -> Any:
    """What FileSystemTierManager asks an OffloadingSpec for: names for its directory."""
    config = SimpleNamespace(
        groups=[],
        parallel=SimpleNamespace(
            tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, rank=0, is_parallelism_agnostic=True
        ),
        model=SimpleNamespace(name=REQUEST, dtype="uint8"),
        cache=SimpleNamespace(tokens_per_hash=16),
        canonical_layout=False,
        replicated_layout=False,
    )
    return SimpleNamespace(config=config, blocks_per_chunk=1)
