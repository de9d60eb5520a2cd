"""Copying from and to a root of the fs tier."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from kvstrata.offload.cli.copy.host import PlaceHost
from kvstrata.offload.cli.copy.place import UNTRUSTED, Place, PlaceError, Refused, Wrong
from kvstrata.tiers.base import PageKey, TierConfigError, TierContext
from kvstrata.tiers.fs.budget.limits import Limits, Usage
from kvstrata.tiers.fs.budget.member import Member
from kvstrata.tiers.fs.config import FsConfig
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.layout import NamespacePaths, located_key
from kvstrata.tiers.fs.files.namespace import read_config
from kvstrata.tiers.fs.files.quarantine import Identity
from kvstrata.tiers.fs.files.trust import is_trusted
from kvstrata.tiers.fs.page_files import PageFiles
from kvstrata.tiers.fs.startup import Opened, limits_of, open_root
from kvstrata.tiers.fs.tools.listing import check_config, namespaces, walk
from kvstrata.tiers.fs.tools.trim import trim
from kvstrata.tiers.machine.disk import disk_at
from kvstrata.tiers.process.medium import Medium, Outcome, PageRef

_CLOSE_WITHIN_S = 60.0
_UNTRUSTED = f"{UNTRUSTED} (kvstrata trust)"


class DirectoryPlace(Place):
    """Files below `config.root_dir`."""

    # a file that the disk cannot read says nothing of the others
    page_causes = Place.page_causes | {"symlink", "not-regular", "unreadable", "io-error"}
    more_room = (
        "free some of the disk, or give TO as JSON with other limits "
        "(max_bytes, max_files, min_free_bytes)"
    )

    def __init__(self, shown: str, config: FsConfig) -> None:
        self.shown = shown
        self.config = replace(config, root_dir=os.path.realpath(config.root_dir))

    @property
    def root(self) -> str:
        """Free of links."""
        return self.config.root_dir

    @property
    def exists(self) -> bool:
        """Whether anything is there."""
        return os.path.lexists(self.root)

    def namespaces(self) -> list[str]:
        """See `Place.namespaces`."""
        try:
            return [paths.name for paths in namespaces(self.root)]
        except OSError as error:
            raise PlaceError(f"{self.shown!r}: {error.strerror or error}") from None

    def fields(self, name: str) -> Mapping[str, Any]:
        """See `Place.fields`."""
        paths = self._paths(name)
        if (wrong := check_config(paths)) is not None:
            raise Refused(paths.config, ": ".join(wrong))
        try:
            if not is_trusted(paths):
                raise Refused(paths.home, _UNTRUSTED)
            return read_config(paths.config)
        except (OSError, ValueError) as error:  # it was replaced meanwhile
            raise Refused(paths.config, str(error)) from None

    def keys(self, name: str, since: float | None, wrong: Wrong) -> Iterator[PageKey]:
        """See `Place.keys`; what cannot be listed is wrong too."""
        paths = self._paths(name)

        def unreadable(path: str, error: OSError) -> None:
            wrong(path, f"unreadable: {error.strerror or error}")

        for kind, path in walk([paths.pages], paths.quarantine, unreadable):
            if kind != "page":
                continue
            try:
                if since is not None and nofollow.lstat(path).st_mtime < since:
                    continue
            except FileNotFoundError:
                continue
            except OSError as error:
                unreadable(path, error)
                continue
            key = located_key(os.path.relpath(path, paths.pages))
            if key is None:
                wrong(path, "key: no page belongs there")
            else:
                yield key

    def where(self, name: str, key: PageKey) -> str:
        """See `Place.where`."""
        return self._paths(name).page(key)

    def source(self, name: str, context: TierContext) -> Medium:
        """See `Place.source`."""
        return _SourceFiles(self.config, context, self._paths(name), True, lambda *said: None)

    def target(self, context: TierContext) -> Medium:
        """See `Place.target`; opened as the fs tier opens it, so what it refuses is refused."""
        try:
            opened = open_root(self.config, context)
            limits, taken = self._limits(opened.config), Usage(0, 0, 0)
            if limits.counted:
                taken = trim(opened.config.root_dir, Limits()).after  # trims nothing
        except (TierConfigError, OSError) as error:
            raise PlaceError(str(error)) from None
        if not opened.trusted:
            raise Refused(opened.paths.home, _UNTRUSTED)
        host = PlaceHost(self.shown)
        return _TargetFiles(opened, context, host, limits, taken)

    def overlaps(self, other: Place) -> bool:
        """See `Place.overlaps`."""
        if not isinstance(other, DirectoryPlace):
            return False
        one, two = f"{self.root}/", f"{other.root}/"
        if one.startswith(two) or two.startswith(one):
            return True
        there = os.path.exists(self.root) and os.path.exists(other.root)
        return there and os.path.samefile(self.root, other.root)  # mounted twice

    def _limits(self, config: FsConfig) -> Limits:
        """What ends the copy."""
        return limits_of(config)

    def _paths(self, name: str) -> NamespacePaths:
        return NamespacePaths(self.root, name)


class _SourceFiles(PageFiles):
    """Nothing is moved to the quarantine: this only looks."""

    def _reject(self, key: bytes, cause: str, detail: str, found_bad: Identity | None) -> Outcome:
        return Outcome(cause, detail=detail)


class _TargetFiles(PageFiles):
    """A member of the root, as a server's writer is: servers hear of each page, and have budgets.

    The member has no limits, so nothing is evicted for the copy but by the limits of servers that
    live there. The place's own limits end the copy instead.
    """

    def __init__(
        self,
        opened: Opened,
        context: TierContext,
        host: PlaceHost,
        limits: Limits,
        taken: Usage,
    ) -> None:
        config = opened.config
        self._limits, self._taken = limits, taken
        self._lock, self._under_way = threading.Lock(), 0
        self._joined: Member | None = None
        if opened.limits is not None:
            of_books = config.root_dir, opened.paths.name, Limits(), config.file_mode
            self._joined = Member(*of_books, config.dir_mode, host, ground=opened.ground)
        of_tier = config, context, opened.paths, opened.direct
        super().__init__(*of_tier, lambda *said: None, self._joined, opened.ground)

    def store(self, page: PageRef, view: memoryview, access: int) -> Outcome:
        """See `Medium.store`."""
        cost = self._cost(page.key)
        if not self._take(cost):
            full = f"{self._config.root_dir!r} has no more room within its limits"
            return Outcome("budget", detail=full)
        outcome = super().store(page, view, access)
        with self._lock:
            self._under_way -= cost
            if not outcome.moved:
                self._count(-cost, -1)
        return outcome

    def close(self) -> None:
        """Leave the books."""
        if self._joined is not None:
            self._joined.close(_CLOSE_WITHIN_S)

    def _take(self, cost: int) -> bool:
        """Count one more file, if the limits have room for it."""
        with self._lock:
            free = disk_at(self._config.root_dir).free - self._under_way
            room = self._limits.room_to_write(self._taken._replace(free_bytes=free))
            if room.holds(cost):
                self._under_way += cost
                self._count(cost, 1)
                return True
            return False

    def _count(self, nbytes: int, files: int) -> None:
        taken = self._taken
        self._taken = taken._replace(nbytes=taken.nbytes + nbytes, files=taken.files + files)
