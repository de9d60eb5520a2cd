"""Found: what requests needed, and in which tier it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from kvstrata.tiers.base import PageLayout, key_group


@dataclass(slots=True)
class Takings:
    """Of one tier: what was looked for in it, and what requests had from it."""

    query_chunks: int = 0
    hit_chunks: int = 0
    query_tokens: int = 0  # of prompts
    hit_tokens: int = 0


class Found:
    """Counts each chunk once, when its request loads it or begins to compute it.

    A chunk is a query of each tier up to the one that had it. Tokens are counted in one group, as
    the pages of the others are of the same tokens: in one of full attention, if there is one. Else
    only the end of a prefix is loaded, and that counts for all of it.

    Args:
        tiers: names of the secondary tiers, in the order of look-up.
        layouts: page layout by group.
        windows: groups of which the end of a hit is needed only.

    Attributes:
        takings: by tier, None for the primary one.
        group: that one.
        chunk_tokens: tokens of one of its chunks.
    """

    def __init__(
        self, tiers: Sequence[str], layouts: Mapping[int, PageLayout], windows: Mapping[int, int]
    ) -> None:
        names: tuple[str | None, ...] = (None, *tiers)
        self.takings = {name: Takings() for name in names}
        whole = sorted(layouts.keys() - windows.keys())
        self._ends_only = not whole
        self.group = whole[0] if whole else min(layouts)
        self.chunk_tokens = layouts[self.group].tokens
        self._several_groups = len(layouts) > 1

    def loaded(self, ends: Mapping[bytes, int], sources: Mapping[bytes, str]) -> None:
        """A request loads pages.

        Args:
            ends: their end tokens, by key.
            sources: the tiers that brought some of them for the request.
        """
        chunks = _by_tier(ends, sources)
        if self._ends_only:
            last = max(ends, key=ends.__getitem__)
            tokens = {sources.get(last): ends[last]}
        else:
            counted = chunks
            if self._several_groups:
                ours = [key for key in ends if key_group(key) == self.group]
                counted = _by_tier(ours, sources)
            tokens = {name: pages * self.chunk_tokens for name, pages in counted.items()}
        self._count(chunks, tokens, 0)

    def missed(self, chunks: int) -> None:
        """A request computes chunks that no tier had for it."""
        self._count({}, {}, chunks)

    def _count(
        self, chunks: Mapping[str | None, int], tokens: Mapping[str | None, int], missed: int
    ) -> None:
        chunks_left = sum(chunks.values()) + missed
        tokens_left = sum(tokens.values()) + missed * self.chunk_tokens
        for name, takings in self.takings.items():
            takings.query_chunks += chunks_left
            takings.query_tokens += tokens_left
            if (hits := chunks.get(name)) is not None:
                served = tokens.get(name, 0)
                takings.hit_chunks += hits
                takings.hit_tokens += served
                chunks_left, tokens_left = chunks_left - hits, tokens_left - served


def _by_tier(keys: Collection[bytes], sources: Mapping[bytes, str]) -> Mapping[str | None, int]:
    return Counter(map(sources.get, keys)) if sources else {None: len(keys)}
