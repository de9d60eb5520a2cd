"""Servers of a disk budget in this process, and what the tests of it look at."""

import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from kvstrata.tiers.base import TierContext
from kvstrata.tiers.fs.budget import member as member_module
from kvstrata.tiers.fs.budget.ledger import Books
from kvstrata.tiers.fs.budget.limits import file_cost
from kvstrata.tiers.fs.budget.member import Member
from kvstrata.tiers.fs.budget.stamps import first_access
from kvstrata.tiers.fs.config import FsConfig
from kvstrata.tiers.fs.files.namespace import namespace_paths
from kvstrata.tiers.fs.page_files import PageFiles
from kvstrata.tiers.fs.startup import make_root, open_books, open_namespace
from kvstrata.tiers.process.medium import News, PageRef
from kvstrata.tiers.testing import CONTEXT, make_data, make_key

GROUP = 2
SIZE = CONTEXT.layouts[GROUP].nbytes
COST = file_cost(SIZE + 4096)
BUDGET = 100 * COST
REST_TURNS = 3  # idle ones in a row after which nothing more can come


class _TurningMember(Member):
    """A space that counts its idle turns, and of which nobody else sees the thread's faults."""

    turned = threading.Condition()  # of all spaces

    def __init__(self, *args: Any, **more: Any) -> None:
        self.idle = 0
        super().__init__(*args, **more)

    def _tick(self) -> bool:
        busy = super()._tick()
        with self.turned:
            self.idle = 0 if busy or self._events or self._pending else self.idle + 1
            self.turned.notify_all()
        return busy


class Server:
    """One server of a budget, with its files, all in this process.

    It stores and loads at once and answers with what became of it. The books are kept on the
    space's thread, or, if `driven`, whenever `turn` is called.
    """

    def __init__(
        self,
        root: Path,
        context: TierContext = CONTEXT,
        *,
        keeps: bool = True,
        engine: int | None = None,
        **options: Any,
    ) -> None:
        (config,) = map(make_root, FsConfig.parse({"root_dir": str(root), **options}))
        self.failures: Counter[str] = Counter()
        self.details: list[str] = []
        self.news: list[News] = []
        self.said: list[str] = []
        self.is_behind = self.is_complete = False
        self.done: Counter[str] = Counter()
        self.gauges: dict[str, float] = {}
        self.samples: defaultdict[str, list[float]] = defaultdict(list)
        self._access = first_access() if engine is None else engine << 40
        self.paths = namespace_paths(config.root_dir, context.model, context.namespace)
        open_namespace(config, self.paths, context.namespace)
        limits = open_books(config)
        assert limits is not None
        modes = config.file_mode, config.dir_mode
        self.member = _TurningMember(str(root), self.paths.name, limits, *modes, self, keeps)
        self.files = PageFiles(config, context, self.paths, False, self.report, self.member)

    def report(self, cause: str, detail: str) -> None:
        self.failures[cause] += 1
        self.details.append(detail)

    def say(self, text: str) -> None:
        self.said.append(text)

    def tell(self, news: Sequence[News]) -> None:
        self.news += news

    def complete(self, complete: bool) -> None:
        self.is_complete = complete

    def upkeep(self, done: Mapping[str, int]) -> None:
        self.done.update(done)

    def figures(
        self, gauges: Mapping[str, float], samples: Mapping[str, Sequence[float]] = {}
    ) -> None:
        self.gauges = dict(gauges)
        for name, values in samples.items():
            self.samples[name] += values

    def trust(self, trusted: bool) -> None:
        """Only a medium tells."""

    def access(self) -> int:
        self._access += 1
        return self._access

    def put(
        self,
        numbers: Collection[int],
        group: int = GROUP,
        access: int | None = None,
        rewrite: bool = False,
    ) -> dict[int, str]:
        """Store the pages by one access each, or all by `access`; the causes of failures.

        The pages of a given access are `16 * (number + 1)` tokens deep.
        """
        failed = {}
        for number in numbers:
            data = bytearray(make_data(number, CONTEXT.layouts[group].nbytes))
            depth = 0 if access is None else 16 * (number + 1)
            page = PageRef(make_key(number, group), depth, rewrite)
            found = self.files.store(page, memoryview(data), access or self.access())
            if found.cause is not None:
                failed[number] = found.cause
                self.report(found.cause, found.detail)
        return failed

    def get(
        self, numbers: Collection[int], group: int = GROUP, access: int | None = None
    ) -> set[int]:
        """Load pages and compare them; those that arrived."""
        arrived = set()
        for number in numbers:
            data = bytearray(CONTEXT.layouts[group].nbytes)
            page = PageRef(make_key(number, group))
            found = self.files.load(page, memoryview(data), access or self.access())
            if found.cause is not None:
                self.report(found.cause, found.detail)
            else:
                assert data == make_data(number, len(data)), "wrong bytes"
                arrived.add(number)
        return arrived

    def use(self, numbers: Collection[int], group: int = GROUP) -> None:
        access = self.access()
        for number in numbers:
            self.member.used(make_key(number, group), 0, access)

    def promise(self, numbers: Collection[int], group: int = GROUP) -> None:
        access = self.access()
        for number in numbers:
            self.member.promised(make_key(number, group), access)

    def there(self, numbers: Collection[int], group: int = GROUP) -> set[int]:
        """Which of the pages are on the disk, without asking the server."""
        return {n for n in numbers if os.path.exists(self.paths.page(make_key(n, group)))}

    @contextmanager
    def books(self) -> Iterator[Books]:
        with self.member._ledger.locked() as books:
            yield books

    @property
    def id(self) -> bytes:
        return self.member._ledger.member

    def keeps(self) -> bool:
        """Whether it is the keeper."""
        with self.books() as books:
            return books.keeper == self.id

    def turn(self) -> bool:
        """Do what the thread does in one turn; True if there is more to do."""
        return self.member._tick()

    def leave(self) -> None:
        """What `close` does, for one that is driven."""
        self.member._leave()
        if self.member._lease is not None:
            self.member._lease.close()
        self.member._ledger.close()

    def die(self) -> None:
        """As if the process of one that is driven had been killed."""
        lease = self.member._lease
        if lease is not None:
            os.close(lease._fd)
        self.member._ledger.close()

    def close(self) -> None:
        assert self.member.close(60.0)
        assert self.failures["internal"] == 0


def rest(*servers: Server) -> None:
    """Wait until everything that the servers did is booked, and nothing is left to do."""
    for server in servers:
        server.member.idle = 0
    deadline = time.monotonic() + 60.0
    with _TurningMember.turned:
        while not (all(s.member.idle >= REST_TURNS for s in servers) and _booked(servers[0])):
            assert _TurningMember.turned.wait(deadline - time.monotonic()), "no rest"


def _booked(server: Server) -> bool:
    with server.books() as books:
        return books.known and not any(row.reserved_files for row in books.rows.values())


def rest_driven(*servers: Server) -> None:
    """The same for servers that are driven."""
    idle = 0
    deadline = time.monotonic() + 60.0
    while idle < REST_TURNS:
        assert time.monotonic() < deadline, "no rest"
        busy = [server.turn() for server in servers]
        waits = any(server.member._events or server.member._pending for server in servers)
        idle = 0 if any(busy) or waits or not _booked(servers[0]) else idle + 1


def make_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_module, "REPEAT_S", -1.0)
    monkeypatch.setattr(member_module, "TICK_S", 0.002)
    monkeypatch.setattr(member_module, "SLICE_S", 0.002)
    monkeypatch.setattr(member_module, "_BEAT_S", 0.02)
    # on a busy machine the space's thread may take long to make room
    monkeypatch.setattr("kvstrata.tiers.fs.budget.admission.WAIT_S", 60.0)


def drive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Member, "_run", lambda member: None)
    monkeypatch.setattr("kvstrata.tiers.fs.budget.admission.WAIT_S", 0.0)
    monkeypatch.setattr(member_module, "SLICE_S", 0.0)  # a scan goes on by one file
    monkeypatch.setattr(member_module, "_BEAT_S", 0.0)


def disk_usage(root: Path) -> tuple[int, int]:
    """Bytes, directories included, and files, each inode once."""
    found: dict[int, tuple[int, bool]] = {}
    for directory, _, names in os.walk(root):
        for path in (directory, *(os.path.join(directory, name) for name in names)):
            with suppress(FileNotFoundError):
                status = os.lstat(path)
                found[status.st_ino] = (status.st_blocks * 512, path != directory)
    return sum(size for size, _ in found.values()), sum(is_file for _, is_file in found.values())


def are_the_last(left: set[int], numbers: Sequence[int]) -> bool:
    """Whether just the pages that were stored last are left."""
    return left == set(numbers[len(numbers) - len(left) :])
