"""The order of accesses, whatever the order of their arrival."""

from hypothesis import given
from hypothesis import strategies as st

from kvstrata.tiers.fs.budget import stamps as stamps_module
from kvstrata.tiers.fs.budget.stamps import Stamps, first_access

accesses = st.builds(
    lambda engine, number: engine << 40 | number, st.integers(0, 3), st.integers(1, 500)
)


@given(st.lists(accesses, max_size=60))
def test_one_engine_is_ordered_by_number_and_engines_by_arrival(arrivals: list[int]) -> None:
    stamps = Stamps(10)
    found = {access: stamps.of(access) for access in arrivals}
    assert found == {access: stamps.of(access) for access in arrivals}
    for engine in range(4):
        own = sorted(access for access in found if access >> 40 == engine)
        assert sorted(found[access] for access in own) == [found[access] for access in own]
        assert len({found[access] for access in own}) == len(own)
    newest: dict[int, int] = {}
    for access in dict.fromkeys(arrivals):
        if access >= newest.get(access >> 40, 0):  # not late: after all that came before
            before = [found[each] for each in arrivals[: arrivals.index(access)]]
            assert found[access] > max(before, default=10)
            newest[access >> 40] = access
    assert stamps.next() > max(found.values(), default=0)


def test_engines_begin_far_apart() -> None:
    assert len({first_access() >> 40 for _ in range(10)}) == 10


def test_memory_is_bounded() -> None:
    stamps = Stamps(0)
    for number in range(30_000):
        stamps.of(number)
        stamps.of(number << 40)
    assert len(stamps._engines) <= stamps_module._MOST_ENGINES
    sizes = [len(each) for each, _ in stamps._engines.values()]
    assert max(sizes) <= 2 * stamps_module._MOST_ACCESSES
