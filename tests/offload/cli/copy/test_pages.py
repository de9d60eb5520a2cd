"""Pages are moved many at a time."""

from collections.abc import Sequence
from threading import Barrier

from kvstrata.offload.cli.copy.pages import Copied, Copying
from kvstrata.tiers.base import PageKey
from kvstrata.tiers.page.page import PageForm
from kvstrata.tiers.process.medium import Medium, Outcome, PageRef
from kvstrata.tiers.testing import CONTEXT, make_key

KEYS = [make_key(n) for n in range(16)]


class Together(Medium):
    """A store ends when all are under way."""

    def __init__(self) -> None:
        self._all = Barrier(len(KEYS), timeout=60.0)

    def exists(self, keys: Sequence[PageKey]) -> list[bool]:
        return [False] * len(keys)

    def store(self, page: PageRef, view: memoryview, access: int) -> Outcome:
        self._all.wait()
        return Outcome(moved=True)

    def load(self, page: PageRef, view: memoryview, access: int) -> Outcome:
        return Outcome(moved=True)


def test_few_pages_do_not_wait_for_each_other() -> None:
    both, done = (Together(), Together()), Copied()
    Copying(*both, PageForm(CONTEXT), frozenset(), PageKey.hex, done, None).run(KEYS)
    assert (done.pages, done.stopped) == (len(KEYS), None)
