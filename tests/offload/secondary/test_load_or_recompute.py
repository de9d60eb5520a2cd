"""Load or recompute: the arithmetic, and what the manager makes of it."""

import pytest

from kvstrata.offload.config.offload_config import OffloadConfig
from kvstrata.offload.finding.lookup import Answer
from kvstrata.offload.request.request import RequestState
from kvstrata.offload.secondary.costs import PrefillSpeed
from kvstrata.offload.secondary.load_or_recompute import (
    TRY_EVERY,
    TRY_PAGES,
    WORTH_IT,
    Candidate,
    LoadOrRecompute,
)
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.tiers.base import RequestView, SecondaryTier
from kvstrata.tiers.memory import MemoryTier
from tests.offload.manager_world import CONTEXT, PAGE, TOKENS, World, chunk, content
from tests.tiers.faults import SlowTier

HIT, MISS, PENDING = Answer.HIT, Answer.MISS, Answer.PENDING
ITEMS = [chunk(0, index) for index in range(8)]


def speed(seconds_per_token: float) -> PrefillSpeed:
    made = PrefillSpeed()
    made._steps.extend([(1000, 1000 * seconds_per_token)] * 20)
    return made


def teach(link: TierLink, latency: float, per_byte: float) -> None:
    """The tier's loads took `latency` s, and `per_byte` s for each byte."""
    for nbytes in range(PAGE, 9 * PAGE, PAGE):
        link.loads.cost.add(nbytes, latency + per_byte * nbytes)


def tier_link(latency: float | None = None, per_byte: float = 0.0, index: int = 0) -> TierLink:
    made = TierLink(f"tier{index}", MemoryTier({}, CONTEXT), index, 10.0, lambda: 0.0)
    if latency is not None:
        teach(made, latency, per_byte)
    return made


def state() -> RequestState:
    return RequestState(RequestView("r"))


def worth(choice: LoadOrRecompute, candidates: list[Candidate], *, in_order: bool = True) -> int:
    return choice.worth(candidates, state(), in_order=in_order)


def choice_of(seconds_per_token: float, *, enabled: bool = True) -> LoadOrRecompute:
    """Loading one token may take `seconds_per_token`."""
    choice = LoadOrRecompute(enabled, speed(seconds_per_token / WORTH_IT))
    choice.end_step()
    return choice


def test_a_short_prefix_does_not_pay_for_the_latency() -> None:
    """10 tokens per page, 0.1 s to compute one of them; 5 s latency and 0.5 s per page."""
    choice = choice_of(0.1)
    link = tier_link(5.0, 0.5)
    assert worth(choice, [Candidate(link, 1, 10)] * 9) == 0
    assert worth(choice, [Candidate(link, 1, 10)] * 11) == 11
    link.loads.nbytes = 2  # queued before it: one second more
    assert worth(choice, [Candidate(link, 1, 10)] * 11) == 0
    assert worth(choice, [Candidate(link, 1, 10)] * 12) == 12


def test_the_part_that_does_not_pay_is_cut_off() -> None:
    choice = choice_of(0.1)
    near, far = tier_link(0.0, 0.1), tier_link(100.0, 0.1, index=1)
    candidates = [Candidate(near, 1, 10)] * 3 + [Candidate(far, 1, 10)] * 4
    assert worth(choice, candidates) == 3
    assert worth(choice, candidates, in_order=False) == 0
    assert worth(choice, candidates[:3], in_order=False) == 3


def test_tiers_load_at_the_same_time() -> None:
    choice = choice_of(0.1)
    near, far = tier_link(2.0, 0.0), tier_link(2.5, 0.0, index=1)
    assert (
        worth(choice, [Candidate(near, 1, 10), Candidate(far, 1, 10), Candidate(far, 1, 10)]) == 3
    )


def test_what_is_not_known_pays() -> None:
    slow = tier_link(1e9, 1e9)
    assert worth(choice_of(1e-6, enabled=False), [Candidate(slow, 1, 1)]) == 1
    unknown = LoadOrRecompute(True, PrefillSpeed())
    unknown.end_step()
    assert worth(unknown, [Candidate(slow, 1, 1)]) == 1
    assert worth(choice_of(1e-6), [Candidate(tier_link(), 1, 1)]) == 1
    assert unknown.may_pay(Candidate(slow, 1, 1), state())
    assert choice_of(1e-6).may_pay(Candidate(tier_link(), 1, 1), state())


def test_the_latency_alone_does_not_make_a_page_hopeless() -> None:
    choice = choice_of(0.1)
    assert choice.may_pay(Candidate(tier_link(1e9, 0.9), 1, 10), state())
    assert not choice.may_pay(Candidate(tier_link(0.0, 1.1), 1, 10), state())


def test_some_requests_try_all_the_same() -> None:
    choice = choice_of(0.1)
    link = tier_link(0.0, 2.0)
    tried = []
    for _ in range(3 * TRY_EVERY):
        request = state()
        tried.append(choice.may_pay(Candidate(link, 1, 10), request))
        same = [choice.may_pay(Candidate(link, 1, 10), request) for _ in range(3)]
        assert same == [tried[-1]] * 3, "a request is asked once"
        nine = [Candidate(link, 1, 10)] * 9
        assert choice.worth(nine, request, in_order=True) == tried[-1] * TRY_PAGES
        assert choice.worth(nine, request, in_order=False) == tried[-1] * 9
        assert choice.worth(nine[:2], request, in_order=True) == tried[-1] * 2
    assert sum(tried) == 3 and tried[TRY_EVERY - 1]


# -- with the manager ---------------------------------------------------------------


def filled(items: list[tuple[bytes, int]]) -> MemoryTier:
    tier = MemoryTier({}, CONTEXT)
    tier._pages.update((key, content(key)) for key, _ in items)
    return tier


def make(*tiers: SecondaryTier, seconds_per_token: float) -> World:
    config = OffloadConfig(cpu_bytes=1, promotion_fraction=1.0, load_or_recompute=True)
    world = World(tiers, slots=16, config=config)
    world.manager.speed._steps.extend([(1000, 1000 * seconds_per_token / WORTH_IT)] * 20)
    world.step()
    return world


def test_a_load_that_does_not_pay_becomes_a_miss_after_one_step() -> None:
    tier = filled(ITEMS)
    world = make(tier, seconds_per_token=0.1)
    (link,) = world.manager.links
    teach(link, 5 * 0.1 * TOKENS, 0.0)  # as long as five chunks take to compute
    short, long = world.request("short"), world.request("long")
    assert [world.lookup(item, short) for item in ITEMS[:4]] == [PENDING] * 4
    world.step()
    assert world.lookup(ITEMS[0], short) is MISS
    assert link.declined == 1
    assert world.manager.primary.free == 16 and not link.promoting
    assert [world.lookup(item, long) for item in ITEMS[:6]] == [PENDING] * 6
    world.step(2)
    assert [world.lookup(item, long) for item in ITEMS[:6]] == [HIT] * 6
    assert link.declined == 1, "requests, and not pages"


def test_a_tier_slower_than_prefill_is_not_asked() -> None:
    slow, fast = filled(ITEMS), filled(ITEMS[:1])
    world = make(slow, fast, seconds_per_token=0.001)
    teach(world.manager.links[0], 0.0, 1.0)
    request = world.request()
    assert [world.lookup(item, request) for item in ITEMS[:2]] == [PENDING, MISS]
    assert slow.stats().counters.get("lookups", 0) == 0
    world.step(2)
    assert world.manager.source(ITEMS[0][0], request) == "tier1"


def test_costs_are_learnt_from_the_loads_themselves() -> None:
    """Each load takes three steps of a second; prefill 10 ms per chunk."""
    tier = SlowTier(filled(ITEMS), polls=2)
    world = make(tier, seconds_per_token=0.01 / TOKENS)
    answers = []
    for number in range(12):
        request = world.request(str(number))
        item = ITEMS[number % 8]
        answers.append(world.lookup(item, request))
        for _ in range(4):
            world.step()
            world.now += 1.0
        world.manager.on_request_finished(request)
        world.manager.reset()
    assert answers[:4] == [PENDING] * 4, "until four loads were seen"
    assert answers[4:] == [MISS] * 8


@pytest.mark.parametrize("per_byte", [0.0, 1e9])
def test_pages_that_others_wait_for_are_looked_up_anew(per_byte: float) -> None:
    """A page given up by the request that reserved it is reserved by the next one."""
    tier = filled(ITEMS)
    world = make(tier, seconds_per_token=0.1)
    (link,) = world.manager.links
    teach(link, 5 * 0.1 * TOKENS, per_byte)
    one, two = world.request("1"), world.request("2")
    first = [world.lookup(ITEMS[0], one), *[world.lookup(item, two) for item in ITEMS]]
    world.step()
    again = [world.lookup(item, two) for item in ITEMS]
    if per_byte:
        assert first[0] is first[1] is MISS
    else:
        assert first == [PENDING] * 9
        assert again == [PENDING] + [HIT] * 7
        world.step(2)
        assert world.lookup(ITEMS[0], two) is HIT, "worth it for the pages behind it"


def test_a_page_pays_for_the_pages_of_the_primary_tier_behind_it() -> None:
    world = make(filled(ITEMS[:1]), seconds_per_token=0.1)
    teach(world.manager.links[0], 5 * 0.1 * TOKENS, 0.0)
    other = world.request("other", frozenset())
    world.store(ITEMS[1:6], other)
    request = world.request()
    assert [world.lookup(item, request) for item in ITEMS[:6]] == [PENDING] + [HIT] * 5
    world.step(2)
    assert [world.lookup(item, request) for item in ITEMS[:6]] == [HIT] * 6
