"""The medium of the object tier: one object a page, named and filled as the fs tier's files are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

from kvstrata.tiers.base import PageKey, TierContext, key_group
from kvstrata.tiers.fs.files.layout import located_key
from kvstrata.tiers.fs.files.quarantine import quarantine_path
from kvstrata.tiers.object.bucket import SILENT, Bucket, BucketError
from kvstrata.tiers.object.opening import Opened
from kvstrata.tiers.page.form import MAX_HEADER_BYTES
from kvstrata.tiers.page.identity import distrust_text
from kvstrata.tiers.page.page import PageForm
from kvstrata.tiers.process.medium import Host, Medium, Outcome, PageRef, while_it_answers

AUDIT = "audit"  # the cause of a page that was found to be another than the model's
_QUESTIONS = 64  # that are asked at a time, by all checks: each waits for the network
_WAIT_S = 0.1  # for an engine that does not listen


class ObjectMedium(Medium):
    """The objects of one namespace."""

    def __init__(self, opened: Opened, context: TierContext, host: Host, reader: bool) -> None:
        self._bucket = Bucket(opened.config)
        self._paths = opened.paths
        self._form = PageForm(context)
        self._groups = frozenset(context.layouts)
        self._host = host
        self._askers = ThreadPoolExecutor(_QUESTIONS, "kvstrata-object-ask")
        if reader:
            Thread(target=self._tell, name="kvstrata-object-list", daemon=True).start()

    def exists(self, keys: Sequence[PageKey]) -> list[bool]:
        """Whether objects of the right size are there; if that cannot be told, none are."""
        try:
            return list(self._askers.map(self._is_there, keys))
        except BucketError as error:
            self._host.report(error.cause, str(error))
            return [False] * len(keys)

    def store(self, page: PageRef, view: memoryview, access: int) -> Outcome:
        """Put the page; an object of the right size stays, unless it is to be rewritten."""
        path = self._paths.page(page.key)
        whole = self._form.header(page.key, view) + view
        if self._bucket.write(path, whole, replace=page.rewrite):
            return Outcome(moved=True)
        if self._is_there(page.key):
            return Outcome()
        return Outcome(moved=self._bucket.write(path, whole, replace=True))

    def load(self, page: PageRef, view: memoryview, access: int) -> Outcome:
        """Get the page, and verify it."""
        size = self._form.size(page.key)
        found = self._bucket.read(self._paths.page(page.key), size, MAX_HEADER_BYTES)
        if found is None:
            return Outcome("missing", gone=True)
        whole, length = found
        if length != size:
            raise self._form.blame(page.key, bytes(whole), length)
        self._form.read(page.key, whole, view)
        return Outcome(moved=True)

    def store_many(
        self, pages: Sequence[PageRef], views: Sequence[memoryview], access: int
    ) -> list[Outcome]:
        """`store` for each of them."""
        return while_it_answers(self.store, pages, views, access, SILENT)

    def load_many(
        self, pages: Sequence[PageRef], views: Sequence[memoryview], access: int
    ) -> list[Outcome]:
        """`load` for each of them."""
        return while_it_answers(self.load, pages, views, access, SILENT)

    def reject(self, page: PageRef, computed: memoryview, distrust: bool) -> Outcome:
        """Move the object to the quarantine, and put there what the model computes."""
        path = self._paths.page(page.key)
        self._host.report(AUDIT, f"{path}: not what the model computes")
        if distrust:
            self._host.trust(False)
            self._bucket.write(self._paths.distrust, distrust_text().encode(), replace=False)
        moved = self._bucket.move(path, quarantine_path(self._paths, path, AUDIT))
        if moved:
            beside = quarantine_path(self._paths, path, f"{AUDIT}-computed")
            whole = self._form.header(page.key, computed) + computed
            self._bucket.write(beside, whole, replace=False)
        return Outcome(moved=moved, gone=True)

    def _tell(self) -> None:
        """Tell of what is there at the start; what others store later is asked for, one by one."""
        try:
            for objects in self._bucket.sizes(self._paths.pages):
                while self._host.is_behind:
                    time.sleep(_WAIT_S)
                keys = [self._key(path, size) for path, size in objects]
                self._host.tell([(key, True) for key in keys if key is not None])
        except BucketError as error:
            self._host.report(error.cause, str(error))

    def _key(self, path: str, size: int) -> PageKey | None:
        """The key of the page that the object is; None if it is none."""
        key = located_key(path.removeprefix(f"{self._paths.pages}/"))
        if key is None or key_group(key) not in self._groups or self._form.size(key) != size:
            return None
        return key

    def _is_there(self, key: PageKey) -> bool:
        return self._bucket.size(self._paths.page(key)) == self._form.size(key)
