"""What a medium must do to be a tier: keep pages by key, and block as long as it likes.

A medium lives in an I/O process, which can be killed, and works on the page region that it shares
with the engine. `ProcessTier` is the engine's side; a tier is a medium, and a subclass of that
which checks the options. Each tier has two such processes, one that prefers reads and one that
prefers writes, each with a medium of its own and several threads that call it.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import msgspec

from kvstrata.tiers.base import PageKey
from kvstrata.tiers.page.form import BadPage

# A task that lasts longer gives up the rest of its pages: one of them may take as long as a request
# (10 s at most), and a process that ends no task for STALL_S (supervisor.py) is replaced.
_MOST_TASK_S = 15.0
# Of a medium on other machines: none answers sooner.
LEAST_TIMEOUT_S = 0.01

QUARANTINED = "quarantined:"  # before the cause, see `Host.upkeep`

News = tuple[PageKey, bool]  # a key, and whether its page is there now


class PageRef(NamedTuple):
    """A page to be moved.

    Attributes:
        key: the offload key.
        depth: the page's end in the request, in tokens; 0 if unknown.
        rewrite: a store replaces what is there.
        pin_s: for how many seconds the request wishes it to stay.
    """

    key: PageKey
    depth: int = 0
    rewrite: bool = False
    pin_s: float = 0.0


class Outcome(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What became of a page.

    Attributes:
        cause: why it failed, in a short word that is counted, or None.
        moved: its bytes were read or written. Not so for a store of a page that was there
            already. Of a check: the page is there.
        gone: the page, if it was here, cannot be loaded any more.
        stuck: what is bad is still there, so the key must not be believed until it is stored again.
        detail: of a failure, for the log; shown once per cause.
    """

    cause: str | None = None
    moved: bool = False
    gone: bool = False
    stuck: bool = False
    detail: str = ""


class MoveError(Exception):
    """A page was not moved; `cause` is a short word that is counted. For media to raise."""

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause


class Host(Protocol):
    """What a medium may tell the engine, on any thread and at any time."""

    @property
    def is_behind(self) -> bool:
        """Whether what was told before waits to be taken: what can wait elsewhere should."""

    def report(self, cause: str, detail: str) -> None:
        """Something failed that is no page's `Outcome`; the detail is logged once per cause."""

    def tell(self, news: Sequence[News]) -> None:
        """Pages came or went without the engine, in this order."""

    def complete(self, complete: bool) -> None:
        """Whether what was told is all: then a look-up of any other page is a MISS at once.

        Not so (False) until the medium says it. Pages that come later must be told; one that is
        not is found by a check, for a later request.
        """

    def upkeep(self, done: Mapping[str, int]) -> None:
        """What the medium did of its own accord since the last call, by counter of `TierStats`;
        `QUARANTINED` and a cause: pages that it put aside."""

    def figures(
        self, gauges: Mapping[str, float], samples: Mapping[str, Sequence[float]] = {}
    ) -> None:
        """Present values, and what was observed since the last call; see `TierStats`."""

    def say(self, text: str) -> None:
        """Something that the operator should know, and no failure."""

    def trust(self, trusted: bool) -> None:
        """The pages are not to be believed (False), or they are again."""


class Medium(Protocol):
    """Pages by key. Methods may block and may raise; any thread calls them.

    A `BadPage` that is raised says that what is there is not the page; a `MoveError` counts as its
    cause, an `OSError` as "io-error", anything else as "internal". A medium that is best asked for
    many pages at once replaces `store_many` and `load_many`; then the forms for one page are not
    called.
    """

    @abstractmethod
    def exists(self, keys: Sequence[PageKey]) -> Sequence[bool]:
        """Which of the pages are there, as far as can be told without reading them."""

    @abstractmethod
    def store(self, page: PageRef, view: memoryview, access: int) -> Outcome:
        """Keep the page's bytes, unless it is there and not to be rewritten.

        Nobody may ever find half of it. `access` numbers the requests: pages of one were used
        together.
        """

    @abstractmethod
    def load(self, page: PageRef, view: memoryview, access: int) -> Outcome:
        """Fill the view with the page, and verify it; `Outcome("missing", gone=True)` if none."""

    def store_many(
        self, pages: Sequence[PageRef], views: Sequence[memoryview], access: int
    ) -> Sequence[Outcome]:
        """`store` for each of them, in prefix order."""
        return [attempt(self.store, p, v, access) for p, v in zip(pages, views, strict=True)]

    def load_many(
        self, pages: Sequence[PageRef], views: Sequence[memoryview], access: int
    ) -> Sequence[Outcome]:
        """`load` for each of them, in prefix order."""
        return [attempt(self.load, p, v, access) for p, v in zip(pages, views, strict=True)]

    def reject(self, page: PageRef, computed: memoryview, distrust: bool) -> Outcome:
        """Never serve this page again: see `SecondaryTier.submit_reject`.

        Called only where the tier says that its medium `rejects`.
        """
        raise NotImplementedError

    def used(self, keys: Sequence[PageKey], access: int) -> None:
        """The pages were used, perhaps in another tier. Only the process of the writes hears it."""
        return None  # a body, without which type checkers take it for abstract

    def promised(self, keys: Sequence[PageKey], access: int) -> None:
        """Somebody was told that the pages are here. Only the process of the writes hears it."""
        return None

    def close(self) -> None:
        """No further call follows; what must not be lost is made safe."""
        return None


@dataclass(frozen=True, slots=True)
class MediumSpec:
    """How an I/O process makes its medium.

    Attributes:
        factory: `module:name` of what the process imports, and calls with the options, the engine's
            context without a region, a `Host`, and whether it is the process that prefers reads.
        options: the factory's; pickled.
        name: of a tier with several media: what tells it from the others, for ever.
        trusted: whether its pages are to be believed, until the medium says otherwise.
        noisy: whether a library of its own writes to descriptor 2 what the medium reports.
    """

    factory: str
    options: Any
    name: str = ""
    trusted: bool = True
    noisy: bool = False


def attempt(move: Callable[..., Outcome], *arguments: object) -> Outcome:
    """What `move` returns, or what it means that it raised: no page costs its neighbours."""
    try:
        return move(*arguments)
    except Exception as error:
        return failed(error)


def while_it_answers(
    move: Callable[..., Outcome],
    pages: Sequence[PageRef],
    views: Sequence[memoryview],
    access: int,
    silent: str,
) -> list[Outcome]:
    """`move` for each page, until one fails with the cause `silent`: nobody answered, or too late.

    Then the others fail at once, as they do when a slow server took too long for those before: so
    a task waits for one silent request at most, and never without an end.
    """
    outcomes: list[Outcome] = []
    end = time.monotonic() + _MOST_TASK_S
    for page, view in zip(pages, views, strict=True):
        if outcomes and outcomes[-1].cause == silent:
            outcomes.append(outcomes[-1])
        elif time.monotonic() > end:
            slow = f"the pages before took more than {_MOST_TASK_S:.0f} s"
            outcomes.append(Outcome(silent, detail=slow))
        else:
            outcomes.append(attempt(move, page, view, access))
    return outcomes


def words(error: Exception) -> str:
    """What it says; of an `OSError` without the number, which may be a medium's own choice."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


def failed(error: Exception) -> Outcome:
    """What it means for a page that a medium raised this."""
    if isinstance(error, BadPage):
        return Outcome(error.cause, gone=True, stuck=True, detail=error.detail)
    if isinstance(error, MoveError):
        return Outcome(error.cause, detail=str(error))
    if isinstance(error, OSError):
        return Outcome("io-error", detail=words(error))
    return Outcome("internal", detail=f"{type(error).__name__}: {error}")
