"""The default order of eviction: without LRU's cliff, and as good as LRU where that is best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter

from kvstrata.offload.primary.eviction.frequency import Frequency
from kvstrata.offload.primary.eviction.order import Use
from kvstrata.offload.primary.eviction.window import Windowed
from kvstrata.tiers.base import key_group

# Shares of the window that are tried. A small one keeps what it has: for cycles, scans, popular
# documents. The whole is LRU. On long traces of conversations something between is best.
SHARES = (0.05, 0.6, 1.0)
# Shadows have so many keys at most; larger tiers are sampled, as miniature simulations do
# (Waldspurger et al., "Cache modeling and optimization using miniature simulations", ATC 2017).
SHADOW_KEYS = 256
# What was found counts half after requests for so many times the tier.
HALF_LIFE = 8
# Another share must have found so many times as much: moving between equals costs hits.
BETTER = 1.02


class Auto(Windowed):
    """`Windowed` with the share that would have found most of late.

    Shadows, caches of keys alone with one share each, play a sample of the pages that requests ask
    for. Until one finds more than the others, this is LRU.
    """

    def __init__(self, capacity: int, windows: Mapping[int, int]) -> None:
        super().__init__(capacity, windows, SHARES[-1], Frequency(capacity))
        sampled = capacity
        self._mask = 0  # a key is sampled if its hash has none of these bits
        while sampled > SHADOW_KEYS:
            sampled //= 2
            self._mask = 2 * self._mask + 1
        self._half_life = HALF_LIFE * sampled
        self._shadows = [Windowed(sampled, windows, share, self._frequency) for share in SHARES]
        self._found = [0.0] * len(SHARES)

    def ask(self, pages: Mapping[bytes, int], use: Use) -> None:
        self._frequency.count(pages, use)
        super().ask(pages, use)

    def ended(self, use: Use) -> None:
        self._learn(use)
        super().ended(use)

    def _learn(self, use: Use) -> None:
        """Let the shadows play the request, and choose the share."""
        mask = self._mask
        sample = [page for page in use.seen.items() if not hash(page[0]) & mask]
        if not sample:
            return
        sample.sort(key=itemgetter(1))
        pages = dict(sample)
        counts = {key: use.counts.get(key, 0) for key in pages}
        # Of a sliding window only the last pages are needed: they do not tell how far a hit goes.
        whole = [key for key in pages if key_group(key) not in self._windows] or list(pages)
        fade = 0.5 ** (len(sample) / self._half_life)
        found = [
            fade * before + play(shadow, pages, whole, counts)
            for before, shadow in zip(self._found, self._shadows, strict=True)
        ]
        self._found = found
        best = max(range(len(SHARES)), key=found.__getitem__)
        if found[best] > BETTER * found[SHARES.index(self.share)]:
            self.share = SHARES[best]

    def clear(self) -> None:
        super().clear()
        for shadow in self._shadows:
            shadow.clear()


def play(
    shadow: Windowed,
    pages: Mapping[bytes, int],
    whole: Sequence[bytes],
    counts: dict[bytes, int],
) -> int:
    """Let a request use pages, in prefix order; how many of `whole` it found before one missed."""
    use = Use()
    use.counts, use.reach = counts, max(pages.values())
    held = shadow.resident
    new = [page for page in pages.items() if page[0] not in held]
    hits = len(whole)
    if new:
        hits = next((at for at, key in enumerate(whole) if key not in held), hits)
    shadow.ask(pages, use)
    for key, end_token in new:
        if len(shadow) >= shadow.capacity and shadow.evict(key, end_token, use, must=False) is None:
            break
        shadow.bring(key, end_token, use)
    return hits
