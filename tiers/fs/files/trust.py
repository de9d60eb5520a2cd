"""Whether a namespace is to be believed: a marker beside its config.json says that it is not.

Audits put it there (see docs/audit.md), for all servers and across restarts; only an operator
takes it away, with `kvstrata trust`.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.namespace import publish, read_config
from kvstrata.tiers.page.identity import distrust_text


def is_trusted(paths: NamespacePaths) -> bool:
    """Whether there is no marker.

    Raises:
        OSError: that cannot be told.
    """
    try:
        nofollow.lstat(paths.distrust)
    except (FileNotFoundError, NotADirectoryError):
        return True
    return False


def distrust(paths: NamespacePaths, mode: int) -> None:
    """Put the marker there, unless it is.

    Raises:
        OSError: it cannot be written.
    """
    if is_trusted(paths):
        publish(paths.distrust, distrust_text(), mode)


def trust(paths: NamespacePaths) -> dict[str, Any] | None:
    """Take the marker away: what it said, as far as that can be read; None if there was none.

    Raises:
        OSError: it cannot be removed.
    """
    said: dict[str, Any] = {}
    with suppress(OSError, ValueError):  # it may be anybody's work
        said = read_config(paths.distrust)
    try:
        nofollow.unlink(paths.distrust)
    except FileNotFoundError:
        return None
    return said
