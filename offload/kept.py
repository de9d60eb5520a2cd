"""Pages of the primary tier that requests count on between look-up and load."""

from __future__ import annotations

from kvstrata.offload.primary import Entry, PrimaryTier


class KeptPages:
    """Pages that must not be evicted in the step they were looked up in, and the next.

    A page answered HIT must stay until it is loaded, and while a request waits for the
    rest of its prefix: otherwise two prefixes could push each other out for ever.
    """

    def __init__(self, primary: PrimaryTier) -> None:
        self._primary = primary
        self._now: dict[Entry, None] = {}  # asked for in this step
        self._before: dict[Entry, None] = {}  # in the one before, and not in this

    def __len__(self) -> int:
        return len(self._now) + len(self._before)

    def keep(self, entry: Entry) -> None:
        """Hold a ready page for this step and the next."""
        if entry in self._now:
            return
        self._now[entry] = None
        if entry in self._before:
            del self._before[entry]
        else:
            self._primary.begin_reads((entry,), gpu=False)

    def end_step(self) -> None:
        """Let go of what was not asked for in the step that ends."""
        before, self._before, self._now = self._before, self._now, {}
        self._primary.end_reads(before, gpu=False)

    def clear(self) -> None:
        """Let go of everything."""
        self.end_step()
        self.end_step()
