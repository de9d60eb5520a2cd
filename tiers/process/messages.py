"""What the engine and its I/O processes say to each other, one packet after the other.

To the process: first a `Setup`, then tasks. To the engine: records. A packet is a list of as many
as there are: each system call hands the engine's GIL to whoever waits for it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import msgspec

from kvstrata.tiers.base import PageKey, PageRegion, TierContext
from kvstrata.tiers.process.medium import MediumSpec, News, Outcome, PageRef

MOST_PAGES = 512  # of a task, so that it fits into a packet
MOST_NEWS = 400  # of a record, so that two fit into a packet
MOST_SAMPLES = 256  # of a kind in a record, and waiting for whoever tells them
MAX_PACKET = 2**16
MAX_SETUP = 2**20
HEADER_BYTES = 5  # of a packet
_MOST_CHARS = 1000  # of a text: 4,000 bytes at most
_MOST_CAUSE = 50  # of a cause, in ASCII: the outcomes of `MOST_PAGES` are half a packet


class Kind(enum.IntEnum):
    """What a task does with its pages."""

    LOAD = 0
    STORE = 1
    CHECK = 2  # whether they are there; no slot is touched
    USE = 3  # note that they were used; this and the next are never answered
    PROMISE = 4  # note that they were used and will be loaded soon
    REJECT = 5  # never serve the page again; the slot holds what the model computes
    DISTRUST = 6  # the same, and believe no page any more
    FINISH = 7  # drop what waits, and end; without it the engine is gone


# What writes to the medium, and is done by those who prefer that.
WRITES = frozenset((Kind.STORE, Kind.REJECT, Kind.DISTRUST))


class Task(msgspec.Struct, array_like=True, gc=False):
    """At most `MOST_PAGES` pages that one thread moves, one after the other: a column each.

    Attributes:
        kind: what is to be done.
        keys: the offload keys.
        slots: the index of each page's slot in the region; none where no slot is touched.
        depths: each page's end in the request, in tokens; ditto.
        rewrites: whether a store replaces the page that is there; none for never.
        access: the pages of one access count as used together.
        job_id: the engine's own.
        task_id: given by the supervisor.
        pin_s: see `PageRef`; the same for all, which are of one request.
    """

    kind: Kind
    keys: list[PageKey]
    slots: list[int] = []
    depths: list[int] = []
    rewrites: list[bool] = []
    access: int = 0
    job_id: int = 0
    task_id: int = 0
    pin_s: float = 0.0

    def pages(self) -> list[PageRef]:
        """The pages as a medium sees them; only for tasks that touch slots."""
        rewrites = self.rewrites or repeat(False)
        return list(map(PageRef, self.keys, self.depths, rewrites, repeat(self.pin_s)))


class _Record(msgspec.Struct, array_like=True, gc=False, tag=True):
    """What a process tells the engine."""


class Done(_Record):
    """A task has ended; `start` and `end` are of the clock `time.monotonic`, in seconds.

    `outcomes` has one for each page, or only one that is that of all, as a rule.
    """

    task_id: int
    outcomes: list[Outcome]
    start: float
    end: float


class Failure(_Record):
    """Something failed; the detail is empty if the cause was reported before."""

    cause: str
    detail: str


class Notice(_Record):
    """Something that the operator should know, and no failure."""

    text: str


class Ready(_Record):
    """The process has started."""


class Trusted(_Record):
    """The medium's pages are not to be believed (False), or they are again."""

    trusted: bool


class Told(_Record):
    """At most `MOST_NEWS` pages that came (True) or went (False) without the engine, in order."""

    news: Sequence[News]


class Complete(_Record):
    """Whether the process has told of all pages that are there; False until it says otherwise."""

    complete: bool


class Upkeep(_Record):
    """What the medium did of its own accord since the last one, by counter."""

    counts: dict[str, int]


class Figures(_Record):
    """Present values of the medium, and what it observed since the last one; see `TierStats`."""

    gauges: dict[str, float]
    samples: dict[str, list[float]] = {}


Record = Done | Failure | Upkeep | Figures | Told | Complete | Trusted | Notice | Ready


@dataclass(frozen=True, slots=True)
class Setup:
    """All that an I/O process must know.

    Attributes:
        medium: how it makes its medium.
        context: the engine's context without its region.
        region: the region; `fd` is the process's own descriptor.
        engine: process id of the engine.
        outlives: whether the process writes what it was given when the engine is gone.
        readers: whether the process prefers reads to writes.
        threads: number of its threads.
    """

    medium: MediumSpec
    context: TierContext
    region: PageRegion
    engine: int
    outlives: bool
    readers: bool = True
    threads: int = 1


# A task or a record, in bytes.
pack = msgspec.msgpack.Encoder().encode
# The tasks, or the records, of a packet; msgspec.MsgspecError if it is none of those.
unpack_tasks = msgspec.msgpack.Decoder(list[Task]).decode
unpack_records = msgspec.msgpack.Decoder(list[Record]).decode


def packet(packed: Sequence[bytes]) -> bytes:
    """A packet of what `pack` gave: a msgpack array (array 32)."""
    return b"".join((b"\xdd", len(packed).to_bytes(4), *packed))


def short(text: str) -> str:
    """A text that has room in a record, and that can be encoded."""
    return text[:_MOST_CHARS].encode("utf-8", "replace").decode()


def short_cause(cause: str) -> str:
    """The same of a cause."""
    return cause[:_MOST_CAUSE].encode("ascii", "replace").decode()
