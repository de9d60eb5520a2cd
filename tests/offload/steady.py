"""A tier that reads pages one after the other, at a steady speed, by the world's clock."""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from kvstrata.offload.finding.lookup import Answer
from kvstrata.tiers.base import Job, JobResult, Lookup, Page, RequestView, SecondaryTier, TierStats
from tests.offload.manager_world import World, chunk, content

Item = tuple[bytes, int]


def prefix(count: int, number: int = 0, group: int = 0) -> list[Item]:
    """Keys and ends of a long prefix's chunks."""
    items = [chunk(number, 0, group)] * count
    return [
        (key[:2] + index.to_bytes(4, "big") + key[-4:], end * (index + 1))
        for index, (key, end) in enumerate(items)
    ]


class SteadyTier(SecondaryTier):
    """Has every page of `items`; nothing else is stored.

    Attributes:
        per_second: pages that it reads in a second; may change.
        tells: whether it reports pages before their job's end.
        bad: keys of which the file is gone.
        reads: pages read so far, in their order.
        stalls_at: it reads so many pages and no more.
    """

    medium = "STORAGE"

    def __init__(self, items: Sequence[Item], per_second: float, *, tells: bool = False) -> None:
        self.has = {key for key, _ in items}
        self.per_second = per_second
        self.tells = tells
        self.bad: set[bytes] = set()
        self.stalls_at = 10**9
        self.reads: list[bytes] = []
        self.world: World | None = None
        self.jobs: list[Job] = []
        self._queue: deque[tuple[Job, Page | None]] = deque()
        self._failed: dict[int, dict[bytes, str]] = {}
        self._arrived: dict[int, list[bytes]] = {}
        self._done: list[JobResult] = []
        self._now = 0.0
        self._owed = 0.0

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None: ...

    @property
    def waiting(self) -> int:
        """Pages that it was given and has not read."""
        return sum(page is not None for _, page in self._queue)

    def lookup(self, key: bytes, request: RequestView) -> Lookup:
        return Lookup.HIT if key in self.has else Lookup.MISS

    def submit_store(self, job: Job) -> None:
        self._done.append(JobResult(job.job_id))

    def submit_load(self, job: Job) -> None:
        self._work()
        self.jobs.append(job)
        self._queue.extend((job, page) for page in job.pages)
        self._queue.append((job, None))

    def get_finished(self) -> Sequence[JobResult]:
        self._work()
        done, self._done = self._done, []
        return done

    def get_arrived(self) -> Mapping[int, Collection[bytes]]:
        arrived, self._arrived = self._arrived, {}
        return arrived if self.tells else {}

    def drain(self, timeout_s: float) -> bool:
        return True

    def shutdown(self, timeout_s: float) -> bool:
        return True

    def stats(self) -> TierStats:
        return TierStats()

    def _work(self) -> None:
        assert self.world is not None
        if not self._queue:
            self._owed = 0.0
        else:
            self._owed += (self.world.now - self._now) * self.per_second
        self._now = self.world.now
        while self._queue:
            job, page = self._queue[0]
            if page is None:
                self._arrived.pop(job.job_id, None)
                self._done.append(JobResult(job.job_id, self._failed.pop(job.job_id, {})))
            elif self._owed < 1.0 or len(self.reads) >= self.stalls_at:
                break
            else:
                self._owed -= 1.0
                self._read(job, page)
            self._queue.popleft()

    def _read(self, job: Job, page: Page) -> None:
        if page.key in self.bad:
            self._failed.setdefault(job.job_id, {})[page.key] = "missing"
            return
        page.view[:] = content(page.key)
        self.reads.append(page.key)
        self._arrived.setdefault(job.job_id, []).append(page.key)


def ask(world: World, groups: Sequence[Sequence[Item]], request: RequestView) -> int | None:
    """vLLM's look-up of groups with full attention: how many chunks hit; None to ask again."""
    most, waits = len(groups[0]), False
    for items in groups:
        hits, deferred = 0, False
        for item in items[:most]:
            answer = world.lookup(item, request)
            if answer is Answer.MISS:
                break
            hits += answer is not Answer.RETRY
            deferred |= answer is not Answer.HIT
        if deferred:
            waits = True
        elif not hits:
            return 0
        else:
            most = hits
    return None if waits else most


def wait(
    world: World, groups: Sequence[Sequence[Item]], request: RequestView, step_s: float = 0.25
) -> int:
    """Ask in every step until the request goes on; how many chunks hit, loaded and right."""
    while (hits := ask(world, groups, request)) is None:
        world.step()
        world.now += step_s
    keys = [key for items in groups for key, _ in items[:hits]]
    slots = world.manager.prepare_load(keys, request)
    assert [bytes(world.memory[slot]) for slot in slots] == [content(key) for key in keys]
    world.manager.complete_load(set(keys))
    return hits
