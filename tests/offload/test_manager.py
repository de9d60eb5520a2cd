"""The manager, one behaviour at a time. Random histories are in test_manager_histories.py."""

from collections.abc import Callable, Sequence

import pytest

from kvstrata.offload.config.offload_config import OffloadConfig
from kvstrata.offload.context import Event
from kvstrata.offload.finding.lookup import Answer
from kvstrata.offload.manager import TieringManager
from kvstrata.offload.secondary import tiers as tier_jobs
from kvstrata.offload.secondary.changes import MOST_CHANGES
from kvstrata.offload.secondary.guard import GuardedTier
from kvstrata.tiers.base import Job, JobResult, Lookup, RequestView, SecondaryTier
from kvstrata.tiers.memory import MemoryTier
from tests.offload.manager_world import CONTEXT, TOKENS, World, chunk, content
from tests.tiers.faults import FaultyTier, SlowTier

HIT, MISS, PENDING, RETRY = Answer.HIT, Answer.MISS, Answer.PENDING, Answer.RETRY
ITEMS = [chunk(0, index) for index in range(6)]
KEYS = [key for key, _ in ITEMS]


class Recorder(MemoryTier):
    """A memory tier that remembers what it was told."""

    def __init__(self, *items: tuple[bytes, int]) -> None:
        super().__init__({}, CONTEXT)
        self.jobs: list[tuple[str, Job]] = []
        self.hooks: list[tuple[str, object]] = []
        for key, _ in items:
            self._pages[key] = content(key)

    def submit_store(self, job: Job) -> None:
        self.jobs.append(("store", job))
        super().submit_store(job)

    def submit_load(self, job: Job) -> None:
        self.jobs.append(("load", job))
        super().submit_load(job)

    def touch(self, keys: Sequence[bytes], request: RequestView) -> None:  # type: ignore[override]
        self.hooks.append(("touch", list(keys)))

    def on_new_request(self, request: RequestView) -> bool:
        self.hooks.append(("new", request.req_id))
        return False

    def on_request_finished(self, request: RequestView) -> None:
        self.hooks.append(("finished", request.req_id))

    def on_step_end(self) -> None:
        self.hooks.append(("step", None))

    def submitted(self) -> list[tuple[str, str, list[bytes]]]:
        return [(kind, job.request.req_id, list(job.keys)) for kind, job in self.jobs]


class Undecided(Recorder):
    """Answers RETRY for the keys in `unknown`."""

    def __init__(self, *items: tuple[bytes, int]) -> None:
        super().__init__(*items)
        self.unknown: set[bytes] = set()

    def lookup(self, key: bytes, request: RequestView) -> Lookup:
        return Lookup.RETRY if key in self.unknown else super().lookup(key, request)


def config(**more: object) -> OffloadConfig:
    return OffloadConfig(cpu_bytes=1, **more)  # type: ignore[arg-type]


def assert_nothing_is_left(manager: TieringManager) -> None:
    """No state of finished requests, jobs and promotions; all slots can be had."""
    manager.on_step_end()
    manager.on_step_end()
    assert not manager._requests and not manager._promotions.unsent and not manager._jobs
    assert not manager._promotions and not list(manager._holds)
    assert manager.primary.free + manager.primary.idle == manager.primary.slots
    assert manager.primary.promoting == 0 and not manager.has_pending_work()


# -- store and cascade ------------------------------------------------------------


def test_a_stored_page_is_hit_and_cascades_to_every_tier() -> None:
    tiers = [Recorder(), Recorder(), Recorder()]
    world = World(tiers)
    request = world.request()
    plan = world.manager.prepare_store(ITEMS[:3], request)
    assert plan is not None and plan.keys == KEYS[:3] and plan.evicted == []
    assert world.lookup(ITEMS[0], request) is PENDING, "it is being written"
    assert all(not tier.jobs for tier in tiers), "nothing cascades before the GPU is done"
    for key, slot in zip(plan.keys, plan.slots, strict=True):
        world.memory[slot][:] = content(key)
    world.manager.complete_store(set(plan.keys), request)
    assert [world.lookup(item, request) for item in ITEMS[:4]] == [HIT, HIT, HIT, MISS]
    for tier in tiers:
        assert tier.submitted() == [("store", "r", KEYS[:3])], "in prefix order"
        job = tier.jobs[0][1]
        assert job.end_tokens == [TOKENS, 2 * TOKENS, 3 * TOKENS]
        assert job.slots == plan.slots
        assert tier._pages == {key: content(key) for key in KEYS[:3]}


def test_views_are_made_only_for_tiers_that_ask_for_them() -> None:
    class Elsewhere(Recorder):
        """Its pages are moved by other processes."""

        def submit_store(self, job: Job) -> None:
            self.jobs.append(("store", job))

    tier = Elsewhere()
    world = World([tier])
    world.store(ITEMS[:2], world.request())
    (_, job) = tier.jobs[0]
    assert list(job.keys) == KEYS[:2] and "pages" not in vars(job)
    assert [bytes(page.view) for page in job.pages] == [content(key) for key in KEYS[:2]]
    assert job.pages is job.pages


def test_groups_cascade_with_their_index() -> None:
    tier = Recorder()
    world = World([tier])
    items = [chunk(0, 0, group=1), chunk(0, 1, group=0), chunk(0, 0, group=0)]
    world.store(items, world.request())
    pages = [(page.group, page.end_token) for page in tier.jobs[0][1].pages]
    assert pages == [(0, TOKENS), (1, TOKENS), (0, 2 * TOKENS)]


def test_present_pages_are_not_stored_again_nor_evicted_for_the_rest() -> None:
    world = World([], slots=2)
    request = world.request()
    world.store(ITEMS[:2], request)
    assert world.manager.prepare_store(ITEMS[:2], request) == ([], [], [])
    world.step(2)
    plan = world.manager.prepare_store(ITEMS[1:3], world.request("another"))
    assert plan is not None and plan.keys == KEYS[2:3] and plan.evicted == KEYS[:1]


def test_a_request_does_not_push_out_its_own_beginning() -> None:
    world = World([], slots=2)
    request = world.request()
    world.store(ITEMS[:2], request)
    world.step(2)
    assert world.manager.prepare_store(ITEMS[2:4], request) == ([], [], [])
    assert world.manager.counters["stores_declined"] == 2
    assert world.manager.prepare_store(ITEMS[4:5], request) == ([], [], []), "nothing behind it"


def test_the_beginning_is_stored_where_not_all_finds_room() -> None:
    world = World([], slots=4)
    first = world.manager.prepare_store([chunk(1, 0), chunk(1, 1)], world.request("first"))
    assert first is not None  # under way: its slots cannot be had
    request = world.request()
    # The transfer may end soon: vLLM is to ask again, twice.
    assert [world.manager.prepare_store(ITEMS[:4], request) for _ in range(2)] == [None, None]
    plan = world.manager.prepare_store(ITEMS[:4], request)
    assert plan is not None and plan.keys == KEYS[:2]
    assert world.manager.prepare_store([chunk(2, 0)], world.request("later")) is None
    world.manager.complete_store(first.keys, RequestView("first"))
    world.manager.complete_store(plan.keys, request)
    assert world.manager.prepare_store(ITEMS[4:5], request) == ([], [], []), "it would be of no use"
    plan = world.manager.prepare_store(ITEMS[2:5], request)
    assert plan is not None and plan.keys == KEYS[2:4], "vLLM offers all again"


def test_no_room() -> None:
    world = World([], slots=2)
    request = world.request()
    plan = world.manager.prepare_store(ITEMS[:2], request)
    assert plan is not None
    assert world.manager.prepare_store(ITEMS[2:3], request) is None
    assert world.manager.counters["store_no_room"] == 1
    world.manager.complete_store(plan.keys, request)
    assert world.manager.prepare_store(ITEMS[2:3], request) is not None


def test_incomplete_pages_go_no_further() -> None:
    tier = Recorder()
    world = World([tier])
    request = world.request()
    plan = world.manager.prepare_store(ITEMS[:3], request)
    assert plan is not None
    world.incomplete = {plan.slots[1]}
    world.manager.complete_store(plan.keys, request)
    assert tier.submitted() == [("store", "r", [KEYS[0], KEYS[2]])]
    assert [world.lookup(item, request) for item in ITEMS[:3]] == [HIT, MISS, HIT]
    assert world.manager.counters["incomplete_pages"] == 1
    stored = [event for event in world.manager.take_events() if event.tier is None]
    assert stored == [
        Event([KEYS[1]], True, None, announced=False),
        Event([KEYS[0], KEYS[2]], False, None),
    ]
    world.manager.on_request_finished(request)
    assert_nothing_is_left(world.manager)
    assert world.manager.primary.free == 6


def test_pages_being_cascaded_are_not_evicted() -> None:
    slow = SlowTier(Recorder(), polls=1000)
    world = World([slow], slots=2)
    request = world.request()
    world.store(ITEMS[:2], request)
    world.step(3)
    assert world.manager.prepare_store(ITEMS[2:3], request) is None
    assert slow.drain(0)
    world.step()
    assert world.manager.prepare_store(ITEMS[2:3], request) is not None


def test_a_tier_that_hangs_leaves_room_for_stores() -> None:
    """It gets the beginning of what was stored, up to its share of the primary tier."""
    slow = SlowTier(Recorder(), polls=1000)
    world = World([slow], slots=4)
    request = world.request()
    world.store(ITEMS[:4], request)
    assert world.manager.counters["cascade_skipped:tier0"] == 1
    world.step(3)
    plan = world.manager.prepare_store(ITEMS[4:5], request)
    assert plan is not None
    assert plan.evicted == [KEYS[3]]


def test_more_than_ever_fits_is_stored_as_far_as_it_fits() -> None:
    world = World([Recorder()], slots=4)
    plan = world.manager.prepare_store(ITEMS[:6], world.request())
    assert plan is not None
    assert plan.keys == KEYS[:4]


def test_what_arrives_while_a_step_is_stored_counts_in_the_next_step() -> None:
    """vLLM asks for stores after the end of the step."""
    world = World([SlowTier(Recorder(*ITEMS[:1]), polls=2)])
    request = world.request()
    assert world.lookup(ITEMS[0], request) is PENDING
    world.step()
    for _ in range(4):
        world.manager.prepare_store([], request)
    assert world.lookup(ITEMS[0], request) is HIT


def test_the_end_of_a_prefix_is_evicted_first() -> None:
    world = World([Recorder()], slots=4)
    request = world.request()
    world.store(ITEMS[:4], request)
    world.step(3)
    plan = world.manager.prepare_store([chunk(1, 0), chunk(1, 1)], request)
    assert plan is not None and plan.evicted == [KEYS[3], KEYS[2]]


def test_the_end_of_a_loaded_prefix_is_evicted_first() -> None:
    world = World([], slots=5)
    world.store(ITEMS[:4], world.request("first"))
    world.store([chunk(1, 0)], world.request("second"))
    request = world.request()
    assert all(world.lookup(item, request) is HIT for item in ITEMS[:4])
    world.manager.prepare_load(KEYS[:4], request)
    world.manager.complete_load(set(KEYS[:4]))
    world.step(3)
    plan = world.manager.prepare_store([chunk(2, 0), chunk(2, 1)], world.request("last"))
    assert plan is not None and plan.evicted == [chunk(1, 0)[0], KEYS[3]]


@pytest.mark.parametrize(("threshold", "stored_at"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_store_threshold(threshold: int, stored_at: int) -> None:
    world = World([], config=config(store_threshold=threshold))
    for offer in range(1, 5):
        plan = world.manager.prepare_store(ITEMS[:2], world.request(f"r{offer}"))
        assert plan is not None
        assert plan.keys == (KEYS[:2] if offer == stored_at else [])


def test_an_offer_counts_once_for_each_request() -> None:
    """vLLM repeats it: when there was no room, after a preemption, and after a reset."""
    world = World([], slots=1, config=config(store_threshold=2))
    one, two = world.request("one"), world.request("two")
    for _ in range(3):
        assert world.manager.prepare_store(ITEMS[:1], one) == ([], [], [])
    world.manager.reset()
    assert world.manager.prepare_store(ITEMS[:1], one) == ([], [], [])
    first = world.manager.prepare_store(ITEMS[:1], two)
    assert first is not None and first.keys == KEYS[:1], "a reset keeps the counts"
    assert world.manager.prepare_store(ITEMS[1:2], one) == ([], [], [])
    for _ in range(3):
        assert world.manager.prepare_store([*ITEMS[1:3]], two) is None
    world.manager.complete_store(first.keys, two)
    assert world.manager.prepare_store(ITEMS[2:3], two) == ([], [], []), "its first offer"


def test_max_tracker_size_forgets_the_oldest() -> None:
    world = World([], config=config(store_threshold=2, max_tracker_size=2))
    one, two = world.request("one"), world.request("two")
    for item in ITEMS[:3]:
        world.manager.prepare_store([item], one)
    assert len(world.manager._demand._context.reuse) == 2
    plans = [world.manager.prepare_store([item], two) for item in (ITEMS[2], ITEMS[0])]
    assert [plan and plan.keys for plan in plans] == [[KEYS[2]], []]


# -- look-up and promotion --------------------------------------------------------


def test_promotion_is_staged() -> None:
    tier = SlowTier(Recorder(*ITEMS[:2]))
    world = World([tier])
    request = world.request()
    assert world.lookup(ITEMS[0], request) is PENDING
    assert world.manager.has_pending_work()
    tier.hang()
    world.step(3)
    assert world.lookup(ITEMS[0], request) is PENDING, "the tier is at it"
    tier.release()
    world.step()
    assert world.lookup(ITEMS[0], request) is HIT
    assert world.manager.source(KEYS[0], request) == "tier0"
    (slot,) = world.manager.prepare_load(KEYS[:1], request)
    assert world.memory[slot] == content(KEYS[0])
    assert world.lookup(ITEMS[2], request) is MISS
    assert world.manager.source(KEYS[2], request) is None


def test_one_batch_per_tier_and_request_in_prefix_order() -> None:
    near, far = Recorder(*ITEMS[:4:2]), Recorder(*ITEMS[:4])
    world = World([near, far], slots=16, config=config(promotion_fraction=1.0))
    one, two = world.request("one"), world.request("two")
    assert [world.lookup(item, one) for item in ITEMS[:3]] == [PENDING] * 3
    assert [world.lookup(item, two) for item in ITEMS[:5]] == [PENDING] * 4 + [MISS]
    assert not near.jobs and not far.jobs, "sent at the end of the step"
    world.step()
    assert near.submitted() == [("load", "one", [KEYS[0], KEYS[2]])]
    assert far.submitted() == [("load", "one", [KEYS[1]]), ("load", "two", [KEYS[3]])]
    assert near.jobs[0][1].end_tokens == [TOKENS, 3 * TOKENS]
    world.step()
    assert [world.lookup(item, two) for item in ITEMS[:5]] == [HIT] * 4 + [MISS]


def test_tiers_that_a_request_excludes_are_not_asked() -> None:
    tiers = [Recorder(*ITEMS), Recorder(*ITEMS)]
    world = World(tiers)
    second, none = world.request("2", frozenset({"tier1"})), world.request("0", frozenset())
    assert world.lookup(ITEMS[0], none) is MISS
    assert world.lookup(ITEMS[0], second) is PENDING
    world.step()
    assert not tiers[0].jobs and tiers[1].submitted() == [("load", "2", KEYS[:1])]
    assert "lookups" not in tiers[0].stats().counters


def test_quota_of_promotions() -> None:
    tier = SlowTier(Recorder(*ITEMS), polls=1)
    world = World([tier], slots=8, config=config(promotion_fraction=0.3))
    request = world.request()
    answers = [world.lookup(item, request) for item in ITEMS[:4]]
    assert answers == [PENDING, PENDING, MISS, MISS], "the start of the prefix goes first"
    assert world.manager.primary.promoting == 2
    assert world.manager.counters["promotion_no_room"] == 2
    world.step(3)
    answers = [world.lookup(item, request) for item in ITEMS[:5]]
    assert answers == [HIT, HIT, PENDING, PENDING, MISS]


def test_the_least_quota_is_one_page() -> None:
    world = World([Recorder(*ITEMS)], slots=2, config=config(promotion_fraction=0.001))
    request = world.request()
    assert [world.lookup(item, request) for item in ITEMS[:2]] == [PENDING, MISS]


def test_nothing_is_reserved_behind_an_undecided_key() -> None:
    tier = Undecided(*ITEMS)
    world = World([tier])
    request = world.request()
    tier.unknown = {KEYS[1]}
    answers = [world.lookup(item, request) for item in ITEMS[:4]]
    assert answers == [PENDING, RETRY, RETRY, RETRY]
    world.step(2)
    assert tier.submitted() == [("load", "r", KEYS[:1])]
    assert world.manager.primary.free == 7
    tier.unknown = set()
    assert [world.lookup(item, request) for item in ITEMS[:4]] == [HIT, *[PENDING] * 3]


def test_a_later_tier_does_not_overtake_an_undecided_one() -> None:
    near, far = Undecided(*ITEMS), Recorder(*ITEMS)
    near.unknown = set(KEYS)
    world = World([near, far])
    request = world.request()
    assert world.lookup(ITEMS[0], request) is RETRY
    near.unknown = set()
    world.step()
    assert world.lookup(ITEMS[0], request) is PENDING
    world.step()
    assert near.jobs and not far.jobs


def test_lookup_deadline() -> None:
    near, far = Undecided(*ITEMS), Recorder(*ITEMS[:1])
    near.unknown = set(KEYS)
    world = World([near, far], config=config(lookup_deadline_s=1.0))
    request = world.request()
    assert world.lookup(ITEMS[0], request) is RETRY
    world.step()
    world.now = 0.999
    assert world.lookup(ITEMS[0], request) is RETRY
    world.step()
    world.now = 1.0
    assert world.lookup(ITEMS[0], request) is PENDING, "the next tier has it"
    near.unknown = set()
    assert world.lookup(ITEMS[1], request) is MISS, "this request asks the tier no more"
    assert world.manager.counters["lookup_timeouts"] == 1
    assert world.lookup(ITEMS[1], world.request("another")) is PENDING


def test_promotion_deadline() -> None:
    tier = SlowTier(Recorder(*ITEMS[:1]))
    world = World([tier], config=config(promotion_deadline_s=10.0))
    request = world.request()
    assert world.lookup(ITEMS[0], request) is PENDING
    tier.hang()
    world.step()
    world.now = 9.9
    assert world.lookup(ITEMS[0], request) is PENDING and world.manager.has_pending_work()
    world.now = 10.0
    assert world.lookup(ITEMS[0], request) is MISS
    assert not world.manager.has_pending_work(), "a hung job does not keep the engine stepping"
    assert world.manager.primary.promoting == 1, "the tier may still write the slot"
    assert world.manager.prepare_store(ITEMS[:1], request) == ([], [], [])
    tier.release()
    world.step(2)
    assert world.lookup(ITEMS[0], request) is HIT, "late is better than never"
    assert world.manager.primary.promoting == 0


def test_a_tier_with_a_look_up_deadline_of_its_own() -> None:
    """The engine's holds for the other."""
    near, far = Undecided(*ITEMS), Undecided(*ITEMS)
    near.unknown = far.unknown = set(KEYS)
    world = World(
        [near, far], config=config(lookup_deadline_s=1.0), ways={1: {"lookup_deadline_s": 3.0}}
    )
    request, silent = world.request(), [0, 1, 1, 2]
    for now, timeouts in zip((0.0, 1.0, 2.9, 3.0), silent, strict=True):
        world.now = now
        assert world.lookup(ITEMS[0], request) is (MISS if timeouts == 2 else RETRY)
        assert world.manager.counters["lookup_timeouts"] == timeouts
        world.step()


@pytest.mark.parametrize("own", [2.0, 30.0])
def test_a_tier_with_a_promotion_deadline_of_its_own(own: float) -> None:
    """Shorter or longer than the engine's, which holds for the other."""
    first, second = SlowTier(Recorder(ITEMS[0])), SlowTier(Recorder(ITEMS[1]))
    world = World(
        [first, second], config=config(promotion_deadline_s=10.0), ways={1: {"deadline_s": own}}
    )
    requests = [world.request(str(number)) for number in range(2)]
    waiting = list(zip(ITEMS, requests, strict=False))
    assert [world.lookup(*each) for each in waiting] == [PENDING] * 2
    first.hang()
    second.hang()
    world.step()
    for now in sorted((own, 10.0)):
        world.now = now - 0.1
        assert [world.lookup(*each) for each in waiting] == [
            PENDING if now <= deadline else MISS for deadline in (10.0, own)
        ]
        world.step()
        world.now = now
        assert [world.lookup(*each) for each in waiting] == [
            PENDING if now < deadline else MISS for deadline in (10.0, own)
        ]
        world.step()
    assert not world.manager.has_pending_work()


def test_who_waits_for_a_slow_tier_waits_for_a_fast_one_behind_it() -> None:
    """The longest deadline is that of the wait, and each page has its tier's."""
    fast, slow = Recorder(ITEMS[1]), SlowTier(Recorder(ITEMS[0]))
    world = World([fast, slow], ways={0: {"deadline_s": 2.0}, 1: {"deadline_s": 30.0}})
    request = world.request()
    assert world.lookup(ITEMS[0], request) is PENDING
    slow.hang()
    world.step()
    world.now = 20.0
    assert [world.lookup(item, request) for item in ITEMS[:2]] == [PENDING] * 2
    world.step(2)
    assert [world.lookup(item, request) for item in ITEMS[:2]] == [PENDING, HIT]


def test_a_hung_store_does_not_keep_the_engine_stepping_for_ever() -> None:
    tier = SlowTier(Recorder())
    tier.hang()
    world = World([tier])
    world.store(ITEMS[:1], world.request())
    assert world.manager.has_pending_work()
    world.now = tier_jobs.STORE_PATIENCE_S
    assert not world.manager.has_pending_work()


def test_a_failed_page_is_a_miss_for_the_request_but_not_its_neighbours() -> None:
    tier = FaultyTier(
        Recorder(*ITEMS[:3]), lambda op, key: "bad" if (op, key) == ("load", KEYS[1]) else None
    )
    world = World([tier])
    request = world.request()
    for item in ITEMS[:3]:
        assert world.lookup(item, request) is PENDING
    world.step(2)
    for _ in range(3):
        assert [world.lookup(item, request) for item in ITEMS[:3]] == [HIT, MISS, HIT]
        world.step()
    assert world.manager.source(KEYS[1], request) is None
    assert world.manager.counters["promoted_failed:tier0"] == 1, "no loop"
    assert world.lookup(ITEMS[1], world.request("another")) is PENDING
    assert world.manager.primary.free == 5


def test_who_shared_a_promotion_that_failed_does_not_begin_it_again() -> None:
    """Else requests for one bad page wait one after the other."""
    tier = FaultyTier(Recorder(*ITEMS[:1]), lambda op, key: "missing" if op == "load" else None)
    world = World([tier])
    requests = [world.request(str(number)) for number in range(5)]
    assert [world.lookup(ITEMS[0], request) for request in requests] == [PENDING] * 5
    world.step(2)
    assert [world.lookup(ITEMS[0], request) for request in requests] == [MISS] * 5
    assert world.lookup(ITEMS[0], world.request("later")) is PENDING


def test_a_request_waits_no_longer_than_the_deadline_in_all() -> None:
    """However many promotions follow each other."""
    tier = SlowTier(Recorder(*ITEMS), polls=1)
    world = World([tier], config=config(promotion_fraction=0.2, promotion_deadline_s=10.0))
    request = world.request()
    while PENDING in (answers := [world.lookup(item, request) for item in ITEMS]):
        world.step()
        world.now += 2.0
    assert world.now == 10.0
    assert answers[:2] == [HIT, HIT] and MISS in answers, "what arrived is used"
    world.step(3)
    assert PENDING not in [world.lookup(item, request) for item in ITEMS], "not asked in between"
    world.manager.prepare_load(KEYS[:2], request)
    again = [world.lookup(item, request) for item in ITEMS]
    assert PENDING in again, "a new wait, after it went on"


def test_a_failed_page_is_tried_at_the_next_tier() -> None:
    near = FaultyTier(Recorder(*ITEMS[:1]), lambda op, key: "bad" if op == "load" else None)
    world = World([near, Recorder(*ITEMS[:1])])
    request = world.request()
    assert world.lookup(ITEMS[0], request) is PENDING
    world.step(2)
    assert world.lookup(ITEMS[0], request) is PENDING
    world.step(2)
    assert world.lookup(ITEMS[0], request) is HIT
    assert world.manager.source(KEYS[0], request) == "tier1"


def test_a_broken_tier_costs_hits_only() -> None:
    class Broken(Recorder):
        def submit_load(self, job: Job) -> None:
            raise OSError("gone")

        submit_store = submit_load

    world = World([GuardedTier("broken", Broken(*ITEMS)), Recorder()])
    request = world.request()
    assert world.lookup(ITEMS[0], request) is PENDING
    world.step(2)
    assert world.lookup(ITEMS[0], request) is MISS
    world.store(ITEMS[:1], request)
    assert world.lookup(ITEMS[0], request) is HIT
    world.step(2)
    assert world.manager.counters["cascaded_failed:tier0"] == 1
    world.manager.on_request_finished(request)
    assert_nothing_is_left(world.manager)


@pytest.mark.parametrize("raises", [False, True])
def test_a_tier_that_takes_the_keys_out_of_its_job(raises: bool) -> None:
    class Consuming(Recorder):
        def submit_load(self, job: Job) -> None:
            failed = {}
            while job.keys:
                failed[job.keys.pop()] = "missing"  # type: ignore[attr-defined]
            if raises:
                raise OSError("gone")
            self._finished.append(JobResult(job.job_id, failed))

    world = World([GuardedTier("consuming", Consuming(*ITEMS))])
    request = world.request()
    assert world.lookup(ITEMS[0], request) is PENDING
    world.step(2)
    assert world.lookup(ITEMS[0], request) is MISS, "nothing has arrived"


# -- pages that are counted on ----------------------------------------------------


def test_a_hit_is_not_evicted_before_it_can_be_loaded() -> None:
    """vLLM may load it although a later look-up of the same scan began a promotion."""
    world = World([Recorder(*ITEMS)], slots=2, config=config(promotion_fraction=1.0))
    request = world.request()
    world.store(ITEMS[:2], request)
    world.step(2)
    answers = [world.lookup(item, request) for item in ITEMS[:3]]
    assert answers == [HIT, HIT, MISS], "the third page must not push out the others"
    assert world.manager.prepare_store([chunk(1, 0)], world.request("another")) is None
    assert len(world.manager.prepare_load(KEYS[:2], request)) == 2


def vllm_asks(world: World, items: Sequence[tuple[bytes, int]], request: RequestView) -> int | None:
    """vLLM's look-up of a prefix: how many pages it would load; None to ask again later."""
    hits, deferred = 0, False
    for item in items:
        answer = world.lookup(item, request)
        if answer is MISS:
            break
        hits += answer is not RETRY
        deferred |= answer is not HIT
    return None if deferred else hits


@pytest.mark.parametrize("policy", ["lru", "arc"])
@pytest.mark.parametrize("fraction", [0.3, 0.5, 1.0])
def test_prefixes_larger_than_the_primary_tier_come_to_an_end(policy: str, fraction: float) -> None:
    """Two requests must not push out each other's pages, or their own, for ever."""
    items = [[chunk(prefix, index) for index in range(20)] for prefix in range(2)]
    world = World(
        [Recorder(*items[0], *items[1])],
        slots=10,
        config=config(promotion_fraction=fraction, eviction_policy=policy),
    )
    waiting = {prefix: world.request(str(prefix)) for prefix in range(2)}
    loaded = {}
    for _ in range(60):
        for prefix, request in list(waiting.items()):
            hits = vllm_asks(world, items[prefix], request)
            if hits is not None:
                keys = [key for key, _ in items[prefix][:hits]]
                slots = world.manager.prepare_load(keys, request)
                assert [bytes(world.memory[s]) for s in slots] == [content(k) for k in keys]
                world.manager.complete_load(set(keys))
                loaded[prefix] = hits
                del waiting[prefix]
        world.step()
    assert not waiting
    assert max(loaded.values()) >= 5, "as much as fits is used"


def test_slots_are_used_as_they_become_ready() -> None:
    """Also those that came while no step was made."""
    world = World([], slots=8, ready=2)
    request = world.request()
    plan = world.manager.prepare_store(ITEMS[:4], request)
    assert plan is not None and sorted(plan.slots) == [0, 1], "the beginning of what was offered"
    world.manager.complete_store(plan.keys, request)
    assert world.manager.not_ready == 6
    world.ready = 5
    another = world.request("another")
    plan = world.manager.prepare_store(ITEMS[2:6], another)
    assert plan is not None and plan.evicted == [ITEMS[1][0]]
    world.manager.complete_store(plan.keys, another)
    assert world.manager.not_ready == 3
    world.ready = 8
    world.step()
    assert (world.manager.not_ready, world.manager.primary.free) == (0, 3)


def test_shares_are_of_the_slots_that_are_ready() -> None:
    tier = SlowTier(Recorder(*ITEMS), polls=9)
    limits = config(promotion_fraction=0.5, pin_fraction=0.5)
    world = World([tier], slots=8, config=limits, ready=2)
    request = world.request(wishes={"pin_seconds": 1000})
    assert [world.lookup(item, request) for item in ITEMS[:2]] == [PENDING, MISS]
    world.step()
    world.ready = 6
    world.step()
    assert [world.lookup(item, request) for item in ITEMS[1:4]] == [PENDING, PENDING, MISS]
    world.store([chunk(1, index) for index in range(3)], request)
    assert world.manager.pinned == 3


def test_a_prompt_is_stored_as_far_as_pins_leave_room() -> None:
    world = World([], slots=4, config=config(pin_fraction=0.5))
    world.store(ITEMS[:2], world.request("1", wishes={"pin_seconds": 1000}))
    world.step(3)
    items = [chunk(1, index) for index in range(4)]
    plan = world.manager.prepare_store(items, world.request("2"))
    assert plan is not None and plan.keys == [key for key, _ in items[:2]]


def test_pages_are_given_up_when_nobody_asks_any_more() -> None:
    world = World([], slots=1)
    request = world.request()
    world.store(ITEMS[:1], request)
    assert world.lookup(ITEMS[0], request) is HIT
    world.step()
    assert world.manager.prepare_store(ITEMS[1:2], request) is None
    world.step()
    assert world.manager.prepare_store(ITEMS[1:2], request) is not None


def hit_and_then_others(slots: int = 2) -> tuple[World, RequestView]:
    """A request was answered HIT for all pages that fit; others would like their slots."""
    world = World([], slots=slots)
    request = world.request()
    world.store(ITEMS[:slots], world.request("before"))
    assert [world.lookup(item, request) for item in ITEMS[:slots]] == [HIT] * slots
    for number in range(10):
        world.step()
        assert world.manager.prepare_store(ITEMS[2:3], world.request(f"other{number}")) is None
    return world, request


def test_a_load_may_begin_some_steps_after_the_look_up() -> None:
    """vLLM 0.33 defers loads into blocks that steps under way may still read."""
    world, request = hit_and_then_others()
    slots = world.manager.prepare_load(KEYS[:2], request)
    assert [world.memory[slot] for slot in slots] == [content(key) for key in KEYS[:2]]
    world.step(2)
    assert not list(world.manager._holds), "the load holds them"
    assert world.manager.prepare_store(ITEMS[2:3], world.request("last")) is None
    world.manager.complete_load(set(KEYS[:2]), request)
    world.store(ITEMS[2:4], world.request("next"))


def test_a_request_that_ends_lets_go() -> None:
    world, request = hit_and_then_others()
    world.manager.on_request_finished(request)
    world.store(ITEMS[2:4], world.request("next"))


def test_a_request_that_is_looked_up_anew_lets_go_of_what_it_does_not_ask_for_again() -> None:
    world, request = hit_and_then_others()
    assert world.lookup(ITEMS[0], request) is HIT
    world.step()
    world.store(ITEMS[2:3], world.request("next"))
    assert world.manager.primary.get(KEYS[0]) is not None


def test_a_late_load_outlives_a_reset() -> None:
    world, request = hit_and_then_others()
    assert world.manager.reset() == []
    assert world.lookup(ITEMS[0], world.request("anew")) is MISS
    slots = world.manager.prepare_load(KEYS[:2], request)
    assert [world.memory[slot] for slot in slots] == [content(key) for key in KEYS[:2]]
    assert world.manager.prepare_store(ITEMS[:1], world.request("next")) is None
    world.manager.on_request_finished(request)  # aborted while it loads
    world.manager.complete_load(set(KEYS[:2]), request)
    world.step(2)
    assert world.manager.primary.free == 2


def test_what_outlives_a_change_of_weights_goes_to_no_tier() -> None:
    old, new = Recorder(), Recorder()
    world = World([old], weights_fixed=False, reopen=lambda: [new])
    request = world.request()
    world.store(ITEMS[:2], request)
    assert world.lookup(ITEMS[0], request) is HIT
    world.step()
    world.manager.reset()
    world.epoch = 1
    other = world.request("other")
    world.store(ITEMS[:1], other)
    (slot,) = world.manager.prepare_load(KEYS[:1], request)
    assert world.memory[slot] == content(KEYS[0], 0), "of the weights that it began with"
    world.manager.prepare_load(KEYS[:1], other)
    world.manager.complete_load(KEYS[:1], request)
    world.manager.complete_load(KEYS[:1], other)
    world.step(2)
    assert old.submitted()
    assert new.submitted() == [("store", "other", KEYS[:1])]
    assert new._pages == {KEYS[0]: content(KEYS[0], 1)}
    assert world.manager.primary.free + world.manager.primary.idle == world.slots


def test_a_second_reset_while_two_late_loads_of_the_same_pages_are_under_way() -> None:
    world, request = hit_and_then_others()
    also = world.request("also")
    assert [world.lookup(item, also) for item in ITEMS[:2]] == [HIT, HIT]
    world.step()
    world.manager.reset()
    world.manager.prepare_load(KEYS[:2], request)
    world.manager.prepare_load(KEYS[:2], also)
    held = world.manager.reset()
    assert [entry.key for entry in held] == KEYS[:2] and world.manager.primary.free == 0
    for entry in held:
        world.manager.primary.end_gpu(entry)
    assert world.manager.primary.free == 2


def test_a_request_that_is_looked_up_after_a_reset_lets_go() -> None:
    world, request = hit_and_then_others()
    world.manager.reset()
    assert world.manager.primary.free == 0
    assert world.lookup(ITEMS[0], request) is MISS
    assert world.manager.primary.free == 2


def test_load_of_a_page_that_is_not_ready() -> None:
    world = World([Recorder(*ITEMS)])
    request = world.request()
    world.store(ITEMS[1:2], request)
    world.lookup(ITEMS[0], request)
    for keys in (KEYS[:2], [KEYS[1], KEYS[5]]):
        with pytest.raises(KeyError, match="not ready"):
            world.manager.prepare_load(keys, request)
    world.step(3)
    assert world.manager.primary.idle == 2, "nothing is held by a load that was refused"


def test_the_pages_of_a_request_are_touched_everywhere_when_it_ends() -> None:
    """In prefix order: those it loaded, those it stored, and those found in GPU memory."""
    tier = Recorder()
    world = World([tier])
    world.store(ITEMS[:3], world.request("earlier"))
    request = world.request()
    world.store(ITEMS[3:5], request)
    assert world.lookup(ITEMS[2], request) is HIT
    world.manager.prepare_load(KEYS[2:3], request)
    world.manager.on_request_finished(request, dict(ITEMS[:5]))
    assert [told for hook, told in tier.hooks if hook == "touch"] == [KEYS[:5]]


def test_vllm_may_tell_of_a_use_itself() -> None:
    tier = Recorder()
    world = World([tier])
    request = world.request()
    world.store(ITEMS[:2], request)
    world.manager.touch(KEYS[1:3], request)
    assert [told for hook, told in tier.hooks if hook == "touch"] == [KEYS[1:3]]


# -- requests ---------------------------------------------------------------------


def test_tiers_hear_of_the_end_when_nothing_more_will_be_submitted() -> None:
    tier = Recorder()
    world = World([tier])
    request = world.request()
    plan = world.manager.prepare_store(ITEMS[:1], request)
    assert plan is not None
    world.manager.on_request_finished(request)
    assert tier.hooks == [("new", "r")]
    world.manager.complete_store(plan.keys, request)
    assert tier.hooks == [("new", "r"), ("touch", KEYS[:1]), ("finished", "r")]
    assert len(tier.jobs) == 1
    assert_nothing_is_left(world.manager)


def test_no_state_is_kept_of_requests_and_jobs() -> None:
    tier = Undecided(*ITEMS)
    world = World([SlowTier(tier, polls=2)], slots=3)
    for number in range(50):
        request = world.request(f"r{number}")
        tier.unknown = {KEYS[number % 6]}
        for item in ITEMS:
            world.lookup(item, request)
        world.store([chunk(9, number)], request) if world.manager.primary.free else None
        if number % 3:
            world.step(number % 4)
            world.now += 1.0
        world.manager.on_request_finished(request)
    world.step(10)
    assert_nothing_is_left(world.manager)


def test_events() -> None:
    tier = Recorder(*ITEMS[3:4])
    world = World([tier], slots=2)
    request = world.request()
    (named,) = world.manager.links
    assert list(world.manager.take_events()) == [Event(KEYS[3:4], False, named)]  # of before
    world.store(ITEMS[:2], request)
    assert list(world.manager.take_events()) == [
        Event(KEYS[:2], False, None),
        Event(KEYS[:2], False, named),
    ]
    world.step(2)
    assert list(world.manager.take_events()) == []
    assert world.lookup(ITEMS[3], request) is PENDING
    assert list(world.manager.take_events()) == [Event([KEYS[1]], True, None)]
    world.step(2)
    assert list(world.manager.take_events()) == [Event([KEYS[3]], False, None)]
    tier._changes.note(KEYS[0], False)
    assert list(world.manager.take_events()) == [Event([KEYS[0]], True, named)]
    assert list(world.manager.take_events()) == []


def test_what_can_wait_is_told_a_little_at_a_time() -> None:
    tier = Recorder(*[chunk(index // 16, index % 16) for index in range(MOST_CHANGES + 1)])
    manager = World([tier]).manager
    assert not manager.changes.more
    told = [key for event in manager.take_events() for key in event.keys]
    assert len(told) == MOST_CHANGES and manager.changes.more
    told += [key for event in manager.take_events() for key in event.keys]
    assert set(told) == set(tier._pages) and len(told) == len(tier._pages)
    assert not manager.changes.more


def test_after_a_reset_all_is_told_once_more_when_the_weights_are_known() -> None:
    tiers = [Recorder(*ITEMS[:2]), Recorder(*ITEMS[2:3])]
    changed = False
    world = World([tiers[0]], weights_changed=lambda: changed, reopen=lambda: [tiers[1]])
    manager = world.manager
    (named,) = manager.links
    assert list(manager.take_events()) == [Event(KEYS[:2], False, named)]
    manager.reset()
    manager.changes.begin_anew()
    assert list(manager.take_events()) == [] and not manager.changes.more
    world.lookup(ITEMS[5], world.request())
    assert list(manager.take_events()) == [Event(KEYS[:2], False, named)]
    manager.reset()
    manager.changes.begin_anew()
    changed = True
    world.lookup(ITEMS[5], world.request("s"))
    (named,) = manager.links
    assert list(manager.take_events()) == [Event(KEYS[2:3], False, named)]


# -- reset and shutdown -----------------------------------------------------------


def test_reset_keeps_the_secondary_tiers_of_fixed_weights() -> None:
    tier = Recorder()
    world = World([tier])
    request = world.request()
    world.store(ITEMS[:2], request)
    assert world.lookup(ITEMS[0], request) is HIT
    assert world.manager.reset() == []
    assert len(world.manager.primary) == 0 and world.manager.primary.free == 8
    assert world.manager.links[0].tier is tier and list(world.manager.take_events()) == []
    assert world.lookup(ITEMS[0], request) is PENDING
    world.step(2)
    assert world.lookup(ITEMS[0], request) is HIT


def test_reset_opens_the_tiers_anew_when_weights_change() -> None:
    old, new = Recorder(), Recorder()
    world = World([old], weights_fixed=False, reopen=lambda: [new])
    request = world.request()
    world.store(ITEMS[:2], request)
    world.manager.reset()
    assert world.manager.links[0].tier is new
    assert world.lookup(ITEMS[0], request) is MISS
    assert old.lookup(KEYS[0], request) is Lookup.MISS, "it was shut down"


@pytest.mark.parametrize("when", ["before the reset", "after the reset"])
def test_fixed_weights_that_changed_all_the_same(when: str) -> None:
    """Found out at a reset, or before the first look-up after it; from then on at every reset."""
    changed = [when == "before the reset"]
    tiers = [Recorder(), Recorder(), Recorder()]
    world = World(
        tiers[:1], weights_changed=lambda: changed[0], reopen=lambda: [tiers[world.opened]]
    )
    request = world.request()
    world.store(ITEMS[:2], request)
    world.manager.reset()
    world.step()
    changed[0] = True
    assert world.lookup(ITEMS[0], world.request("next")) is MISS
    assert world.manager.links[0].tier is tiers[1]
    assert tiers[0].lookup(KEYS[0], request) is Lookup.MISS, "it was shut down"
    world.store(ITEMS[2:3], request)
    world.manager.reset()
    assert world.lookup(ITEMS[2], request) is MISS and world.manager.links[0].tier is tiers[2]


def test_weights_are_looked_at_around_a_reset_only() -> None:
    asked = []
    world = World([Recorder()], weights_changed=lambda: bool(asked.append(1)))
    request = world.request()
    for number in (2, 4):
        world.store(ITEMS[:2], request)
        for _ in range(3):
            world.manager.lookup(*ITEMS[0], request)
            world.step()
        world.manager.reset()
        for _ in range(3):
            world.lookup(ITEMS[0], request)
            world.step()
        assert len(asked) == number


def test_reset_survives_tiers_that_cannot_be_opened_again() -> None:
    def gone() -> Sequence[SecondaryTier]:
        raise OSError("the disk is gone")

    world = World([Recorder()], weights_fixed=False, reopen=gone)
    request = world.request()
    world.manager.reset()
    world.store(ITEMS[:1], request)
    assert world.manager.links == () and world.lookup(ITEMS[0], request) is HIT


@pytest.mark.parametrize("weights_fixed", [True, False])
def test_reset_with_jobs_in_flight(weights_fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that the GPU or a hung tier may still write find no new owner."""
    monkeypatch.setattr(tier_jobs, "STOP_TIMEOUT_S", 0.01)
    tier = SlowTier(Recorder(chunk(7, 0)))
    world = World([tier], slots=6, weights_fixed=weights_fixed, reopen=lambda: [Recorder()])
    request = world.request()
    world.store(ITEMS[:1], request)
    world.step()
    assert world.lookup(chunk(7, 0), request) is PENDING
    tier.hang()
    world.step()  # a promotion hangs
    world.store(ITEMS[1:2], request)  # a cascade hangs
    plan = world.manager.prepare_store(ITEMS[2:3], request)  # the GPU writes
    assert plan is not None
    (read,) = world.manager.prepare_load(KEYS[:1], request)  # the GPU reads
    reserved = world.manager.primary.promoting
    held = world.manager.reset()
    assert sorted(entry.slot for entry in held) == sorted([read, *plan.slots])
    assert world.manager.primary.free == 2 and world.manager.primary.promoting == reserved == 1
    taken = world.manager.prepare_store([chunk(3, 0), chunk(3, 1)], request)
    assert taken is not None
    busy = {read, *plan.slots}
    assert not busy & set(taken.slots)
    assert world.manager.prepare_store([chunk(3, 2)], request) is None
    for entry in held:
        world.manager.primary.end_gpu(entry)
    assert world.manager.primary.free == 2
    tier.release()
    world.step(3)
    assert world.manager.primary.free == 4, "also those of a tier that was replaced"
    world.manager.complete_store(taken.keys, request)
    world.manager.on_request_finished(request)
    assert_nothing_is_left(world.manager)


def test_reset_gives_back_what_was_reserved_in_the_step() -> None:
    world = World([Recorder(*ITEMS)])
    request = world.request()
    assert world.lookup(ITEMS[0], request) is PENDING
    world.manager.reset()
    world.manager.on_request_finished(request)
    assert_nothing_is_left(world.manager)
    assert world.manager.primary.free == 8


def test_reset_forgets_finished_requests_with_stores_under_way() -> None:
    """vLLM reports no completions of transfers from before a reset."""
    world = World([])
    request = world.request()
    plan = world.manager.prepare_store(ITEMS[:1], request)
    assert plan is not None
    world.manager.on_request_finished(request)
    for entry in world.manager.reset():
        world.manager.primary.end_gpu(entry)
    assert_nothing_is_left(world.manager)


@pytest.mark.parametrize(
    ("call", "fixed", "given"),
    [
        (TieringManager.reset, True, []),
        (TieringManager.reset, False, [2.0, 0.5]),
        (TieringManager.shutdown, True, [2.0, 0.5, 2.0, 0.5]),
    ],
)
def test_hung_tiers_bound_reset_and_shutdown(
    call: Callable[[TieringManager], object],
    fixed: bool,
    given: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All tiers together have one bound."""
    monkeypatch.setattr(tier_jobs, "STOP_TIMEOUT_S", 2.0)
    timeouts: list[float] = []

    class Hung(Recorder):
        def drain(self, timeout_s: float) -> bool:
            timeouts.append(timeout_s)
            world.now += 1.5
            return False

        shutdown = drain

    world = World([Hung(), Hung()], weights_fixed=fixed)
    call(world.manager)
    assert timeouts == given


def test_shutdown_takes_the_last_results() -> None:
    tier = SlowTier(Recorder(), polls=100)
    world = World([tier])
    request = world.request()
    world.store(ITEMS[:1], request)
    world.manager.on_request_finished(request)
    world.manager.shutdown()
    world.manager.shutdown()
    assert_nothing_is_left(world.manager)


def test_results_of_unguarded_strangers_are_errors() -> None:
    """Only the guard may be lenient: here a wrong job id is a bug."""

    class Stranger(Recorder):
        def get_finished(self) -> Sequence[JobResult]:
            return [JobResult(77)]

    world = World([Stranger()])
    with pytest.raises(KeyError):
        world.store(ITEMS[:1], world.request())
        world.step()
    World([GuardedTier("stranger", Stranger())]).step()


def test_of_a_request_that_is_over_only_the_furthest_end_is_remembered() -> None:
    world = World([], slots=8)
    request = world.request()
    world.store([chunk(1, index) for index in range(4)], request)
    use = world.manager._state(request).use
    world.manager.on_request_finished(request)
    assert (use.seen, use.reach) == ({}, 4 * TOKENS)


# -- what is left of a prefix -------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "step", "again", "usable"),
    [
        (1, 16, False, 12),
        (1, 4, False, 12),
        (1, 16, True, 12),
        (1, 4, True, 12),
        (2, 16, False, 14),
    ],
)
def test_the_end_of_a_prefix_leaves_first_whatever_its_steps(
    groups: int, step: int, again: bool, usable: int
) -> None:
    """Of 16 chunks, when four more pages are stored: from the GPU in one step or several, of one
    group or two, and found in GPU memory again."""
    world = World([], slots=16 * groups)
    rounds = [("first", step), ("again", 16)] if again else [("first", step)]
    for name, size in rounds:
        request = world.request(name)
        for start in range(0, 16, size):
            places = range(start, start + size)
            world.store([chunk(1, at, group) for group in range(groups) for at in places], request)
        world.manager.on_request_finished(request)
    world.step(3)
    plan = world.manager.prepare_store([chunk(2, at) for at in range(4)], world.request("other"))
    assert plan is not None and len(plan.keys) == 4
    gone = set(plan.evicted)
    left = next(at for at in range(16) if any(chunk(1, at, g)[0] in gone for g in range(groups)))
    assert left == usable
