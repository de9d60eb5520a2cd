"""The pages of a namespace as bytes, the same on every medium.

A medium that keeps whole objects, as a bucket does, keeps `header` followed by the page, which is
what a file of the fs tier holds, and reads it back with `read`. One that reads straight into the
page has the header and the page apart, and calls `verify`.
"""

from __future__ import annotations

from kvstrata.tiers.base import PageKey, PageLayout, TierContext, key_group
from kvstrata.tiers.page.form import (
    MAX_HEADER_BYTES,
    BadPage,
    encode_header,
    header_bytes,
    page_checksum,
    verify_header,
)
from kvstrata.tiers.page.identity import namespace_digest


class PageForm:
    """How the pages of one namespace are written and verified. All keys must be of it."""

    def __init__(self, context: TierContext) -> None:
        self.namespace = namespace_digest(context.namespace)
        self._layouts = dict(context.layouts)
        self._header_sizes: dict[tuple[int, int], int] = {}

    def layout(self, key: PageKey) -> PageLayout:
        """That of the key's page."""
        return self._layouts[key_group(key)]

    def header_size(self, key: PageKey) -> int:
        """Bytes before the page's data, a multiple of 4096."""
        kind = len(key), key_group(key)
        size = self._header_sizes.get(kind)
        if size is None:
            size = len(encode_header(key, self.namespace, self.layout(key)))
            self._header_sizes[kind] = size
        return size

    def size(self, key: PageKey) -> int:
        """Bytes of the whole: header and data."""
        return self.header_size(key) + self.layout(key).nbytes

    def header(self, key: PageKey, view: memoryview) -> bytes:
        """What comes before the page's data, with the checksum of that."""
        return encode_header(key, self.namespace, self.layout(key), page_checksum(view))

    def verify(self, key: PageKey, header: bytes, view: memoryview) -> None:
        """See whether header and data are the page's.

        Raises:
            BadPage: they are not.
        """
        if page_checksum(view) != verify_header(header, key, self.namespace, self.layout(key)):
            raise BadPage("checksum", "the data is not what was written")

    def read(self, key: PageKey, whole: memoryview | bytes, view: memoryview) -> None:
        """Fill the view from header and data, and verify it.

        Raises:
            BadPage: it is not the page.
        """
        size = self.header_size(key)
        if len(whole) != self.size(key):
            raise self.blame(key, bytes(whole[:MAX_HEADER_BYTES]), len(whole))
        view[:] = whole[size:]
        self.verify(key, bytes(whole[:size]), view)

    def blame(self, key: PageKey, start: bytes, size: int) -> BadPage:
        """The best word for a whole of the wrong size, from its first bytes."""
        try:
            length = header_bytes(start[:8])
            if length <= len(start):
                verify_header(start[:length], key, self.namespace, self.layout(key))
        except BadPage as bad:
            return bad
        too_short = length > size or size - length < self.layout(key).nbytes
        return BadPage("truncated" if too_short else "size", f"{size} bytes")
