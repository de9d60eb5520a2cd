"""The medium of the fs tier: one namespace's files, its books, and who looks after both."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from kvstrata.tiers.base import PageKey, TierContext
from kvstrata.tiers.fs.budget.member import Member
from kvstrata.tiers.fs.files.temporary import sweep
from kvstrata.tiers.fs.files.trust import distrust, is_trusted
from kvstrata.tiers.fs.page_files import PageFiles
from kvstrata.tiers.fs.startup import Opened
from kvstrata.tiers.process.medium import QUARANTINED, Host, Outcome, PageRef

_LOOK_FOR_TRUST_S = 0.5  # how soon a word of the operator's, or of another server, is heard


class FsMedium(PageFiles):
    """A `PageFiles` with books. Two threads of its own look after them and the mark of trust."""

    def __init__(self, opened: Opened, context: TierContext, host: Host, reader: bool) -> None:
        """Only the process of the writes keeps the books, or sweeps where there are none."""
        config, paths = opened.config, opened.paths
        member = None
        if opened.limits is not None:
            modes = config.file_mode, config.dir_mode
            member = Member(
                *(config.root_dir, paths.name, opened.limits, *modes, host),
                keeps=not reader,
                ground=opened.ground,
            )
        super().__init__(
            *(config, context, paths, opened.direct, host.report, member),
            ground=opened.ground,
            quarantined=lambda cause: host.upkeep({f"{QUARANTINED}{cause}": 1}),
        )
        self._host = host
        self._closing = threading.Event()
        self._told = opened.trusted  # what the engine knows
        self._unmarked = False  # the mark could not be made
        self._lock = threading.Lock()
        threading.Thread(target=self._watch_trust, name="kvstrata-fs-trust", daemon=True).start()
        if member is None and not reader:  # else the keeper does it
            name = "kvstrata-fs-sweep"
            threading.Thread(target=self._sweep, name=name, daemon=True).start()

    def reject(self, page: PageRef, computed: memoryview, distrust: bool) -> Outcome:
        """See `Medium.reject`; the namespace is marked on the disk."""
        if distrust:
            with self._lock:
                self._unmarked = True
            self._look_for_trust()
        return super().reject(page, computed, distrust)

    def used(self, keys: Sequence[PageKey], access: int) -> None:
        """Write it down."""
        if self._member is not None:
            for key in keys:
                self._member.used(key, 0, access)

    def promised(self, keys: Sequence[PageKey], access: int) -> None:
        """Write it down, and spare the pages for a while."""
        if self._member is not None:
            for key in keys:
                self._member.promised(key, access)

    def close(self) -> None:
        """Write down everything, and leave the books."""
        self._closing.set()
        if self._member is not None:
            self._member.close(threading.TIMEOUT_MAX)

    def _sweep(self) -> None:
        places = self.paths.home, self.paths.pages
        removed = sum(sweep(place, self._closing) for place in places)
        self._host.upkeep({"swept_temporaries": removed})

    def _watch_trust(self) -> None:
        while not self._closing.wait(_LOOK_FOR_TRUST_S):
            self._look_for_trust()

    def _look_for_trust(self) -> None:
        """Mark the namespace if that is to be done, and tell the engine of what is there now."""
        with self._lock:
            try:
                if self._unmarked:
                    distrust(self.paths, self._config.file_mode)
                    self._unmarked = False
                trusted = is_trusted(self.paths)
            except OSError as error:
                word = "marked yet" if self._unmarked else "looked at"
                self._host.report("distrust", f"the namespace cannot be {word}: {error}")
                return
            if trusted != self._told:
                self._told = trusted
                self._host.trust(trusted)
