"""What the engine and its I/O processes say to each other, one packet after the other.

To the process: first a `Setup`, then tasks. To the engine: records. A packet holds as many as
there are: each system call hands the engine's GIL to whoever waits for it. Both ends are the
same program on the same machine, so nothing is checked.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvstrata.tiers.base import PageRegion, TierContext
from kvstrata.tiers.fs.budget.limits import Limits
from kvstrata.tiers.fs.budget.messages import News, Upkeep
from kvstrata.tiers.fs.config import FsConfig
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.ground import Ground

MOST_PAGES = 512  # of a task, so that it fits into a packet
MOST_NEWS = 400  # of a record, so that two fit into a packet
MAX_PACKET = 2**16
MAX_SETUP = 2**20

_TASK = struct.Struct("<BIQH")  # kind, task id, access, pages
_PAGE = struct.Struct("<IIBB")  # slot, depth, rewrite, length of the key
_DONE = struct.Struct("<BIddH")  # type, task id, start, end, pages
_FAILURE = struct.Struct("<BBH")  # type, length of the cause, length of the detail
_UPKEEP = struct.Struct("<BIQI")  # type, evicted files and bytes, swept files
_NEWS = struct.Struct("<BH")  # type, pages
_NOTICE = struct.Struct("<BH")  # type, length of the text
_TYPE_DONE, _TYPE_FAILURE, _TYPE_UPKEEP, _TYPE_NEWS, _TYPE_READY, _TYPE_TRUST = range(6)
_TYPE_NOTICE = 6
READY = bytes([_TYPE_READY])
_MOVED, _GONE, _STUCK, _FAILED = 1, 2, 4, 8


class Kind(enum.IntEnum):
    """What a task does with its pages."""

    LOAD = 0
    STORE = 1
    CHECK = 2  # whether their files are there; no slot is touched
    USE = 3  # note that they were used; this and the next are never answered
    PROMISE = 4  # note that they were used and will be loaded soon
    REJECT = 5  # move the file to the quarantine, with the page that the slot holds beside it
    DISTRUST = 6  # the same, and mark the namespace as one that is not to be believed
    FINISH = 7  # drop what waits, and end; without it the engine is gone


# What writes files, and is done by those who prefer that.
WRITES = frozenset((Kind.STORE, Kind.REJECT, Kind.DISTRUST))


class PageRef(NamedTuple):
    """A page of a task.

    Attributes:
        key: the offload key.
        slot: index of the page's slot in the region.
        depth: the page's end in the request, in tokens; 0 if unknown.
        rewrite: a store replaces a file that is there.
    """

    key: bytes
    slot: int = 0
    depth: int = 0
    rewrite: bool = False


class Outcome(NamedTuple):
    """What became of a page.

    Attributes:
        cause: why it failed, or None.
        moved: its bytes were read or written. Not so for a store of a page that was there
            already. Of a check: the file is there.
        gone: the page, if it was here, cannot be loaded any more.
        stuck: the bad file could not be moved away, so its key must not be believed.
    """

    cause: str | None = None
    moved: bool = False
    gone: bool = False
    stuck: bool = False


_OUTCOMES = [
    Outcome(None, bool(flags & _MOVED), bool(flags & _GONE), bool(flags & _STUCK))
    for flags in range(2 * _FAILED)
]


class Done(NamedTuple):
    """A task has ended; `start` and `end` are of the clock `time.monotonic`, in seconds."""

    task_id: int
    outcomes: Sequence[Outcome]
    start: float
    end: float


class Failure(NamedTuple):
    """Something failed; the detail is empty if the cause was reported before."""

    cause: str
    detail: str


class Notice(NamedTuple):
    """Something that the operator should know, and no failure."""

    text: str


class Ready(NamedTuple):
    """The process has started."""


class Trusted(NamedTuple):
    """The namespace was marked as one that is not to be believed (False), or no longer is."""

    trusted: bool


class Told(NamedTuple):
    """Pages that others stored (True) or that were evicted (False), in their order."""

    news: Sequence[News]


@dataclass(frozen=True, slots=True)
class Setup:
    """All that an I/O process must know.

    Attributes:
        config: the tier's options.
        context: the engine's context without its region.
        paths: where the namespace lies.
        direct: whether O_DIRECT is to be used.
        limits: of the disk budget; None if no books are kept.
        region: the region; `fd` is the process's own descriptor.
        readers: whether the process prefers reads to writes.
        threads: number of its threads.
        ground: where the root stands.
        trusted: whether the namespace was to be believed when the tier was opened.
        engine: process id of the engine.
        outlives: whether the process writes what it was given when the engine is gone.
    """

    config: FsConfig
    context: TierContext
    paths: NamespacePaths
    direct: bool
    limits: Limits | None
    region: PageRegion
    readers: bool
    threads: int
    engine: int
    outlives: bool
    ground: Ground
    trusted: bool = True


def pack_task(kind: Kind, task_id: int, access: int, pages: Sequence[PageRef]) -> bytes:
    """A task of at most `MOST_PAGES` pages."""
    parts = [_TASK.pack(kind, task_id, access, len(pages))]
    for key, slot, depth, rewrite in pages:
        parts += (_PAGE.pack(slot, depth, rewrite, len(key)), key)
    return b"".join(parts)


def unpack_tasks(packet: bytes) -> Iterator[tuple[Kind, int, int, list[PageRef]]]:
    """Kind, id, access and pages of the tasks of a packet."""
    position = 0
    while position < len(packet):
        kind, task_id, access, count = _TASK.unpack_from(packet, position)
        position += _TASK.size
        pages = []
        for _ in range(count):
            slot, depth, rewrite, size = _PAGE.unpack_from(packet, position)
            position += _PAGE.size
            pages.append(PageRef(packet[position : position + size], slot, depth, bool(rewrite)))
            position += size
        yield Kind(kind), task_id, access, pages


def pack_done(done: Done) -> bytes:
    """The record of a task's end."""
    flags = bytes(
        _MOVED * o.moved + _GONE * o.gone + _STUCK * o.stuck + _FAILED * (o.cause is not None)
        for o in done.outcomes
    )
    parts = [_DONE.pack(_TYPE_DONE, done.task_id, done.start, done.end, len(flags)), flags]
    for outcome in done.outcomes:
        if outcome.cause is not None:
            parts.append(len(outcome.cause).to_bytes() + outcome.cause.encode())
    return b"".join(parts)


def pack_failure(failure: Failure) -> bytes:
    """The record of a failure; the detail is cut to 1,000 bytes."""
    cause, detail = failure.cause.encode(), failure.detail.encode("utf-8", "replace")[:1000]
    return _FAILURE.pack(_TYPE_FAILURE, len(cause), len(detail)) + cause + detail


def pack_notice(text: str) -> bytes:
    """The record of a notice; it is cut to 1,000 bytes."""
    raw = text.encode("utf-8", "replace")[:1000]
    return _NOTICE.pack(_TYPE_NOTICE, len(raw)) + raw


def pack_upkeep(upkeep: Upkeep) -> bytes:
    """The record of what was evicted and swept since the last one."""
    return _UPKEEP.pack(_TYPE_UPKEEP, *upkeep)


def pack_trust(trusted: bool) -> bytes:
    """The record of a change of trust."""
    return bytes([_TYPE_TRUST, trusted])


def pack_news(news: Sequence[News]) -> bytes:
    """The record of at most `MOST_NEWS` pages that came or went."""
    parts = [_NEWS.pack(_TYPE_NEWS, len(news))]
    for key, present in news:
        parts += (bytes([present, len(key)]), key)
    return b"".join(parts)


Record = Done | Failure | Upkeep | Told | Trusted | Notice | Ready


def unpack_records(packet: bytes) -> Iterator[Record]:
    """The records of a packet."""
    position = 0
    while position < len(packet):
        kind = packet[position]
        if kind == _TYPE_DONE:
            _, task_id, start, end, count = _DONE.unpack_from(packet, position)
            position += _DONE.size
            flags = packet[position : position + count]
            position += count
            outcomes = []
            for flag in flags:
                outcome = _OUTCOMES[flag]
                if flag & _FAILED:
                    size = packet[position]
                    cause = packet[position + 1 : position + 1 + size].decode()
                    position += 1 + size
                    outcome = outcome._replace(cause=cause)
                outcomes.append(outcome)
            yield Done(task_id, outcomes, start, end)
        elif kind == _TYPE_FAILURE:
            _, cause_size, size = _FAILURE.unpack_from(packet, position)
            middle = position + _FAILURE.size + cause_size
            cause = packet[position + _FAILURE.size : middle].decode()
            position = middle + size
            yield Failure(cause, packet[middle:position].decode("utf-8", "replace"))
        elif kind == _TYPE_UPKEEP:
            _, *numbers = _UPKEEP.unpack_from(packet, position)
            position += _UPKEEP.size
            yield Upkeep(*numbers)
        elif kind == _TYPE_NEWS:
            _, count = _NEWS.unpack_from(packet, position)
            position += _NEWS.size
            news = []
            for _ in range(count):
                start = position + 2
                end = start + packet[position + 1]
                news.append((packet[start:end], bool(packet[position])))
                position = end
            yield Told(news)
        elif kind == _TYPE_NOTICE:
            _, size = _NOTICE.unpack_from(packet, position)
            position += _NOTICE.size + size
            yield Notice(packet[position - size : position].decode("utf-8", "replace"))
        elif kind == _TYPE_TRUST:
            yield Trusted(bool(packet[position + 1]))
            position += 2
        else:
            position += len(READY)
            yield Ready()
