"""Random histories of an engine over the manager: no wrong byte, no leak, no wait for ever.

The model is a function: `content(key, epoch)` is what a key's page must hold. Transfers of
the GPU write and read the slots when they end, as late as they can.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstrata.offload.audit import audits
from kvstrata.offload.config.offload_config import OffloadConfig
from kvstrata.offload.demand.stores import StorePlan
from kvstrata.offload.finding import promotion
from kvstrata.offload.finding.lookup import Answer
from kvstrata.offload.primary.slots import Entry
from kvstrata.offload.secondary import pace
from kvstrata.offload.secondary.guard import GuardedTier
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.tiers.base import Job, JobResult, RequestView, SecondaryTier
from kvstrata.tiers.memory import MemoryTier
from tests.offload.manager_world import CONTEXT, LAYOUTS, PAGE, World, chunk, content
from tests.tiers.faults import FaultyTier, SlowTier, TierWrapper

CHUNKS = 5
PRIVATE = 2  # the prefix of which all requests want nothing in a secondary tier
ALL_KEYS = [chunk(prefix, index)[0] for prefix in range(2) for index in range(CHUNKS)]


class Telling(TierWrapper):
    """Ends jobs one poll later than it could, and tells of half of their pages before that."""

    def __init__(self, inner: SecondaryTier) -> None:
        super().__init__(inner)
        self._loads: dict[int, list[bytes]] = {}
        self._ended: list[JobResult] = []
        self._stopped = False

    def submit_load(self, job: Job) -> None:
        self._loads[job.job_id] = list(job.keys)
        super().submit_load(job)

    def get_finished(self) -> Sequence[JobResult]:
        ended, self._ended = self._ended, list(super().get_finished())
        if self._stopped:
            ended, self._ended = ended + self._ended, []
        for result in ended:
            self._loads.pop(result.job_id, None)
        return ended

    def get_arrived(self) -> Mapping[int, Collection[bytes]]:
        """Of those that end with the next poll."""
        arrived = {}
        for result in self._ended:
            keys = self._loads.get(result.job_id, [])
            good = [key for key in keys if key not in result.failed]
            if taken := good[: (len(good) + 1) // 2]:
                arrived[result.job_id] = taken
                self._loads[result.job_id] = [key for key in keys if key not in taken]
        return arrived

    def shutdown(self, timeout_s: float) -> bool:
        self._stopped = super().shutdown(timeout_s)
        return self._stopped


@dataclass
class Request:
    view: RequestView
    prefix: int
    waiting: bool = True  # its look-up is not over
    since: float | None = None  # of its first look-up, while it is looked up in every step
    looked_up: int = -2  # in which step
    to: frozenset[str] | None = None  # the tiers that its pages may go to
    late: list[bytes] = field(default_factory=list)  # what it will load some steps after
    epoch: int = 0  # of those


@dataclass
class Transfer:
    """Of the GPU, under way; `keys` in prefix order."""

    request: Request
    keys: list[bytes]
    slots: list[int]


def meant(wishes: dict[str, object]) -> frozenset[str] | None:
    """The tiers that a request's pages may go to, as the documentation says it."""
    if wishes.get("persist") is False or wishes.get("tiers") == []:
        return frozenset()
    return frozenset({"tier0"}) if wishes.get("tiers") == ["tier0"] else None


@pytest.fixture(autouse=True, scope="module")
def sizes() -> Iterator[None]:
    """Put back what the histories choose."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (audits, "_LEAST_FREE"),
            (promotion, "MOST_IN_A_STEP"),
            (pace, "FIRST_PAGES"),
            (pace, "FIRST_AHEAD"),
        ):
            patch.setattr(module, name, getattr(module, name))
        yield


class ManagerMachine(RuleBasedStateMachine):
    """Rules are what vLLM, the GPU, the tiers and time may do."""

    @initialize(
        slots=st.sampled_from([1, 2, 3, 5, 7, 12, 20]),
        tiers=st.lists(st.integers(0, 3), min_size=1, max_size=2),
        stock=st.sampled_from([0, 2, CHUNKS, CHUNKS]),
        policy=st.sampled_from(["lru", "arc"]),
        fraction=st.sampled_from([0.2, 0.5, 1.0]),
        threshold=st.sampled_from([0, 0, 2]),
        of_tiers=st.lists(st.sampled_from([0, 0, 2]), max_size=2),
        pins=st.sampled_from([0.25, 1.0]),
        recompute=st.booleans(),
        weights_fixed=st.booleans(),
        audited=st.booleans(),
        tells=st.booleans(),
        in_a_step=st.sampled_from([1, 2, 4096]),
        first=st.sampled_from([(1, 1), (1, 2), (2, 5), (8, 128)]),
        deadlines=st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "deadline_s": st.sampled_from([0.5, 3.0, 25.0]),
                    "lookup_deadline_s": st.sampled_from([0.3, 5.0]),
                },
            ),
            max_size=2,
        ),
    )
    def start(
        self,
        slots: int,
        tiers: list[int],
        stock: int,
        policy: str,
        fraction: float,
        threshold: int,
        of_tiers: list[int],
        pins: float,
        recompute: bool,
        weights_fixed: bool,
        audited: bool,
        tells: bool,
        in_a_step: int,
        first: tuple[int, int],
        deadlines: list[dict[str, float]],
    ) -> None:
        audits._LEAST_FREE = 1
        promotion.MOST_IN_A_STEP = in_a_step
        pace.FIRST_PAGES, pace.FIRST_AHEAD = first
        self.tells = tells
        self.polls = tiers
        stocked = [chunk(prefix, index)[0] for prefix in range(2) for index in range(stock)]
        self.stocked = set(stocked)
        self.stock = [chunk(prefix, index)[0] for prefix in range(2) for index in range(stock)]
        self.slow: list[SlowTier] = []
        self.files_changed = False
        self.bad: set[bytes] = set()
        self.world = World(
            self.open(),
            slots,
            OffloadConfig(
                cpu_bytes=1,
                eviction_policy=policy,
                promotion_fraction=fraction,
                store_threshold=threshold,
                pin_fraction=pins,
                load_or_recompute=recompute,
                audit_fraction=1.0,
            ),
            weights_fixed,
            self.open,
            of_tiers,
            lambda: self.files_changed,
            audited,
            ways=dict(enumerate(deadlines)),
        )
        self.manager = self.world.manager
        self.longest_s = max(
            self.world.config.promotion_deadline_s, *(x.deadline_s for x in self.manager.links)
        )
        self.audits = self.manager.audits
        self.audits._layouts = {0: LAYOUTS[0]}  # all keys are of one group
        self.audits._schedule.computed(10**6)
        # What each tier may hold, and how often each page was asked for since a reset
        self.allowed = [set(stocked) for _ in self.polls]
        self.asked: Counter[bytes] = Counter()
        self.thresholds = [*of_tiers, 0, 0][: len(self.polls)]
        self.watch_jobs()
        self.quota = max(1, int(slots * fraction))
        self.most_pinned = int(slots * pins)
        self.epoch = 0
        self.silent = False  # what the GPU computes changed, and nobody said so
        self.number = 0
        self.requests: list[Request] = []
        self.stores: list[Transfer] = []
        self.loads: list[Transfer] = []
        self.left: list[tuple[list[Entry], list[Transfer], list[Transfer]]] = []

    def open(self) -> list[SecondaryTier]:
        made = []
        stock, self.stock = self.stock, []  # left by an earlier engine
        for polls in self.polls:
            memory = MemoryTier({"max_bytes": 8 * PAGE}, CONTEXT)
            memory._pages.update((key, content(key)) for key in stock)
            memory._bytes = len(stock) * PAGE
            faulty = FaultyTier(memory, self.fault)
            slow = SlowTier(faulty, polls=polls)
            self.slow.append(slow)
            made.append(GuardedTier("tier", Telling(slow) if self.tells else slow))
        return made

    def new_request(
        self,
        prefix: int,
        tiers: frozenset[str] | None = None,
        wishes: dict[str, object] | None = None,
    ) -> Request:
        self.number += 1
        wishes = {"persist": False} if prefix == PRIVATE else wishes or {}
        view = self.world.request(str(self.number), tiers, wishes)
        return Request(view, prefix, to=meant(wishes))

    def watch_jobs(self) -> None:
        """To a tier that is out of service go only probes, and pages that it must not serve."""
        submit = self.manager._jobs.submit

        def watched(link: TierLink, entries: Sequence[Entry], *args: Any, **kwargs: Any) -> bool:
            probe, rejects = kwargs.get("probe", False), "send" in kwargs
            assert probe or rejects or link.breaker.closed, "a job for a tier out of service"
            assert not probe or (len(entries) == 1 and not link.breaker.closed)
            return submit(link, entries, *args, **kwargs)

        self.manager._jobs.submit = watched  # type: ignore[method-assign]

    def wanted(self, request: Request, keys: Iterable[bytes]) -> None:
        """The request asked for the pages, which may go where it wishes from now on."""
        self.asked.update(keys)
        for index, allowed in enumerate(self.allowed):
            if request.to is None or f"tier{index}" in request.to:
                allowed.update(keys)

    @invariant()
    def tiers_hold_only_what_they_should(self) -> None:
        """Nothing that all requests wanted kept from them, or that was asked for too seldom."""
        if not hasattr(self, "manager"):
            return
        for index, slow in enumerate(self.slow[-len(self.polls) :]):
            faulty = cast(FaultyTier, slow.inner)
            held = set(cast(MemoryTier, faulty.inner)._pages)
            assert held <= self.allowed[index], "a page that was to stay out of the tier"
            for key in held - self.stocked:
                assert self.asked[key] >= self.thresholds[index], "below the threshold"

    def fault(self, operation: str, key: bytes) -> str | None:
        return "injected" if operation != "lookup" and key in self.bad else None

    def check(self, transfer: Transfer, epoch: int) -> None:
        if self.silent:  # until audits have found it
            return
        for key, slot in zip(transfer.keys, transfer.slots, strict=True):
            assert self.world.memory[slot] == content(key, epoch), "a wrong page"

    def items(self, request: Request) -> list[tuple[bytes, int]]:
        return [chunk(request.prefix, index) for index in range(CHUNKS)]

    # -- vLLM ---------------------------------------------------------------------

    @precondition(lambda self: len(self.requests) < 4)
    @rule(
        prefix=st.integers(0, PRIVATE),
        only=st.sampled_from([None, None, "tier0", "none"]),
        wishes=st.fixed_dictionaries(
            {},
            optional={
                "persist": st.sampled_from([True, False, "no"]),
                "tiers": st.sampled_from([["tier0"], [], ["unknown"], 7]),
                "pin_seconds": st.sampled_from([3, 20.0, -1, float("nan")]),
            },
        ),
    )
    def arrive(self, prefix: int, only: str | None, wishes: dict[str, object]) -> None:
        tiers = None if only is None else frozenset({only})
        self.requests.append(self.new_request(prefix, tiers, wishes))

    @precondition(lambda self: any(r.waiting for r in self.requests))
    @rule(data=st.data())
    def look_up(self, data: st.DataObject) -> None:
        waiting = [request for request in self.requests if request.waiting]
        self.ask(data.draw(st.sampled_from(waiting)))

    def ask(self, request: Request) -> None:
        """vLLM's prefix look-up, and the load of what was hit."""
        hits: list[bytes] = []
        deferred = False
        for item in self.items(request):
            answer = self.world.lookup(item, request.view)
            if answer is Answer.MISS:
                break
            if answer is Answer.HIT:
                hits.append(item[0])
                entry = self.manager.primary.get(item[0])
                assert entry is not None
                self.check(Transfer(request, [item[0]], [entry.slot]), self.epoch)
            deferred |= answer is not Answer.HIT
        if request.looked_up < self.manager._step - 1 or request.since is None:
            request.since = self.world.now
        request.looked_up = self.manager._step
        if deferred:
            waited = self.world.now - request.since
            if not self.world.audited:  # a probe takes a step more, however long that is
                assert waited < self.longest_s, "it waits too long"
            return
        request.waiting = False
        if hits and self.number % 4 == 2:
            request.late, request.epoch = hits, self.epoch
            self.world.step()
        elif hits:
            self.wanted(request, hits)
            slots = self.manager.prepare_load(hits, request.view)
            self.loads.append(Transfer(request, hits, slots))

    @precondition(lambda self: any(r.late for r in self.requests))
    @rule(data=st.data())
    def load_late(self, data: st.DataObject) -> None:
        """Some steps after the look-up, a reset perhaps in between."""
        request = data.draw(st.sampled_from([r for r in self.requests if r.late]))
        hits, request.late = request.late, []
        self.wanted(request, hits)
        slots = self.manager.prepare_load(hits, request.view)
        self.check(Transfer(request, hits, slots), request.epoch)
        self.manager.complete_load(set(hits), request.view)

    @precondition(lambda self: any(not r.waiting and not r.late for r in self.requests))
    @rule(data=st.data(), first=st.integers(0, CHUNKS - 1), count=st.integers(1, CHUNKS))
    def store(self, data: st.DataObject, first: int, count: int) -> None:
        running = [r for r in self.requests if not r.waiting and not r.late]
        request = data.draw(st.sampled_from(running))
        items = self.items(request)[first : first + count]
        absent = [key for key, _ in items if self.manager.primary.get(key) is None]
        plan = self.prepare_store(request, items)
        if plan is None:
            return
        audited = {key for name, key in self.audits._open if name == request.view.req_id}
        assert set(plan.keys) <= set(absent) | audited and len(plan.keys) == len(plan.slots)
        assert not set(plan.evicted) & {key for key, _ in items}
        if plan.keys:
            self.stores.append(Transfer(request, plan.keys, plan.slots))

    @rule(prefix=st.integers(0, PRIVATE))
    def serve(self, prefix: int) -> None:
        """A whole life of a request that may load from no tier, so it computes what they hold."""
        request = self.new_request(prefix, frozenset())
        self.ask(request)
        if request.waiting:  # for pages that are on their way for others
            self.requests.append(request)
            return
        for load in [load for load in self.loads if load.request is request]:
            self.end_a_load(self.loads.index(load))
        plan = self.prepare_store(request, self.items(request))
        if plan is not None and plan.keys:
            self.stores.append(Transfer(request, plan.keys, plan.slots))
            self.end_a_store(len(self.stores) - 1)
        self.manager.on_request_finished(request.view)

    @rule(prefix=st.integers(0, PRIVATE), steps=st.integers(1, 4), finish=st.booleans())
    def live(self, prefix: int, steps: int, finish: bool) -> None:
        """A request that may load from everywhere, over some steps; its stores go on after it."""
        request = self.new_request(prefix)
        for _ in range(steps):
            if request.waiting:
                self.ask(request)
                self.world.step()
                self.world.now += 0.1
        if not request.waiting and not request.late:
            plan = self.prepare_store(request, self.items(request))
            if plan is not None and plan.keys:
                self.stores.append(Transfer(request, plan.keys, plan.slots))
        if finish:
            loads = [n for n, load in enumerate(self.loads) if load.request is request]
            for number in loads:  # vLLM's request runs on only when its load has ended
                self.end_a_load(number)
            self.manager.on_request_finished(request.view)
        else:
            self.requests.append(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        self.requests.remove(request)
        self.manager.on_request_finished(request.view)

    @rule(times=st.integers(1, 2))
    def step(self, times: int) -> None:
        self.world.step(times)

    @rule()
    def change_weight_files(self) -> None:
        """They are loaded at the next reset."""
        self.files_changed = self.files_changed or not self.manager._was_reset

    @rule()
    def reset(self) -> None:
        stores, self.stores = self.stores, []
        loads, self.loads = self.loads, []
        held = self.manager.reset()
        busy = [slot for transfer in (*stores, *loads) for slot in transfer.slots]
        assert sorted({entry.slot for entry in held}) == sorted(set(busy))
        self.left.append((held, stores, loads))
        if not self.world.weights_fixed or self.files_changed:
            self.epoch += 1
            self.allowed = [set() for _ in self.polls]
            self.asked.clear()
            self.stocked = set()

    def prepare_store(
        self, request: Request, items: Sequence[tuple[bytes, int]]
    ) -> StorePlan | None:
        # Before the call: pages that are there already may be given to tiers in it.
        before = [set(allowed) for allowed in self.allowed]
        self.wanted(request, [key for key, _ in items])
        plan = self.manager.prepare_store(items, request.view)
        if plan is None:
            self.allowed = before  # the offer counts all the same
        return plan

    # -- the GPU ------------------------------------------------------------------

    @precondition(lambda self: self.stores)
    @rule(data=st.data(), torn=st.sampled_from([0, 0, 1, 2]))
    def end_store(self, data: st.DataObject, torn: int) -> None:
        self.end_a_store(data.draw(st.integers(0, len(self.stores) - 1)), torn)

    @precondition(lambda self: self.loads)
    @rule(data=st.data())
    def end_load(self, data: st.DataObject) -> None:
        self.end_a_load(data.draw(st.integers(0, len(self.loads) - 1)))

    @precondition(lambda self: self.left)
    @rule()
    def end_what_a_reset_left(self) -> None:
        """The workers are past the transfers that were under way at the oldest reset."""
        held, stores, loads = self.left.pop(0)
        written = {slot for transfer in stores for slot in transfer.slots}
        for transfer in stores:
            for slot in transfer.slots:
                self.world.memory[slot][:] = b"\xdd" * PAGE
        for transfer in loads:
            for key, slot in zip(transfer.keys, transfer.slots, strict=True):
                assert slot not in written
                assert self.world.memory[slot][: len(key)] == key, "written while being read"
        for entry in held:
            self.manager.primary.end_gpu(entry)

    # -- tiers and time -----------------------------------------------------------

    @precondition(lambda self: self.slow)
    @rule(data=st.data(), hang=st.booleans())
    def hang_or_release(self, data: st.DataObject, hang: bool) -> None:
        tier = data.draw(st.sampled_from(range(len(self.slow))))
        if hang:
            self.slow[tier].hang()
        else:
            self.slow[tier].release()

    @rule(bad=st.sets(st.sampled_from(ALL_KEYS), max_size=3))
    def change_what_fails(self, bad: set[bytes]) -> None:
        self.bad = bad

    @precondition(lambda self: self.number % 3 == 1)
    @rule(computing=st.sampled_from([0.001, 1.0, 100.0]), data=st.data())
    def measure(self, computing: float, data: st.DataObject) -> None:
        """The engine computes at some speed, and the tiers turned out to load at another."""
        self.manager.speed._steps.extend([(1000, computing * 1000)] * 20)
        for link in self.manager.links:
            loading = data.draw(st.sampled_from([0.001, 1.0, 100.0]))
            for nbytes in range(PAGE, 9 * PAGE, PAGE):
                link.loads.cost.add(nbytes, loading * nbytes)

    @precondition(lambda self: self.world.audited and self.number % 4 == 3)
    @rule(prefixes=st.lists(st.integers(0, 1), max_size=4))
    def change_weights_silently(self, prefixes: list[int]) -> None:
        self.epoch += 1
        self.silent = True
        for prefix in prefixes:
            self.world.now += 1.0  # the tiers may be asked again
            self.serve(prefix)
            self.world.step(4)

    @precondition(lambda self: self.silent)
    @rule()
    def trust(self) -> None:
        """The operator's word."""
        for slow in self.slow:
            cast(MemoryTier, cast(FaultyTier, slow.inner).inner).trusted = True

    @rule(seconds=st.sampled_from([0.4, 1.0, 11.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.world.now += seconds

    # -- what must hold -----------------------------------------------------------

    @invariant()
    def slots_have_one_owner(self) -> None:
        if not hasattr(self, "manager"):
            return
        live = {id(entry): entry.slot for entry in self.manager.primary}
        for held, _, _ in self.left:
            live |= {id(entry): entry.slot for entry in held}
        for job in self.manager._jobs._running.values():
            live |= {id(entry): entry.slot for entry in job.entries}
        live |= {id(entry): entry.slot for entry in self.manager._holds}
        for late in self.manager._demand._late.values():
            live |= {id(entry): entry.slot for entry in late.values()}
        for audit in self.audits._under_way:
            live |= {id(e): e.slot for e in (audit.computed, audit.served) if e is not None}
        assert len(set(live.values())) == len(live)
        assert self.manager.primary.free == self.world.slots - len(live)
        assert len(self.manager._promotions) <= self.quota
        assert self.manager.pinned <= self.most_pinned
        for entry in self.manager.primary:
            assert entry.holds >= 0
        links = self.manager.links
        assert all(link.promoting >= 0 and link.loads.pages >= 0 for link in links)
        busy = {id(e) for e in self.manager.primary if e.busy}
        assert self.manager.primary.idle == len(self.manager.primary) - len(busy)

    def teardown(self) -> None:
        """Whatever happened: requests come to an end, and nothing stays behind."""
        if not hasattr(self, "manager"):
            return
        for _ in range(60):  # hung tiers stay hung; deadlines must do
            for request in self.requests:
                if request.waiting:
                    self.ask(request)
            self.world.step()
            self.world.now += 2.0
            for transfers, end in ((self.stores, self.end_a_store), (self.loads, self.end_a_load)):
                while transfers:
                    end()
        assert not any(request.waiting for request in self.requests)
        for request in self.requests:
            self.manager.on_request_finished(request.view)
        for tier in self.slow:
            tier.release()
        while self.left:
            self.end_what_a_reset_left()
        self.world.step(10)
        self.world.now += 100.0  # all pins end
        self.world.step(10)
        manager = self.manager
        assert not any(manager.primary.held.values())
        for link in manager.links:
            assert (link.promoting, link.loads.pages, link.stores.pages) == (0, 0, 0)
            assert (link.loads.nbytes, link.stores.nbytes) == (0, 0)
        assert not manager._requests and not manager._promotions.unsent and not manager._jobs
        assert not manager._promotions and not list(manager._holds) and not manager._waits.cuts
        for link in manager.links:
            assert not link.queue and link.queue.ahead("any", 0) == 0
        assert not self.audits._under_way and not self.audits._open and not self.audits._comparing
        if not self.silent:
            assert manager.counters["audit_different"] == 0
            assert not self.audits.findings.refused and not self.audits.findings.distrusted
        assert not manager.has_pending_work() and manager.primary.promoting == 0
        assert manager.primary.free + manager.primary.idle == self.world.slots
        for entry in manager.primary:
            if not self.silent:
                assert self.world.memory[entry.slot] == content(entry.key, self.epoch)

    def end_a_store(self, index: int = 0, torn: int = 0) -> None:
        """The workers could not fill the last `torn` pages."""
        transfer = self.stores.pop(index)
        whole = len(transfer.keys) - torn
        for place, (key, slot) in enumerate(zip(transfer.keys, transfer.slots, strict=True)):
            good = place < whole
            (self.world.incomplete.discard if good else self.world.incomplete.add)(slot)
            self.world.memory[slot][:] = content(key, self.epoch) if good else bytes(PAGE)
        self.manager.complete_store(set(transfer.keys), transfer.request.view)

    def end_a_load(self, index: int = 0) -> None:
        transfer = self.loads.pop(index)
        self.check(transfer, self.epoch)
        self.manager.complete_load(set(transfer.keys))


TestManagerHistories = ManagerMachine.TestCase

TestManagerHistories.settings = settings(
    max_examples=2 * settings.default.max_examples, stateful_step_count=60
)
