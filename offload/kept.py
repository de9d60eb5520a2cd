"""Pages of the primary tier that requests count on between look-up and load."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from kvstrata.offload.primary import Entry, PrimaryTier
from kvstrata.tiers.base import key_group


class KeptPages:
    """Pages that must not be evicted in the step they were looked up in, and the next.

    A page answered HIT must stay until it is loaded, and while a request waits for the
    rest of its prefix: otherwise two prefixes could push each other out for ever.
    """

    def __init__(self, primary: PrimaryTier) -> None:
        self._primary = primary
        self._kept: OrderedDict[Entry, int] = OrderedDict()  # -> step; oldest first
        self._step = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, entry: Entry) -> None:
        """Hold a ready page for this step and the next."""
        if self._kept.pop(entry, None) is None:
            self._primary.begin_read(entry, gpu=False)
        self._kept[entry] = self._step

    def end_step(self) -> None:
        """Let go of what was not asked for in the step that ends."""
        self._let_go(before=self._step)
        self._step += 1

    def clear(self) -> None:
        """Let go of everything."""
        self._let_go(before=self._step + 1)

    def _let_go(self, before: int) -> None:
        old: list[Entry] = []
        while self._kept and next(iter(self._kept.values())) < before:
            old.append(self._kept.popitem(last=False)[0])
        for entry in tail_first(old):
            self._primary.end_read(entry, gpu=False)


def tail_first(entries: Iterable[Entry]) -> list[Entry]:
    """The end of a prefix first: it is evicted first, as without its start it is useless."""
    return sorted(entries, key=lambda entry: (key_group(entry.key), entry.end_token), reverse=True)
