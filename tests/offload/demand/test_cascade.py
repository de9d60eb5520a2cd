"""Which pages go to which tier, and when a tier gets none."""

import pytest

from kvstrata.offload.config.offload_config import OffloadConfig
from kvstrata.offload.finding.lookup import Answer
from kvstrata.offload.secondary import tiers as tier_jobs
from kvstrata.offload.secondary.breaker import FAILURES_TO_OPEN, FIRST_BACKOFF_S
from kvstrata.tiers.base import Job, Lookup, RequestView, SecondaryTier
from kvstrata.tiers.memory import MemoryTier
from tests.offload.manager_world import CONTEXT, PAGE, World, chunk, content
from tests.tiers.faults import FaultyTier, SlowTier

HIT, MISS, PENDING, RETRY = Answer.HIT, Answer.MISS, Answer.PENDING, Answer.RETRY
ITEMS = [chunk(0, index) for index in range(6)]
KEYS = [key for key, _ in ITEMS]


class Recorder(MemoryTier):
    """Counts what it is given."""

    def __init__(self, *items: tuple[bytes, int]) -> None:
        super().__init__({}, CONTEXT)
        self._pages.update((key, content(key)) for key, _ in items)
        self.given: list[list[bytes]] = []
        self.pins: list[float] = []  # of the same

    def submit_store(self, job: Job) -> None:
        self.given.append(list(job.keys))
        self.pins.append(job.request.pin_s)
        super().submit_store(job)


def load(world: World, items: list[tuple[bytes, int]], request: RequestView) -> None:
    """What vLLM does with a prefix that it finds in the primary tier."""
    assert [world.lookup(item, request) for item in items] == [HIT] * len(items)
    keys = [key for key, _ in items]
    world.manager.prepare_load(keys, request)
    world.manager.complete_load(keys)


# -- which pages --------------------------------------------------------------------


def test_a_threshold_of_a_tier_leaves_the_primary_tier_alone() -> None:
    """The disk receives what was asked for twice, memory all."""
    memory, disk = Recorder(), Recorder()
    world = World([memory, disk], slots=16, thresholds=[0, 2])
    world.store(ITEMS[:4], world.request("1"))
    assert memory.given == [KEYS[:4]] and disk.given == []
    load(world, ITEMS[:2], world.request("2"))
    assert disk.given == [KEYS[:2]]
    load(world, ITEMS[:3], world.request("3"))
    assert disk.given == [KEYS[:2], KEYS[2:3]], "each page once"
    assert memory.given == [KEYS[:4]]


def test_what_was_evicted_between_counts_too() -> None:
    disk = Recorder()
    world = World([disk], slots=2, thresholds=[2])
    world.store(ITEMS[:2], world.request("1"))
    world.step(2)
    world.store([chunk(9, 0), chunk(9, 1)], world.request("2"))
    world.step(2)
    world.store(ITEMS[:2], world.request("3"))
    assert disk.given == [KEYS[:2]]


def test_a_promoted_page_is_given_to_the_tiers_that_missed_it() -> None:
    near, middle, far = Recorder(), Recorder(*ITEMS[:1]), Recorder()
    world = World([near, middle, far])
    request = world.request()
    assert world.lookup(ITEMS[0], request) is PENDING
    world.step(2)
    load(world, ITEMS[:1], request)
    assert (near.given, middle.given, far.given) == ([KEYS[:1]], [], [])


@pytest.mark.parametrize(
    ("wishes", "given"),
    [
        ({"persist": False}, [0, 0]),
        ({"tiers": ["tier1"]}, [0, 1]),
        ({"tiers": []}, [0, 0]),
        ({"tiers": ["tier0", "tier1"]}, [1, 1]),
        ({"tiers": ["tier1"], "persist": False}, [0, 0]),
        ({"persist": "no"}, [0, 0]),
        ({"persist": 0}, [0, 0]),
        ({"tiers": ["nowhere"]}, [0, 0]),
        ("nonsense", [0, 0]),
    ],
)
def test_wishes(wishes: object, given: list[int]) -> None:
    """Those in a wrong form fail closed; test_wishes.py has all forms."""
    tiers = [Recorder(), Recorder()]
    world = World(tiers)
    request = world.request(wishes=wishes)
    world.store(ITEMS[:2], request)
    load(world, ITEMS[:2], request)
    assert [len(tier.given) for tier in tiers] == given
    load(world, ITEMS[:2], world.request("without wishes"))
    assert [tier.given for tier in tiers] == [[KEYS[:2]], [KEYS[:2]]], "others need not do without"


def test_a_page_that_was_refused_is_offered_when_it_is_asked_for_again() -> None:
    full = True
    tier = Recorder()
    faulty = FaultyTier(tier, lambda op, key: "no-space" if op == "store" and full else None)
    world = World([faulty])
    world.store(ITEMS[:1], world.request("1"))
    world.step(2)
    full = False
    load(world, ITEMS[:1], world.request("2"))
    world.step(2)
    assert tier.lookup(KEYS[0], world.request("3")) is Lookup.HIT


# -- pins ---------------------------------------------------------------------------


def test_pinned_pages_survive_a_flood() -> None:
    config = OffloadConfig(cpu_bytes=1, pin_fraction=0.5)
    world = World([], slots=4, config=config)
    request = world.request("1", wishes={"pin_seconds": 60})
    world.store(ITEMS[:3], request)
    assert world.manager.pinned == 2 and world.manager.counters["pins_refused"] == 1
    for number in range(5):
        world.step(3)
        world.store([chunk(number + 1, 0), chunk(number + 1, 1)], world.request("2"))
    assert [world.lookup(item, request) for item in ITEMS[:3]] == [HIT, HIT, MISS]
    world.manager.on_request_finished(request)
    world.now = 60.0
    world.step(3)
    world.store([chunk(7, index) for index in range(4)], world.request("2"))
    assert world.lookup(ITEMS[0], request) is MISS and world.manager.pinned == 0


def test_a_tier_is_told_of_the_wish() -> None:
    tier = Recorder()
    world = World([tier], slots=16)
    world.store(ITEMS[:2], world.request("1"))
    world.store(ITEMS[2:4], world.request("2", wishes={"pin_seconds": 60}))
    assert tier.pins == [0.0, 60.0]


def test_what_is_loaded_is_pinned_too_and_a_reset_ends_it() -> None:
    world = World([], slots=4, config=OffloadConfig(cpu_bytes=1, pin_fraction=0.5))
    world.store(ITEMS[:2], world.request("1"))
    load(world, ITEMS[:2], world.request("2", wishes={"pin_seconds": 60}))
    assert world.manager.pinned == 2
    assert world.manager.reset() == []
    assert world.manager.pinned == 0 and world.manager.primary.free == 4


# -- tiers that do not keep up --------------------------------------------------------


def test_one_of_several_tiers_cannot_take_the_others_room() -> None:
    hung, well = SlowTier(Recorder()), Recorder()
    hung.hang()
    world = World([hung, well], slots=8)
    for prefix in range(8):
        world.store([chunk(prefix, 0)], world.request())
        world.step(3)
    assert [len(link.stores.cost._jobs) for link in world.manager.links] == [0, 8]
    assert world.manager.counters["cascade_skipped:tier0"] == 4
    assert world.manager.primary.idle == 4


def test_stores_to_a_slow_tier_are_shed_by_the_time_its_queue_takes() -> None:
    tier = SlowTier(Recorder())
    world = World([tier], slots=16)
    (link,) = world.manager.links
    for pages in range(1, 9):
        link.stores.cost.add(pages * PAGE, 3.0 * pages)
    tier.hang()
    world.store(ITEMS[:6], world.request())
    assert link.stores.pages == 3, "nine seconds, and not twelve"
    assert world.manager.counters["cascade_skipped:tier0"] == 3
    tier.release()
    world.step(2)
    assert link.stores.pages == 0
    load(world, ITEMS[:6], world.request("2"))
    assert link.stores.pages == 3, "the others come when they are asked for again"


def test_a_tier_with_a_long_latency_gets_a_page_at_a_time() -> None:
    tier = SlowTier(Recorder())
    world = World([tier], slots=16)
    (link,) = world.manager.links
    for _ in range(8):
        link.stores.cost.add(PAGE, 100.0)
    tier.hang()
    world.store(ITEMS[:3], world.request())
    assert link.stores.pages == 1, "else nobody would see that it became faster"


# -- circuit breaker ------------------------------------------------------------------


class Sick(Recorder):
    """Every job fails while it is sick."""

    cause: str | None = "io-error"

    def fails(self, operation: str, key: bytes) -> str | None:
        return self.cause if operation != "lookup" else None


def sick_world(slots: int = 16) -> tuple[Sick, World]:
    sick = Sick(*ITEMS)
    return sick, World([FaultyTier(sick, sick.fails)], slots=slots)


def open_breaker(world: World) -> None:
    for number in range(FAILURES_TO_OPEN):
        request = world.request(str(number))
        assert world.lookup(ITEMS[number], request) is PENDING
        world.step(2)
        assert world.lookup(ITEMS[number], request) is MISS
        world.manager.on_request_finished(request)
    assert not world.manager.links[0].breaker.closed


def test_a_tier_that_fails_is_neither_asked_nor_given_anything() -> None:
    sick, world = sick_world()
    open_breaker(world)
    asked = sick.stats().counters["lookups"]
    assert world.lookup(ITEMS[3], world.request()) is MISS
    world.store([chunk(1, 0)], world.request())
    world.step()
    assert sick.stats().counters["lookups"] == asked and sick.given == []
    assert world.manager.counters["cascade_skipped:tier0"] == 1


def test_a_probe_finds_out_when_it_is_well_again() -> None:
    sick, world = sick_world()
    open_breaker(world)
    world.store([chunk(1, 0), chunk(1, 1)], world.request())
    assert sick.given == []
    world.now += FIRST_BACKOFF_S
    world.store([chunk(2, 0), chunk(2, 1)], world.request())
    world.step(2)
    assert sick.given == [[]], "one page, which failed"
    world.store([chunk(3, 0)], world.request())
    world.step(2)
    assert len(sick.given) == 1, "not before the back-off"
    sick.cause = None
    world.now += 2 * FIRST_BACKOFF_S
    world.store([chunk(4, 0), chunk(4, 1)], world.request())
    world.step(2)
    assert sick.given[1:] == [[chunk(4, 0)[0]]]
    assert world.manager.links[0].breaker.closed
    request = world.request()
    assert world.lookup(ITEMS[0], request) is PENDING
    world.step(2)
    assert world.lookup(ITEMS[0], request) is HIT


def test_without_stores_a_page_that_it_knows_is_the_probe() -> None:
    sick, world = sick_world()
    sick.cause = None
    request = world.request("known")
    assert world.lookup(ITEMS[5], request) is PENDING
    world.step(2)
    world.store([chunk(1, 0)], world.request(wishes={"persist": False}))
    sick.cause = "io-error"
    open_breaker(world)
    world.now += FIRST_BACKOFF_S
    sick.cause = None
    world.step(2)
    assert sick.given == [[KEYS[5]]], "and not the page that was to stay out of it"
    assert world.manager.links[0].breaker.closed


def test_without_a_page_nothing_is_probed() -> None:
    _, world = sick_world()
    open_breaker(world)
    world.now += FIRST_BACKOFF_S
    world.store([chunk(1, 0)], world.request(wishes={"persist": False}))
    world.step(3)
    assert not world.manager._jobs


@pytest.mark.parametrize("cause", sorted(SecondaryTier.page_causes))
def test_bad_pages_do_not_open_it(cause: str) -> None:
    sick, world = sick_world()
    sick.cause = cause
    for number in range(2 * FAILURES_TO_OPEN):
        request = world.request(str(number))
        assert world.lookup(ITEMS[number % 6], request) is PENDING
        world.step(2)
        world.store([chunk(1, number)], request)
        world.step(2)
    assert world.manager.links[0].breaker.closed


def test_a_root_that_is_gone_opens_it() -> None:
    sick, world = sick_world()
    sick.cause = "no-directory"
    (link,) = world.manager.links
    for number in range(FAILURES_TO_OPEN):
        assert link.breaker.closed
        world.store([chunk(1, number)], world.request(str(number)))
        world.step(2)
    assert not link.breaker.closed and link.stores_failing
    sick.cause = None
    world.now += FIRST_BACKOFF_S
    world.store([chunk(2, 0)], world.request("probe"))
    world.step(2)
    assert link.breaker.closed and not link.stores_failing


@pytest.mark.parametrize("cause", sorted(SecondaryTier.page_causes))
def test_whether_stores_fail_is_told_whatever_the_cause(cause: str) -> None:
    """A disk that is full or read-only stays in use for what it holds."""
    sick, world = sick_world()
    (link,) = world.manager.links
    for sick.cause, failing in ((None, False), (cause, True), (None, False)):
        world.store([chunk(1, len(sick.given))], world.request(f"{cause} {failing}"))
        world.step(2)
        assert link.stores_failing is failing and link.breaker.closed


def test_one_good_page_in_a_job_is_a_success() -> None:
    tier = FaultyTier(Recorder(*ITEMS), lambda op, key: None if key == KEYS[0] else "io-error")
    world = World([tier])
    for number in range(2 * FAILURES_TO_OPEN):
        request = world.request(str(number))
        for item in ITEMS[:3]:
            world.lookup(item, request)
        world.step(2)
        world.manager.reset()
    assert world.manager.links[0].breaker.closed


def test_promotions_that_hang_open_it_and_what_comes_late_is_used() -> None:
    tier = SlowTier(Recorder(*ITEMS))
    world = World([tier], slots=16)
    waiting = [world.request(str(n)) for n in range(FAILURES_TO_OPEN)]
    for item, request in zip(ITEMS, waiting, strict=False):
        assert world.lookup(item, request) is PENDING
    tier.hang()
    world.step()
    world.now = 10.0
    assert world.lookup(ITEMS[0], waiting[0]) is MISS
    world.step()
    assert not world.manager.links[0].breaker.closed
    assert world.lookup(ITEMS[4], waiting[0]) is MISS, "at once, not after a deadline"
    tier.release()
    world.step(2)
    assert world.lookup(ITEMS[0], waiting[0]) is HIT, "late is better than never"
    world.now += FIRST_BACKOFF_S
    world.step(2)
    assert world.manager.links[0].breaker.closed, "the probe came through"


def test_lookups_without_an_answer_open_it() -> None:
    tier = SlowTier(Recorder(*ITEMS))
    tier.hang()
    world = World([tier])
    requests = [world.request(str(n)) for n in range(FAILURES_TO_OPEN)]
    for request in requests:
        assert world.lookup(ITEMS[0], request) is RETRY
    world.now = 1.0
    world.step()
    for request in requests:
        assert world.lookup(ITEMS[0], request) is MISS
    assert world.lookup(ITEMS[0], world.request("new")) is MISS, "at once"


def test_a_probe_that_hangs_does_not_keep_the_engine_stepping() -> None:
    sick, world = sick_world()
    open_breaker(world)
    tier = world.manager.links[0].tier
    assert isinstance(tier, FaultyTier)
    slow = SlowTier(sick)
    tier.inner = slow
    slow.hang()
    world.now += FIRST_BACKOFF_S
    world.store([chunk(1, 0)], world.request())
    world.step()
    assert len(world.manager._jobs) == 1 and not world.manager.has_pending_work()


def test_a_probe_never_takes_a_page_that_was_to_stay_out() -> None:
    """Also where the page came from another tier."""
    near, far = Recorder(*ITEMS[:1]), Sick()
    world = World([near, FaultyTier(far, far.fails)], slots=16)
    request = world.request("private", wishes={"persist": False})
    assert world.lookup(ITEMS[0], request) is PENDING
    world.step(2)
    load(world, ITEMS[:1], request)
    for number in range(FAILURES_TO_OPEN):
        world.store([chunk(5, number)], world.request("other"))
        world.step(2)
    assert not world.manager.links[1].breaker.closed
    world.manager.primary.reset()
    assert world.lookup(ITEMS[0], request) is PENDING
    world.step(2)
    far.cause = None
    for _ in range(5):
        world.now += 10 * FIRST_BACKOFF_S
        world.step(2)
    assert KEYS[0] not in far._pages


@pytest.mark.parametrize("cause", ["no-space", "read-only", "budget"])
def test_a_tier_that_can_only_be_read_is_used_again(cause: str) -> None:
    sick, world = sick_world()
    open_breaker(world)
    sick.cause = cause
    world.now += FIRST_BACKOFF_S
    world.store([chunk(1, 0)], world.request())
    world.step(2)
    assert world.manager.links[0].breaker.closed
    sick.cause = None
    assert world.lookup(ITEMS[5], world.request()) is PENDING


def test_results_that_were_only_taken_late_are_no_failures() -> None:
    """A step may take longer than the deadline."""
    world = World([Recorder(*ITEMS)], slots=16)
    for number, item in enumerate(ITEMS[:4]):
        assert world.lookup(item, world.request(str(number))) is PENDING
        world.step()
        world.now += 20.0
        world.step()
    assert world.manager.links[0].breaker.closed
    assert not world.manager.links[0].overdue_jobs


def test_answers_in_between_excuse_look_ups_that_took_too_long() -> None:
    tier = SlowTier(Recorder(*ITEMS))
    world = World([tier])
    for number in range(2 * FAILURES_TO_OPEN):
        tier.hang()
        request = world.request(str(number))
        assert world.lookup(ITEMS[0], request) is RETRY
        world.now += 1.0
        world.step()
        assert world.lookup(ITEMS[0], request) is MISS
        tier.release()
        assert world.lookup(chunk(9, 9), world.request("other")) is MISS
    assert world.manager.links[0].breaker.closed


def test_one_job_that_never_ends_opens_it_and_leaves_room() -> None:
    """For good: its slots are taken, but not from the share of the others."""
    tier = SlowTier(Recorder(*ITEMS))
    config = OffloadConfig(cpu_bytes=1, promotion_fraction=0.25)
    world = World([tier], slots=8, config=config)
    request = world.request()
    assert [world.lookup(item, request) for item in ITEMS[:3]] == [PENDING, PENDING, MISS]
    tier.hang()
    world.step()
    lost, tier._held = tier._held, []
    tier.release()
    for _ in range(FAILURES_TO_OPEN):
        assert world.manager.links[0].breaker.closed
        world.now += 10.0
        world.step()
    assert not world.manager.links[0].breaker.closed
    assert world.manager.links[0].overdue_jobs == 1
    world.now += FIRST_BACKOFF_S
    world.store([chunk(1, 0)], world.request("other"))
    world.step(2)
    assert world.manager.links[0].breaker.closed
    new = world.request("new")
    assert world.lookup(ITEMS[3], new) is PENDING
    world.step(2)
    assert world.lookup(ITEMS[3], new) is HIT
    assert world.manager.primary.promoting == 2, "the tier may still write the slots"
    assert len(lost) == 1


def test_a_hung_tier_never_takes_the_whole_primary_tier() -> None:
    items = [chunk(0, index) for index in range(100)]
    tier = SlowTier(Recorder(*items))
    world = World([tier], slots=100)
    tier.hang()
    tier.lookup = tier.inner.lookup  # type: ignore[method-assign]
    for prefix in range(1, 5):
        world.store([chunk(prefix, index) for index in range(25)], world.request())
        world.step(3)
    request = world.request("r")
    for item in items:
        world.lookup(item, request)
    world.step()
    for _ in range(5):
        world.now += 60.0
        world.step(3)
    plan = world.manager.prepare_store([chunk(9, index) for index in range(5)], request)
    assert plan is not None and len(plan.keys) == 5


def test_pages_in_gpu_memory_count_as_asked_for() -> None:
    """vLLM offers them again, although the primary tier has them."""
    disk = Recorder()
    world = World([disk], slots=16, thresholds=[2], config=OffloadConfig(1, pin_fraction=1.0))
    world.store(ITEMS[:3], world.request("1"))
    assert disk.given == []
    world.store(ITEMS[:4], world.request("2", wishes={"pin_seconds": 60}))
    assert disk.given == [KEYS[:3]]
    assert world.manager.pinned == 4


def test_tiers_left_behind_are_forgotten_when_their_jobs_have_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tier_jobs, "STOP_TIMEOUT_S", 0.01)
    made = [SlowTier(Recorder())]

    def reopen() -> list[SlowTier]:
        made.append(SlowTier(Recorder()))
        return made[-1:]

    world = World(made[:1], weights_fixed=False, reopen=reopen)
    for _ in range(3):
        made[-1].hang()
        world.store(ITEMS[:1], world.request())
        world.manager.reset()
    assert len(world.manager._jobs._left_behind) == 3
    for tier in made:
        tier.release()
    world.step(3)
    assert world.manager._jobs._left_behind == [] and world.manager.primary.free == 8


# -- one way only -------------------------------------------------------------------


def test_a_tier_that_is_only_loaded_from_is_given_nothing() -> None:
    archive, disk = Recorder(*ITEMS[:2]), Recorder()
    world = World([archive, disk], ways={0: {"may_store": False}})
    request = world.request()
    assert [world.lookup(item, request) for item in ITEMS[:2]] == [PENDING] * 2
    world.step(2)
    load(world, ITEMS[:2], request)
    world.store(ITEMS[2:4], world.request("2"))
    assert archive.given == [] and disk.given == [KEYS[2:4]]


def test_a_tier_that_is_only_stored_to_is_not_asked() -> None:
    archive, disk = Recorder(*ITEMS[:1]), Recorder()
    world = World([archive, disk], ways={0: {"may_load": False}})
    assert world.lookup(ITEMS[0], world.request()) is MISS
    world.store(ITEMS[1:2], world.request("2"))
    assert archive.given == disk.given == [KEYS[1:2]]


def test_what_is_found_far_away_may_stay_there() -> None:
    near, far = Recorder(), Recorder(*ITEMS[:1])
    world = World([near, far], ways={1: {"fills": False}})
    request = world.request()
    assert world.lookup(ITEMS[0], request) is PENDING
    world.step(2)
    load(world, ITEMS[:1], request)
    assert near.given == far.given == []


def test_a_tier_that_is_only_loaded_from_is_tried_again_after_it_failed() -> None:
    failing = True
    archive = Recorder(*ITEMS)
    faulty = FaultyTier(archive, lambda op, key: "io-error" if op == "load" and failing else None)
    world = World([faulty], ways={0: {"may_store": False}})
    (link,) = world.manager.links
    for number in range(FAILURES_TO_OPEN):
        assert link.breaker.closed
        assert world.lookup(ITEMS[number], world.request(f"{number}")) is PENDING
        world.step(2)
    assert not link.breaker.closed
    assert world.lookup(ITEMS[4], world.request("out")) is MISS
    world.now += FIRST_BACKOFF_S
    world.step(1)
    assert link.breaker.closed, "on trial"
    assert world.lookup(ITEMS[4], world.request("trial")) is PENDING
    world.step(2)
    assert not link.breaker.closed, "at once"
    failing = False
    world.now += 2 * FIRST_BACKOFF_S
    world.step(1)
    request = world.request("well")
    assert world.lookup(ITEMS[4], request) is PENDING
    world.step(2)
    load(world, ITEMS[4:5], request)
    assert link.breaker.closed and archive.given == []
