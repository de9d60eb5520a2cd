"""Short names for files below a root: two bytes for the namespace, then the key.

What is no page (a file in quarantine) is named by 0xffff and its path.
"""

from __future__ import annotations

import os
import re

from kvstrata.tiers.fs.files.layout import PAGE_SUFFIX, QUARANTINE_NAME, page_location
from kvstrata.tiers.page.identity import is_key

_OTHER = b"\xff\xff"
_MAX_NAMESPACES = 0xFFFF
NAMESPACE = re.compile(r"[A-Za-z0-9._-]{0,128}_[0-9a-f]{12}")  # as `layout.directory_name` makes
_QUARANTINED = re.compile(rf"{NAMESPACE.pattern}_r0/{QUARANTINE_NAME}/[^/\0]+", re.DOTALL)
_HASH = re.compile(r"(?:[0-9a-f]{2})+")
_LEAF = re.compile(r"[0-9a-f]{2}_g([0-9]{1,10})")


class Names:
    """The namespaces that were met, by number."""

    def __init__(self, namespaces: list[str] | None = None) -> None:
        self.namespaces = list(namespaces or [])
        self._numbers = {name: number for number, name in enumerate(self.namespaces)}

    def prefix(self, namespace: str) -> bytes | None:
        """What the names of the namespace's pages begin with; None for what is none."""
        number = self._numbers.get(namespace)
        if number is None:
            number = len(self.namespaces)
            if NAMESPACE.fullmatch(namespace) is None or number >= _MAX_NAMESPACES:
                return None
            self._numbers[namespace] = number
            self.namespaces.append(namespace)
        return number.to_bytes(2, "big")

    def name(self, parts: list[str]) -> bytes | None:
        """The name of the file at these parts of a path below the root; None: not ours."""
        if len(parts) == 4 and parts[0].endswith("_r0") and parts[3].endswith(PAGE_SUFFIX):
            text, leaf = parts[3].removesuffix(PAGE_SUFFIX), _LEAF.fullmatch(parts[2])
            if leaf is None or _HASH.fullmatch(text) is None or int(leaf[1]) >= 2**32:
                return None
            key = bytes.fromhex(text) + int(leaf[1]).to_bytes(4, "big")
            if not is_key(key) or page_location(key) != "/".join(parts[1:]):
                return None
            prefix = self.prefix(parts[0].removesuffix("_r0"))
            return None if prefix is None else prefix + key
        path = "/".join(parts)
        return _OTHER + os.fsencode(path) if _QUARANTINED.fullmatch(path) else None

    def path(self, name: bytes) -> str | None:
        """The path below the root; None for a name that nobody here made."""
        if name[:2] == _OTHER:
            path = os.fsdecode(name[2:])
            return path if _QUARANTINED.fullmatch(path) else None
        number, key = int.from_bytes(name[:2], "big"), name[2:]
        if number >= len(self.namespaces) or not is_key(key):
            return None
        return f"{self.namespaces[number]}_r0/{page_location(key)}"

    def namespace(self, name: bytes) -> str | None:
        """The namespace whose page this is; None for other files."""
        number = int.from_bytes(name[:2], "big")
        return self.namespaces[number] if number < len(self.namespaces) else None


def is_page(name: bytes) -> bool:
    """Whether the name is a page's, and not that of a file in quarantine."""
    return name[:2] != _OTHER
