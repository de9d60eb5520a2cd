"""Seals: what a page is, said in the last bytes of its slot.

Tiers that were made for vLLM's own manager move slots as they are, and verify nothing. So a page
is sealed before they store it, and its seal is looked at when they have loaded it: what is not the
page of that key, whole and of this namespace, is a miss.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import xxhash

from kvstrata.offload.vllm_plugin.foreign_tiers.rows import Rows
from kvstrata.tiers.base import PageKey, TierContext, key_group
from kvstrata.tiers.page.form import BadPage
from kvstrata.tiers.page.identity import MAX_HASH_BYTES, is_key, namespace_digest

SEAL_VERSION = 1

# magic with the version, the namespace's digest, the page's XXH3-128, the key with its length
_FORM = struct.Struct(f"<8s12s16sB{MAX_HASH_BYTES + 4}s")
_MAGIC = b"KVSSEAL" + bytes([SEAL_VERSION])
SEAL_BYTES = 128
_NOTHING = bytes(SEAL_BYTES)
assert _FORM.size <= SEAL_BYTES


class Seals:
    """Seals of the pages of one namespace, in the slots that they lie in. Any thread may call."""

    def __init__(self, context: TierContext, rows: Rows) -> None:
        self._rows = rows
        self._namespace = namespace_digest(context.namespace).encode()
        self._nbytes = {group: layout.nbytes for group, layout in context.layouts.items()}

    def nbytes(self, key: PageKey) -> int | None:
        """The size of the key's page; None if there cannot be one."""
        return self._nbytes.get(key_group(key)) if is_key(key) else None

    def put(self, keys: Sequence[PageKey], slots: Sequence[int]) -> None:
        """Seal the pages in these slots. The GIL is released while they are read."""
        for key, slot in zip(keys, slots, strict=True):
            page = self._rows.page(slot, self._nbytes[key_group(key)])
            checksum = xxhash.xxh3_128_digest(page)
            seal = _FORM.pack(_MAGIC, self._namespace, checksum, len(key), key)
            self._rows.tail(slot, SEAL_BYTES)[: len(seal)] = seal

    def clear(self, slots: Sequence[int]) -> None:
        """Take the seals away, so that a page that is not loaded does not pass for one that is."""
        for slot in slots:
            self._rows.tail(slot, SEAL_BYTES)[:] = _NOTHING

    def check(self, keys: Sequence[PageKey], slots: Sequence[int]) -> dict[PageKey, str]:
        """Look at pages that were loaded; the cause for each that is not what its key says."""
        failed: dict[PageKey, str] = {}
        for key, slot in zip(keys, slots, strict=True):
            try:
                self._verify(key, slot)
            except BadPage as bad:
                failed[key] = bad.cause
        return failed

    def _verify(self, key: PageKey, slot: int) -> None:
        magic, namespace, checksum, length, sealed = _FORM.unpack_from(
            self._rows.tail(slot, SEAL_BYTES)
        )
        if magic != _MAGIC:
            raise BadPage("header", "there is no seal")
        if namespace != self._namespace:
            raise BadPage("namespace", "the page is of another namespace")
        if sealed[:length] != key:
            raise BadPage("key", "the page is another key's")
        if checksum != xxhash.xxh3_128_digest(self._rows.page(slot, self._nbytes[key_group(key)])):
            raise BadPage("checksum", "the data is not what was stored")
