"""The order of pages: by request, from the end, and pinned ones keep their place."""

import gc

from hypothesis import given
from hypothesis import strategies as st

from kvstrata.offload.primary.eviction.order import Line, Pages, Use


class Queue(Pages):
    """One line, and its pages."""

    def __init__(self, windows: dict[int, int]) -> None:
        super().__init__(windows)
        self.only = Line(self)

    def drain(self) -> list[bytes]:
        """All idle pages in the order in which they leave."""
        gone = []
        while (oldest := self.only.oldest()) is not None:
            self.remove(oldest[0])
            gone.append(oldest[0])
        return gone


def key(prompt: int, chunk: int, group: int = 0) -> bytes:
    return bytes([prompt, chunk]) + group.to_bytes(4, "big")


def fill(line: Queue, use: Use, *keys: bytes) -> None:
    for one in keys:
        line.add(one, 32 * (one[1] + 1), line.only, use)


def test_the_earliest_request_leaves_first_and_from_its_end() -> None:
    line, first, second = Queue({}), Use(), Use()
    fill(line, second, key(2, 0), key(2, 1))
    fill(line, first, key(1, 0), key(1, 1))
    assert line.drain() == [key(1, 1), key(1, 0), key(2, 1), key(2, 0)]


def test_a_request_that_goes_on_is_the_latest() -> None:
    line, first, second = Queue({}), Use(), Use()
    fill(line, first, key(1, 0))
    fill(line, second, key(2, 0))
    first.renew()
    assert line.drain() == [key(2, 0), key(1, 0)]


def test_of_several_groups_the_furthest_page_leaves_first() -> None:
    line, use = Queue({}), Use()
    fill(line, use, *(key(1, chunk, group) for group in (0, 1) for chunk in range(3)))
    assert [one[1] for one in line.drain()] == [2, 2, 1, 1, 0, 0]


def test_a_pinned_page_is_passed_over_and_keeps_its_place() -> None:
    line, first, second = Queue({}), Use(), Use()
    fill(line, first, key(1, 0), key(1, 1), key(1, 2))
    fill(line, second, key(2, 0))
    line.pinned.add(key(1, 1))
    assert line.drain() == [key(1, 2), key(1, 0), key(2, 0)]
    fill(line, second, key(2, 0))
    line.unpin(key(1, 1))
    assert line.drain() == [key(1, 1), key(2, 0)]


def test_a_long_prompt_that_is_pinned_is_passed_over() -> None:
    line, first, second = Queue({}), Use(), Use()
    fill(line, first, *(key(1, chunk) for chunk in range(200)))
    fill(line, second, key(2, 0))
    pinned = [key(1, chunk) for chunk in range(200) if chunk % 100]
    line.pinned.update(pinned)
    assert line.drain() == [key(1, 100), key(1, 0), key(2, 0)]
    for one in pinned:
        line.unpin(one)
    assert line.drain() == pinned[::-1]


def test_pages_before_a_window_leave_first_unless_they_were_reused() -> None:
    """A sliding window of two chunks in group 1: a hit at the end needs chunks 2 and 3 of it."""
    line, use = Queue({1: 64}), Use()
    use.see({key(1, chunk, group): 32 * (chunk + 1) for group in (0, 1) for chunk in range(4)})
    use.reused[key(1, 0, 1)] = None
    fill(line, use, *use.seen)
    gone = line.drain()
    assert gone[0] == key(1, 1, 1)
    assert {one for one in gone[-2:]} == {key(1, 0, 0), key(1, 0, 1)}


PAGES = [key(prompt, chunk) for prompt in range(2) for chunk in range(4)]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("move"), st.sampled_from(PAGES), st.integers(0, 3)),
            st.tuples(st.sampled_from(["pin", "unpin", "remove"]), st.sampled_from(PAGES)),
            st.tuples(st.just("renew"), st.integers(0, 3)),
            st.tuples(st.just("evict")),
        ),
        max_size=60,
    )
)
def test_any_history_against_a_sorted_list(steps: list[tuple]) -> None:
    line, uses = Queue({}), [Use() for _ in range(4)]
    home: dict[bytes, Use] = {}
    pinned: set[bytes] = set()

    def order() -> list[bytes]:
        idle = [one for one in home if one not in pinned]
        return sorted(idle, key=lambda one: (home[one].stamp, -one[1]))

    for step in steps:
        match step:
            case ("move", one, number):
                if one in home:
                    line.move((one,), line.only, uses[number])
                else:
                    line.add(one, 32 * (one[1] + 1), line.only, uses[number])
                    line.pinned.add(one)
                    pinned.add(one)
                home[one] = uses[number]
            case ("pin", one) if one in home and one not in pinned:
                line.pinned.add(one)
                pinned.add(one)
            case ("unpin", one) if one in pinned:
                line.unpin(one)
                pinned.remove(one)
            case ("remove", one) if one in home:
                assert line.remove(one) == 32 * (one[1] + 1)
                del home[one]
                pinned.discard(one)
            case ("renew", number):
                uses[number].renew()
            case ("evict",):
                wanted, oldest = order(), line.only.oldest()
                # Pages of one use and one position leave in any order.
                found = [] if oldest is None else [(oldest[2], oldest[1])]
                assert found == [(home[one], 32 * (one[1] + 1)) for one in wanted[:1]]
                if oldest is not None:
                    line.remove(oldest[0])
                    del home[oldest[0]]
        assert len(line) == line.only.size == len(home)
        assert line.idle == len(home) - len(pinned)
    for one in sorted(pinned):
        line.unpin(one)
    pinned.clear()
    places = [(home[one].stamp, -one[1]) for one in order()]
    assert [(home[one].stamp, -one[1]) for one in line.drain()] == places


def uses() -> int:
    """How many there are in this process."""
    gc.collect()
    return sum(type(each) is Use for each in gc.get_objects())


def test_requests_that_lost_their_pages_are_forgotten_though_nothing_ever_leaves() -> None:
    line, pages = Queue({}), [key(1, chunk) for chunk in range(8)]
    before = uses()  # of other tests
    fill(line, Use(), *pages)
    for _ in range(1000):
        use = Use()
        for one in pages:
            use.reused[one] = None
            line.move((one,), line.only, use)
    assert uses() < before + 200
    assert line.drain() == pages[::-1]


def test_what_was_reused_is_known_only_of_a_requests_own_pages() -> None:
    line, first, second = Queue({}), Use(), Use()
    fill(line, first, key(1, 0), key(1, 1), key(1, 2))
    first.reused.update(dict.fromkeys([key(1, 0), key(1, 1), key(1, 2)]))
    line.move((key(1, 0),), line.only, second)
    line.remove(key(1, 1))
    assert list(first.reused) == [key(1, 2)]


def test_the_pages_of_a_request_that_ends_are_its_own_again() -> None:
    line, first, second = Queue({}), Use(), Use()
    first.see({key(1, chunk): 32 * (chunk + 1) for chunk in range(3)})
    fill(line, first, *first.seen)
    line.move((key(1, 0),), line.only, second)
    first.renew()
    line.gather(first)
    assert line.drain() == [key(1, 2), key(1, 1), key(1, 0)]
    assert first.seen.keys() == {key(1, 0), key(1, 1), key(1, 2)}


def test_what_another_request_reused_of_a_window_stays_with_its_prefix() -> None:
    """Two groups, a window of two chunks in the second; a hit ends behind chunk 3."""
    line, first, second = Queue({1: 64}), Use(), Use()
    first.see({key(1, chunk, group): 32 * (chunk + 1) for group in (0, 1) for chunk in range(8)})
    fill(line, first, *first.seen)
    assert line.only.oldest() is not None  # its order is known from now on
    shared = [key(1, 2, 1), key(1, 3, 1)]
    for one in shared:
        second.reused[one] = None
        line.move((one,), line.only, second)
    assert line.only.oldest() is not None
    first.renew()
    line.gather(first)
    gone = line.drain()
    assert set(gone[:4]) == {key(1, chunk, 1) for chunk in (0, 1, 4, 5)}
    assert {one[1] for one in gone[-6:]} == {0, 1, 2, 3}
