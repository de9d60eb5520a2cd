"""What requests found in each tier, counted where it is loaded or computed."""

from dataclasses import astuple

from kvstrata.offload.finding.lookup import Answer
from kvstrata.offload.metering.found import Found, Takings
from kvstrata.tiers.memory import MemoryTier
from tests.offload.manager_world import CONTEXT, LAYOUTS, PAGE, TOKENS, World, chunk, content

ONE_GROUP = {0: LAYOUTS[0]}


def counted(takings: Takings) -> tuple[int, ...]:
    """Chunks queried and hit, then tokens, in chunks."""
    chunks, hits, tokens, hit_tokens = astuple(takings)
    assert tokens % TOKENS == hit_tokens % TOKENS == 0
    return chunks, hits, tokens // TOKENS, hit_tokens // TOKENS


def test_a_chunk_is_a_query_of_each_tier_up_to_the_one_that_has_it() -> None:
    found = Found(["pool", "disk"], ONE_GROUP, {})
    ends = dict(chunk(0, index) for index in range(6))
    keys = list(ends)
    found.loaded(ends, {keys[1]: "pool", keys[2]: "disk", keys[3]: "disk"})
    found.missed(4)
    by_tier = {name: counted(takings) for name, takings in found.takings.items()}
    assert by_tier == {None: (10, 3, 10, 3), "pool": (7, 1, 7, 1), "disk": (6, 2, 6, 2)}


def test_of_several_groups_one_counts_the_tokens() -> None:
    found = Found([], LAYOUTS, {1: TOKENS})
    found.loaded(dict([chunk(0, 0), chunk(0, 1), chunk(0, 1, group=1)]), {})
    assert counted(found.takings[None]) == (3, 3, 2, 2)


def test_where_only_the_end_is_loaded_it_counts_for_the_prefix() -> None:
    found = Found(["disk"], ONE_GROUP, {0: TOKENS})
    key, end = chunk(0, 4)
    found.loaded({key: end}, {key: "disk"})
    assert counted(found.takings["disk"]) == (1, 1, 5, 5)


def test_requests_of_a_manager() -> None:
    """A prompt of four chunks: two are in the CPU tier, one on the disk, one nowhere."""
    tier = MemoryTier({}, CONTEXT)
    world = World([tier], layouts=ONE_GROUP)
    prompt = [chunk(0, index) for index in range(4)]
    first = world.request("first")
    assert world.lookup(prompt[0], first) is Answer.MISS
    world.manager.missed(*prompt[0], dict(prompt), first)
    world.store(prompt[:2], first)
    takings = world.manager.found.takings
    assert counted(takings[None]) == counted(takings["tier0"]) == (4, 0, 4, 0)
    tier._pages[prompt[2][0]] = content(prompt[2][0])[:PAGE]
    second = world.request("second")
    assert [world.lookup(item, second) for item in prompt[:2]] == [Answer.HIT] * 2
    assert world.lookup(prompt[2], second) is Answer.PENDING
    world.manager.on_step_end()
    world.now += 3.0
    world.manager.on_step_end()
    assert [world.lookup(item, second) for item in prompt] == [Answer.HIT] * 3 + [Answer.MISS]
    world.manager.missed(*prompt[3], dict(prompt), second)
    world.manager.prepare_load([key for key, _ in prompt[:3]], second)
    world.now += 2.0
    world.manager.complete_load([key for key, _ in prompt[:3]], second)
    assert counted(takings[None]) == (8, 2, 8, 2)
    assert counted(takings["tier0"]) == (6, 1, 6, 1)
    assert world.manager.waited == 5.0, "for the promotion, and for the copy to the GPU"
    world.manager.prepare_store(prompt[3:], second)
    assert counted(takings[None]) == (8, 2, 8, 2), "what it computes was counted when it loaded"
