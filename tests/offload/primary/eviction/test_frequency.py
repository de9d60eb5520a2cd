"""Counts of keys: exact but for what shared counters add, and that is bounded by the prefix."""

import itertools
import random

from kvstrata.offload.primary.eviction.frequency import ONE, Frequency
from kvstrata.offload.primary.eviction.order import Use


def prompt(number: int, chunks: int) -> dict[bytes, int]:
    return {b"%d %d" % (number, place): 32 * (place + 1) for place in range(chunks)}


def test_each_request_counts_once() -> None:
    frequency, pages = Frequency(1000), prompt(1, 4)
    for times in range(1, 5):
        use = Use()
        frequency.count(pages, use)
        assert {frequency.of(key, use) for key in pages} == {times * ONE}


def test_counts_fade() -> None:
    frequency, use = Frequency(16), Use()
    frequency.count(prompt(1, 1), use)
    (key,) = prompt(1, 1)
    own = hash(key) & frequency._mask
    others = (prompt(number, 1) for number in itertools.count(2))
    others = (pages for pages in others if all(hash(k) & frequency._mask != own for k in pages))
    for pages in itertools.islice(others, 160):  # whose counters are others
        frequency.count(pages, Use())
    assert frequency.of(key, use) == ONE // 2


def test_the_end_of_a_prefix_is_never_more_frequent_than_its_beginning() -> None:
    """Even in a table that is far too small, whose counters all are shared."""
    frequency = Frequency(8)
    frequency._until_halving = 10**9
    choose = random.Random(0)
    for _ in range(3000):
        frequency.count(prompt(choose.randrange(300), 30), Use())
    use = Use()
    frequency.count(new := prompt(1000, 30), use)
    counts = [frequency.of(key, use) for key in new]
    assert counts == sorted(counts, reverse=True)


def test_each_group_has_a_prefix_of_its_own() -> None:
    frequency = Frequency(1000)
    head = prompt(1, 2)
    for _ in range(3):
        frequency.count(head, Use())
    use = Use()
    first = {**head, **{b"tail 0": 96}}
    frequency.count({**first, **{key + b"1": end for key, end in first.items()}}, use)
    assert frequency.of(b"tail 0", use) == ONE
    assert frequency.of(next(iter(head)), use) == 4 * ONE
    assert frequency.of(next(iter(head)) + b"1", use) == ONE
