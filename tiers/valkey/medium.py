"""The pages of a valkey server. A page is two values, so that neither is copied on its way.

They are written and read together. See names.py.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping, Sequence

from kvstrata.tiers.base import PageKey, TierContext
from kvstrata.tiers.page.form import BadPage
from kvstrata.tiers.page.identity import config_text, directory_name, distrust_text
from kvstrata.tiers.page.page import PageForm
from kvstrata.tiers.process.medium import Host, Medium, Outcome, PageRef, while_it_answers, words
from kvstrata.tiers.valkey.client import Client
from kvstrata.tiers.valkey.config import ValkeyOptions
from kvstrata.tiers.valkey.names import config_name, distrust_name, page_name

# It is written with a page, and again with one so many seconds later: a server that evicts, or
# came back empty, has it as long as pages are stored.
_CONFIG_S = 60


class ValkeyMedium(Medium):
    """A namespace's pages; all threads share one client."""

    def __init__(
        self, options: ValkeyOptions, context: TierContext, host: Host, reader: bool
    ) -> None:
        self._form = PageForm(context)
        self._ttl_s = options.ttl_s
        self._client = Client(options, lazy=True)
        self._host = host
        name = directory_name(context.model, self._form.namespace)
        self._config, self._mark = config_name(name), distrust_name(name)
        self._config_text = config_text(context.namespace)
        self._config_due = 0.0  # monotonic

    def exists(self, keys: Sequence[PageKey]) -> list[bool]:
        """In one round trip."""
        batch = self._client.batch()
        for key in keys:
            batch.exists(self._names(key))
        return [found == 2 for found in self._client.run(batch)]

    def store(self, page: PageRef, view: memoryview, access: int) -> Outcome:
        """Both values in one command; the server may have evicted one of an earlier pair."""
        header = self._form.header(page.key, view)
        pair: dict[bytes, bytes | memoryview] = dict(
            zip(self._names(page.key), (header, view), strict=True)
        )
        try:
            self._renew_config()
            moved = self._put(pair, page.rewrite)
            if not moved and not self.exists([page.key])[0]:
                moved = self._put(pair, True)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return Outcome("no-space", detail=words(error))
        return Outcome(moved=moved)

    def load(self, page: PageRef, view: memoryview, access: int) -> Outcome:
        """Straight into the view."""
        header = memoryview(bytearray(self._form.header_size(page.key)))
        try:
            sizes = self._client.fetch(self._names(page.key), (header, view))
        except ValueError as error:
            raise BadPage("size", str(error)) from None
        before, data = sizes
        if before is None or data is None:
            return Outcome("missing", gone=True)
        if before != len(header) or data != len(view):
            raise self._form.blame(page.key, bytes(header[:before]), before + data)
        self._form.verify(page.key, bytes(header), view)
        return Outcome(moved=True)

    def store_many(
        self, pages: Sequence[PageRef], views: Sequence[memoryview], access: int
    ) -> list[Outcome]:
        """See `Medium.store_many`."""
        return while_it_answers(self.store, pages, views, access, "io-error")

    def load_many(
        self, pages: Sequence[PageRef], views: Sequence[memoryview], access: int
    ) -> list[Outcome]:
        """See `Medium.load_many`."""
        return while_it_answers(self.load, pages, views, access, "io-error")

    def reject(self, page: PageRef, computed: memoryview, distrust: bool) -> Outcome:
        """Delete it."""
        batch = self._client.batch()
        if distrust:
            self._host.trust(False)
            batch.msetnx({self._mark: distrust_text()})
        batch.unlink(self._names(page.key))
        self._client.run(batch)
        return Outcome(gone=True)

    def close(self) -> None:
        """See `Medium.close`."""
        self._client.close()

    def _put(self, pair: Mapping[bytes, bytes | memoryview], replace: bool) -> bool:
        return self._client.put(pair, replace=replace, ttl_s=self._ttl_s)

    def _renew_config(self) -> None:
        if (now := time.monotonic()) < self._config_due:
            return
        batch = self._client.batch()
        batch.set(self._config, self._config_text)
        if self._ttl_s:
            batch.expire(self._config, self._ttl_s + _CONFIG_S)
        self._client.run(batch)
        self._config_due = now + _CONFIG_S

    def _names(self, key: PageKey) -> list[bytes]:
        name = page_name(self._form.namespace, key)
        return [f"{name}:header".encode(), f"{name}:data".encode()]
