"""The medium of the fs tier: one namespace's files, its books, and who looks after both."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from kvstrata.tiers.base import PageKey, TierContext
from kvstrata.tiers.fs.budget.member import Member
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.temporary import sweep
from kvstrata.tiers.fs.files.trust import distrust, is_trusted
from kvstrata.tiers.fs.page_files import PageFiles
from kvstrata.tiers.fs.startup import Opened
from kvstrata.tiers.process.medium import Host, Outcome, PageRef

_LOOK_FOR_TRUST_S = 0.5  # how soon a word of the operator's, or of another server, is heard


class TrustWatch:
    """Tells the engine when the namespace is marked as one not to be believed, or no longer is."""

    def __init__(self, paths: NamespacePaths, file_mode: int, trusted: bool, host: Host) -> None:
        """trusted: what the engine knows."""
        self._paths = paths
        self._file_mode = file_mode
        self._told = trusted
        self._host = host
        self._unmarked = False  # the mark could not be made
        self._lock = threading.Lock()

    def distrust(self) -> None:
        """Mark the namespace, now or as soon as the disk allows; any thread may."""
        with self._lock:
            self._unmarked = True
        self.look()

    def look(self) -> None:
        """Look at the disk; any thread may."""
        with self._lock:
            try:
                if self._unmarked:
                    distrust(self._paths, self._file_mode)
                    self._unmarked = False
                trusted = is_trusted(self._paths)
            except OSError as error:
                word = "marked yet" if self._unmarked else "looked at"
                self._host.report("distrust", f"the namespace cannot be {word}: {error}")
                return
            if trusted != self._told:
                self._told = trusted
                self._host.trust(trusted)


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
            config, context, paths, opened.direct, host.report, member, ground=opened.ground
        )
        self._host = host
        self._closing = threading.Event()
        self._watch = TrustWatch(paths, config.file_mode, opened.trusted, host)
        threading.Thread(target=self._watch_trust, name="kvstrata-fs-trust", daemon=True).start()
        if member is None and not reader:  # else the keeper does it
            name = "kvstrata-fs-sweep"
            threading.Thread(target=self._sweep, name=name, daemon=True).start()

    def reject(self, page: PageRef, computed: memoryview, distrust: bool) -> Outcome:
        """See `Medium.reject`; the namespace is marked on the disk."""
        if distrust:
            self._watch.distrust()
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
            self._watch.look()
