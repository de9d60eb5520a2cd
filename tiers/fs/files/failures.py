"""The words for what goes wrong with files."""

from __future__ import annotations

import errno

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
