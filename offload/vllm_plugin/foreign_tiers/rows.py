"""Rows: the slots of the page region, as tiers for vLLM's own manager see them."""

from __future__ import annotations

import mmap

from kvstrata.tiers.base import PageRegion


class Rows:
    """The slots as the rows of one view; row s is slot s, the page at its beginning.

    Attributes:
        view: uint8, writable, contiguous, [slots, bytes of a slot].
    """

    def __init__(self, region: PageRegion) -> None:
        self._slot_bytes = region.slot_bytes
        size = region.slots * region.slot_bytes
        self._whole = memoryview(mmap.mmap(region.fd, size, offset=region.offset))
        self.view = self._whole.cast("B", (region.slots, region.slot_bytes))

    def page(self, slot: int, nbytes: int) -> memoryview:
        """The first bytes of a slot."""
        start = slot * self._slot_bytes
        return self._whole[start : start + nbytes]

    def tail(self, slot: int, nbytes: int) -> memoryview:
        """The last bytes of a slot."""
        end = (slot + 1) * self._slot_bytes
        return self._whole[end - nbytes : end]
