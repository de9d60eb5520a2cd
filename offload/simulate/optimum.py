"""The most that any order of eviction could find: it knows the future.

Belady's rule, that the page whose next use is farthest leaves first and a new page is not stored if
it is the one, is right for prefixes too: whoever uses a page uses all those before it, so none of
them leaves earlier, if of equals the last of the prefix does. A page without those before it, which
serves nobody, is thus never held.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from kvstrata.offload.simulate.traces import Request
from kvstrata.tiers.base import PageKey


def most_found(requests: Sequence[Request], pages: int) -> int:
    """How many chunks would be found by requests that come one after the other.

    Args:
        requests: in the order of their arrival.
        pages: that can be held.
    """
    never = len(requests)
    nexts = _next_uses(requests)
    held: dict[PageKey, tuple[int, int]] = {}  # next use and depth, negative both
    leaving: list[tuple[int, int, PageKey]] = []  # a heap of them, with some that are outdated
    found = 0
    for request, uses in zip(requests, nexts, strict=True):
        found += sum(1 for key in request.keys if key in held)
        for depth, (key, use) in enumerate(zip(request.keys, uses, strict=True)):
            if use == never:
                held.pop(key, None)
                continue
            held[key] = place = (-use, -depth)
            heapq.heappush(leaving, (*place, key))
        while len(held) > pages:
            use, depth, key = heapq.heappop(leaving)
            if held.get(key) == (use, depth):
                del held[key]
    return found


def _next_uses(requests: Sequence[Request]) -> list[list[int]]:
    """For each chunk of each request the number of the next request that uses it."""
    last: dict[PageKey, int] = {}
    nexts: list[list[int]] = []
    for number in range(len(requests) - 1, -1, -1):
        keys = requests[number].keys
        nexts.append([last.get(key, len(requests)) for key in keys])
        last.update(dict.fromkeys(keys, number))
    nexts.reverse()
    return nexts
