"""vLLM's prefix cache in GPU memory, modelled: which chunks it has."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile

from kvstrata.tiers.base import PageKey


class GpuCache:
    """The least recently used chunk leaves first; of one request's, the last of its prefix.

    Args:
        chunks: how many it holds; 0: none, as without prefix caching.
    """

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks
        self._keys: OrderedDict[PageKey, None] = OrderedDict()

    def found(self, keys: Sequence[PageKey]) -> int:
        """How many of the first chunks are here."""
        if not self.chunks:
            return 0
        return sum(1 for _ in takewhile(self._keys.__contains__, keys))

    def use(self, keys: Sequence[PageKey]) -> None:
        """A request has the chunks, in prefix order, and holds none of them any more."""
        if not self.chunks:
            return
        held = self._keys
        for key in reversed(keys):
            held[key] = None
            held.move_to_end(key)
        while len(held) > self.chunks:
            held.popitem(last=False)
