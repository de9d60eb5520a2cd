"""A follower of KV events, as a router is one, that counts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored


class Follower:
    """What it believes: block hashes by medium, and how often each is there.

    Attributes:
        there: by medium.
        chunks: by medium and the last hash of a chunk, all its hashes as they were told last.
        removed: block hashes that were removed, by medium.
        unknown: removals of what was not there, by medium.
        twice: announcements of what was there, by medium.
    """

    def __init__(self) -> None:
        self.there: defaultdict[str, Counter[Any]] = defaultdict(Counter)
        self.chunks: defaultdict[str, dict[Any, list[Any]]] = defaultdict(dict)
        self.removed: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self.twice: Counter[str] = Counter()

    def hear(self, events: Iterable[Any]) -> None:
        """Take what one publisher said, in its order."""
        for event in events:
            if isinstance(event, AllBlocksCleared):
                for there in self.there.values():
                    there.clear()
                continue
            there = self.there[event.medium]
            if isinstance(event, BlockStored):
                self.chunks[event.medium][event.block_hashes[-1]] = event.block_hashes
                if any(each in there for each in event.block_hashes):
                    self.twice[event.medium] += 1
                there.update(event.block_hashes)
                continue
            assert isinstance(event, BlockRemoved)
            self.removed[event.medium] += len(event.block_hashes)
            for block_hash in event.block_hashes:
                if block_hash not in there:
                    self.unknown[event.medium] += 1
                there[block_hash] -= 1
                if there[block_hash] <= 0:
                    del there[block_hash]
