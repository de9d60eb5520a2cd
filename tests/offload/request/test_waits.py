"""How long a request waits, and for what: pages of the GPU, and long prefixes from slow tiers."""

from collections.abc import Sequence

import pytest

from kvstrata.offload.config.offload_config import OffloadConfig
from kvstrata.offload.finding import promotion
from kvstrata.offload.finding.lookup import Answer
from kvstrata.offload.secondary.guard import GuardedTier
from kvstrata.tiers.base import Lookup, RequestView, SecondaryTier
from tests.offload.manager_world import LAYOUTS, TOKENS, World, chunk, content
from tests.offload.steady import Item, SteadyTier, ask, prefix, wait

HIT, MISS, PENDING, RETRY = Answer.HIT, Answer.MISS, Answer.PENDING, Answer.RETRY
DEADLINE_S = 10.0
LONG = prefix(3000)  # more than the tier reads in time


def world_of(*tiers: SteadyTier, groups: int = 1, **more: object) -> World:
    config = OffloadConfig(cpu_bytes=1, **more)  # type: ignore[arg-type]
    guarded: list[SecondaryTier] = [GuardedTier("steady", tier) for tier in tiers]
    layouts = {group: LAYOUTS[group] for group in range(groups)}
    world = World(guarded, slots=20_000, config=config, layouts=layouts)
    for tier in tiers:
        tier.world = world
    return world


def go_on(world: World, seconds: float, step_s: float = 0.25) -> None:
    """Other requests run."""
    end = world.now + seconds
    while world.now < end:
        world.step()
        world.now += step_s


def assert_nothing_is_reserved(world: World) -> None:
    assert world.manager.primary.promoting == 0 and not world.manager.has_pending_work()
    assert not world.manager._promotions
    for link in world.manager.links:
        assert not link.queue and not link.promoting and not link.loads.nbytes
        assert link.queue.ahead("any", 0) == 0 and link.breaker.openings.total() == 0


# -- pages that the GPU fills -----------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7])  # between two look-ups
def test_a_page_that_the_gpu_fills_is_awaited_for_so_long(steps: int) -> None:
    world = World([])
    item = chunk(0, 0)
    plan = world.manager.prepare_store([item], world.request("writer"))
    assert plan is not None
    world.now = 100.0  # since nobody asked for it, that does not count
    reader = world.request("reader")
    while world.now < 100.0 + DEADLINE_S:
        assert world.lookup(item, reader) is PENDING
        world.step(steps)
        world.now += 1.0
    assert world.lookup(item, reader) is MISS
    assert world.lookup(item, world.request("next")) is MISS, "at once"
    assert world.manager.counters["store_timeouts"] == 2
    for slot in plan.slots:
        world.memory[slot][:] = content(item[0])
    world.manager.complete_store(plan.keys, world.request("writer"))
    assert world.lookup(item, reader) is HIT, "late is better than never"


def test_pages_of_the_gpu_and_of_tiers_are_awaited_for_so_long_in_all() -> None:
    items = prefix(3)
    tier = SteadyTier(items[1:], 1 / 6)
    world = world_of(tier)
    plan = world.manager.prepare_store(items[:1], world.request("writer"))
    assert plan is not None
    request = world.request()
    while world.now < 8.0:
        assert ask(world, [items], request) is None
        world.step()
        world.now += 1.0
    for slot in plan.slots:
        world.memory[slot][:] = content(items[0][0])
    world.manager.complete_store(plan.keys, world.request("writer"))
    assert wait(world, [items], request, 1.0) == 1 and world.now == DEADLINE_S


def test_a_tier_that_changes_its_mind_is_not_asked_for_ever() -> None:
    """Each look-up that it does not answer begins anew."""

    class Moody(SteadyTier):
        def lookup(self, key: bytes, request: RequestView) -> Lookup:
            even = (world.now // 0.5 + key[5]) % 2 == 0
            return Lookup.RETRY if even else Lookup.HIT

    items = prefix(2)
    world = world_of(Moody(items, 1.0))
    request = world.request()
    while ask(world, [items], request) is None:
        world.step()
        world.now += 0.25
        assert world.now <= DEADLINE_S


# -- long prefixes ----------------------------------------------------------------


@pytest.mark.parametrize("tells", [False, True])
@pytest.mark.parametrize(
    ("per_second", "step_s"),
    [(200.0, 0.25), (200.0, 0.05), (200.0, 1.0), (20.0, 0.25), (5.0, 0.25), (1.0, 0.5)],
)
def test_what_has_arrived_by_the_deadline_is_used(
    per_second: float, step_s: float, tells: bool
) -> None:
    tier = SteadyTier(LONG, per_second, tells=tells)
    world = world_of(tier)
    hits = wait(world, [LONG], world.request(), step_s)
    assert world.now == pytest.approx(DEADLINE_S)
    read = len(tier.reads)
    assert tier.reads == [key for key, _ in LONG[:read]], "in prefix order"
    assert read >= 0.9 * per_second * DEADLINE_S, "it never had nothing to do"
    assert hits == read if tells else hits >= read - max(8, per_second / 3)
    go_on(world, 300.0, step_s)
    assert len(tier.reads) - read <= max(128, 2 * per_second * max(1.0, step_s))
    assert_nothing_is_reserved(world)


def test_a_fast_tier_is_not_held_back() -> None:
    tier = SteadyTier(LONG, 20_000.0)
    world = world_of(tier)
    assert wait(world, [LONG], world.request(), 0.05) == len(LONG)
    assert world.now < 0.4, "the tier needs 0.15 s"


def test_a_very_long_prefix_is_reserved_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the scheduler must not take as long as a million tokens would."""
    monkeypatch.setattr(promotion, "MOST_IN_A_STEP", 100)
    tier = SteadyTier(LONG, 100.0)
    world = world_of(tier)
    request = world.request()
    for step in range(1, 6):
        assert ask(world, [LONG], request) is None
        assert world.manager.primary.promoting == 100 * step
        world.step()
    tier.per_second = 1e6
    world.now = 1.0
    assert wait(world, [LONG], request, 0.05) == len(LONG)


def test_no_more_is_reserved_than_can_arrive_as_soon_as_the_speed_is_known() -> None:
    tier = SteadyTier(LONG, 200.0)
    world = world_of(tier)
    wait(world, [LONG[:1000]], world.request("first"))
    go_on(world, 5.0)
    before = world.manager.primary.promoting
    request = world.request("second")
    items = prefix(3000, number=1)
    tier.has.update(key for key, _ in items)
    assert ask(world, [items], request) is None
    assert before == 0 and 1700 < world.manager.primary.promoting < 2300
    hits = wait(world, [items], request)
    assert 1700 < hits < 2300


def test_a_tier_that_became_fast_is_used_as_such() -> None:
    tier = SteadyTier([*LONG, *prefix(3000, 1)], 200.0)
    world = world_of(tier)
    wait(world, [LONG], world.request("slow"))
    go_on(world, 5.0)
    tier.per_second = 5000.0
    assert wait(world, [prefix(3000, 1)], world.request("fast")) == 3000


def test_a_tier_that_stalls_in_the_middle() -> None:
    """What had arrived is used, and one prefix in many jobs is one failure for each deadline."""
    tier = SteadyTier(LONG, 200.0)
    tier.stalls_at = 700
    world = world_of(tier)
    hits = wait(world, [LONG], world.request())
    assert 600 < hits <= 700 and world.now == DEADLINE_S
    (link,) = world.manager.links
    go_on(world, 3.0)
    assert not link.breaker.doubtful, "it was at work for 3.5 s"
    go_on(world, 17.0)
    assert link.breaker.openings.total() == 0 and link.breaker.doubtful
    go_on(world, DEADLINE_S)
    assert link.breaker.openings.total() == 1
    assert not world.manager.has_pending_work(), "a hung tier does not keep the engine stepping"
    held = world.manager.primary.promoting
    assert 0 < held <= 300, "the tier may still write them; the others came free"
    tier.stalls_at = 10**9
    go_on(world, 5.0)
    assert world.manager.primary.promoting == 0


@pytest.mark.parametrize("tells", [False, True])
def test_a_bad_page_in_the_middle_ends_the_prefix(tells: bool) -> None:
    tier = SteadyTier(LONG, 200.0, tells=tells)
    tier.bad = {LONG[300][0]}
    world = world_of(tier)
    assert wait(world, [LONG], world.request()) == 300
    assert world.now < 3.0
    go_on(world, 10.0)
    assert len(tier.reads) < 1000, "what nobody waits for is not read"
    assert_nothing_is_reserved(world)


def test_late_pages_serve_the_next_request() -> None:
    tier = SteadyTier(LONG, 200.0)
    world = world_of(tier)
    hits = wait(world, [LONG], world.request("first"))
    go_on(world, 3.0)
    late = len(tier.reads)
    assert late > hits
    request = world.request("second", frozenset())
    assert ask(world, [LONG], request) == late


def test_an_aborted_request_gives_its_slots_back() -> None:
    tier = SteadyTier(LONG, 200.0)
    world = world_of(tier)
    request = world.request()
    for _ in range(4):
        assert ask(world, [LONG], request) is None
        go_on(world, 0.25)
    assert world.manager.primary.promoting > 2800
    world.manager.on_request_finished(request)
    world.step()
    assert world.manager.primary.promoting < 500
    go_on(world, 5.0)
    assert_nothing_is_reserved(world)


# -- several requests, tiers and groups -------------------------------------------


def wait_all(
    world: World, waiting: list[tuple[RequestView, float, Sequence[Item]]]
) -> dict[str, tuple[float, int]]:
    """Requests that arrive at given times; when each goes on, and with how many chunks."""
    ended: dict[str, tuple[float, int]] = {}
    while waiting:
        for each in list(waiting):
            request, arrival, items = each
            if world.now >= arrival and (hits := ask(world, [items], request)) is not None:
                ended[request.req_id] = world.now - arrival, hits
                waiting.remove(each)
        world.step()
        world.now += 0.25
    return ended


@pytest.mark.parametrize("tells", [False, True])
def test_requests_that_share_a_prefix(tells: bool) -> None:
    """Each waits no longer than it may, for pages that another one reserved, and then for more."""
    longest = prefix(4000)
    tier = SteadyTier(longest, 200.0, tells=tells)
    world = world_of(tier)
    ended = wait_all(world, [(world.request(str(n)), 2.5 * n, longest) for n in range(4)])
    for number in range(4):
        waited, hits = ended[str(number)]
        assert 0.9 * DEADLINE_S <= waited <= DEADLINE_S, "less if no page more can come in time"
        assert hits >= 0.85 * 200.0 * (2.5 * number + waited)
    assert len(tier.reads) == len(set(tier.reads)), "no page is read twice"


def test_a_short_prefix_passes_a_long_one() -> None:
    short = prefix(20, number=1)
    tier = SteadyTier([*LONG, *short], 200.0)
    world = world_of(tier)
    ended = wait_all(
        world, [(world.request("long"), 0.0, LONG), (world.request("short"), 3.0, short)]
    )
    assert ended["short"][1] == 20 and ended["short"][0] <= 2.0
    assert ended["long"][1] >= 1800


@pytest.mark.parametrize("tells", [False, True])
def test_groups_arrive_side_by_side(tells: bool) -> None:
    """vLLM looks them up one after the other, and uses only what all of them have."""
    groups = [prefix(1500, group=group) for group in (0, 1)]
    tier = SteadyTier([item for items in groups for item in items], 200.0, tells=tells)
    world = world_of(tier, groups=2)
    hits = wait(world, groups, world.request())
    assert world.now <= DEADLINE_S
    assert hits >= 0.35 * len(tier.reads)


def test_a_window_where_the_prefix_turns_out_to_end() -> None:
    """vLLM asks for it once it knows where: there must be time left."""
    full, sliding = prefix(3000, group=0), prefix(3000, group=1)
    tier = SteadyTier([*full, *sliding], 200.0, tells=True)
    world = world_of(tier, groups=2)
    request = world.request()

    def ask_both() -> int | None:
        """As `_sliding_window_lookup`, a window of four chunks."""
        hits = ask(world, [full], request)
        end = len(full) if hits is None else hits
        deferred, run = hits is None, 0
        for index in range(end - 1, -1, -1):
            answer = world.lookup(sliding[index], request)
            deferred |= answer is PENDING
            run = 0 if answer is MISS else run + 1
            if run == 4:
                return None if deferred else index + 4
        return None if deferred else 0

    while (hits := ask_both()) is None:
        world.step()
        world.now += 0.25
        assert world.now <= DEADLINE_S
    assert hits >= 1500


def test_a_prefix_in_two_tiers() -> None:
    near, far = SteadyTier(LONG[::2], 100.0), SteadyTier(LONG, 100.0)
    world = world_of(near, far)
    hits = wait(world, [LONG], world.request())
    assert world.now == DEADLINE_S and hits >= 1600, "they read at the same time"
    go_on(world, 20.0)
    assert_nothing_is_reserved(world)


def test_a_tier_that_stalls_does_not_cost_what_the_other_has() -> None:
    near, far = SteadyTier(LONG[1000:], 200.0), SteadyTier(LONG[:1000], 200.0)
    near.stalls_at = 0
    world = world_of(near, far)
    assert wait(world, [LONG], world.request()) == 1000
    assert world.now == DEADLINE_S


# -- load or recompute ------------------------------------------------------------


def test_what_does_not_pay_is_not_awaited_behind_what_does() -> None:
    """A tier as measured: 5 ms for a page, which prefill takes 2.5 ms for; with a queue before."""
    tier = SteadyTier([*LONG, *prefix(100, 1)], 200.0)
    world = world_of(tier, load_or_recompute=True)
    (link,) = world.manager.links
    for pages in range(1, 9):
        link.loads.cost.add(64 * pages, 0.005 * pages)
    world.manager.speed._steps.extend([(1000, 1000 * 0.0025 / TOKENS)] * 20)
    world.step()
    assert ask(world, [LONG], world.request("long")) == 0
    world.manager.speed._steps.extend([(1000, 1000 * 0.0080 / TOKENS)] * 200)
    world.step()
    first = world.request("first")
    assert ask(world, [LONG], first) is None
    world.step()
    second = world.request("second")
    assert ask(world, [prefix(100, 1)], second) is None
    world.step()
    assert ask(world, [prefix(100, 1)], second) == 0, "they take turns: twice the time"
    assert ask(world, [LONG], first) is None
