"""Counting what goes wrong, and one log line per kind."""

from __future__ import annotations

import errno
import logging
import threading
from collections import Counter

logger = logging.getLogger("kvstrata.tiers.fs")

_CAUSES = {
    errno.ENOENT: "missing",
    errno.ENOTDIR: "missing",
    errno.ELOOP: "symlink",
    errno.ENXIO: "not-regular",
    errno.EISDIR: "not-regular",
    errno.EACCES: "unreadable",
    errno.EPERM: "unreadable",
    errno.ENOSPC: "no-space",
    errno.EDQUOT: "no-space",
    errno.EROFS: "read-only",
}


def error_cause(error: OSError) -> str:
    """The short word under which a failure of the file system is counted."""
    return _CAUSES.get(error.errno or 0, "io-error")


class Failures:
    """Failures by cause since the start; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def count(self, cause: str, detail: str) -> None:
        """Count one failure; the first of each cause is logged with its detail."""
        with self._lock:
            self._counts[cause] += 1
            first = self._counts[cause] == 1
        if first:
            logger.warning(
                "kvstrata fs tier: %s: %s (logged once per cause; counted from now on)",
                cause,
                detail,
            )

    def totals(self) -> dict[str, int]:
        """A copy of the counts."""
        with self._lock:
            return dict(self._counts)
