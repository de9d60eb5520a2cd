"""Counting what goes wrong, and one log line per kind."""

from __future__ import annotations

import errno
import logging
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
    """Failures by cause since the start, in the engine's process."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def count(self, cause: str, detail: str, number: int = 1) -> None:
        """Count failures; the first of each cause is logged with its detail."""
        if not self._counts[cause]:
            logger.warning(
                "kvstrata fs tier: %s: %s (logged once per cause; counted from now on)",
                cause,
                detail,
            )
        self._counts[cause] += number

    def totals(self) -> dict[str, int]:
        """A copy of the counts."""
        return dict(self._counts)
