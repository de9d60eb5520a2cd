"""What the tier knows of keys without asking the medium. One thread only, no I/O.

Other processes add pages to the same medium, so "present" may be remembered (a load finds out
when it is wrong), while "absent" is kept only briefly and only for the request that asked. Where
the medium has told of all its pages, what is unknown is absent: the request is answered at once,
and the medium is asked all the same, for the next one.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from kvstrata.tiers.base import Changes, Lookup, PageKey

# Each entry takes about 200 bytes with a 36-byte key, so at most about 100 MB.
MAX_PRESENT = 2**19
MAX_REFUSED = 2**14
MAX_LOST = 2**12
MAX_CHECKS = 2**16  # under check at once; a disk that hangs must not fill the memory
# Checked for later requests, in a step: one that is told MISS asks for few keys, as a rule for one.
MOST_BEHIND = 256
ABSENT_FOR_S = 2.0  # how long a negative answer may be repeated to the same request
CHECK_WITHIN_S = 5.0  # a check that takes longer is answered with MISS
# A page that was found and not told of is rarely alone, say where files were copied there: for so
# long look-ups wait for the medium, since a request that is told MISS asks for no page behind it.
DOUBT_S = 60.0


class Index:
    """Keys known present, lost or refused, keys being checked, and recent negative answers.

    Attributes:
        told: the medium has told of all its pages.
        groups: how many keys are known present, by their last bytes, which are the group's.
        changes: keys that became known present, and those that no longer are.
    """

    def __init__(self, max_present: int = MAX_PRESENT, max_refused: int = MAX_REFUSED) -> None:
        self._max_present = max_present
        self._max_refused = max_refused
        self._present: OrderedDict[bytes, None] = OrderedDict()  # least recently used first
        self.groups: Counter[bytes] = Counter()
        self.changes = Changes()
        self._refused: OrderedDict[bytes, None] = OrderedDict()
        self._lost: OrderedDict[bytes, None] = OrderedDict()
        # Under check for requests that wait: since when, and which ask for it
        self._asked: dict[bytes, tuple[float, set[str]]] = {}
        self._unsent: dict[bytes, None] = {}  # those under check that were not yet sent off
        self._absent: dict[str, dict[bytes, float]] = {}  # until when, per request
        self.told = False
        self._dropped = False  # a present key, for want of room
        self._doubted_until = -math.inf
        self._doubts: set[bytes] = set()  # keys that were found and not told of, since then
        # Checked, or to be, though answered at once, in the last moments
        self._checked: set[bytes] = set()
        self._checked_until = 0.0
        self._open = 0  # keys that `take_unsent` gave and that were not answered

    def __len__(self) -> int:
        return len(self._present)

    def is_present(self, key: bytes) -> bool:
        """Whether the page is known to be on the disk; it becomes the most recently used."""
        if key in self._present:
            self._present.move_to_end(key)
            return True
        return False

    def lookup(self, key: bytes, req_id: str, now: float) -> Lookup:
        """The answer to a request; an unknown key is noted for the next `take_unsent`."""
        if self.is_present(key):
            return Lookup.HIT
        if key in self._refused:
            return Lookup.MISS
        if self.told and not self._dropped and now >= self._doubted_until:
            self._check(key, now)
            return Lookup.MISS
        answers = self._absent.setdefault(req_id, {})
        if now < answers.get(key, now):
            return Lookup.MISS
        asked = self._asked.get(key)
        if asked is None:
            if len(self._asked) >= MAX_CHECKS:
                return Lookup.MISS
            self._asked[key] = now, {req_id}
            self._unsent[key] = None
        elif now - asked[0] > CHECK_WITHIN_S:
            return Lookup.MISS
        else:
            asked[1].add(req_id)
        return Lookup.RETRY

    def is_awaited(self, key: bytes) -> bool:
        """Whether a request waits for a check of the key, which waits for `take_unsent`."""
        return key in self._unsent and key in self._asked

    def take_unsent(self) -> list[bytes]:
        """The keys to be checked on the medium; each must be answered later."""
        unsent, self._unsent = self._unsent, {}
        self._open += len(unsent)
        return list(unsent)

    def answer(self, keys: Sequence[bytes], present: Iterable[bool], now: float) -> None:
        """The medium was asked for keys of `take_unsent`."""
        self._open -= len(keys)
        for key, there in zip(keys, present, strict=True):
            asked = self._asked.pop(key, None)
            if there:
                if asked is None and key not in self._present:
                    if now >= self._doubted_until:
                        self._doubts.clear()
                    self._doubted_until = now + DOUBT_S
                    if len(self._doubts) < MAX_LOST:
                        self._doubts.add(key)
                self.add(key)
            elif asked is not None:
                for req_id in asked[1]:
                    if req_id in self._absent:  # else the request has finished
                        self._absent[req_id][key] = now + ABSENT_FOR_S

    def _check(self, key: bytes, now: float) -> None:
        """Let the medium be asked, if it was not in the last moments."""
        if now >= self._checked_until:
            self._checked.clear()
            self._checked_until = now + ABSENT_FOR_S
        unsent = len(self._unsent)
        if unsent < MOST_BEHIND and self._open + unsent < MAX_CHECKS and key not in self._checked:
            self._checked.add(key)
            self._unsent[key] = None

    def add(self, key: bytes, *, can_wait: bool = True) -> None:
        """The page is on the disk."""
        if key in self._refused:
            return
        self._lost.pop(key, None)
        if self.is_present(key):
            return
        self._present[key] = None
        self.groups[key[-4:]] += 1
        self.changes.note(key, True, can_wait=can_wait)
        if len(self._present) > self._max_present:
            oldest, _ = self._present.popitem(last=False)
            self.groups[oldest[-4:]] -= 1
            self._dropped = True
            self.changes.note(oldest, False, can_wait=True)

    def discard(self, key: bytes) -> None:
        """The page is not on the disk any more."""
        if key in self._present:
            del self._present[key]
            self.groups[key[-4:]] -= 1
            self.changes.note(key, False, can_wait=True)

    def hear(self, key: bytes) -> None:
        """Somebody says that the page is on the disk; of a lost one that may be old news."""
        if key not in self._lost:
            self.add(key)

    def lose(self, key: bytes) -> None:
        """A load found no usable page: `discard`, and from now on only the disk is believed."""
        self._lost[key] = None
        if len(self._lost) > MAX_LOST:
            self._lost.popitem(last=False)
        self.discard(key)

    def refuse(self, key: bytes) -> None:
        """What is on the disk under this key cannot be used and could not be moved away."""
        self.discard(key)
        self._refused[key] = None
        if len(self._refused) > self._max_refused:
            self._refused.popitem(last=False)

    def is_refused(self, key: bytes) -> bool:
        """Whether the key is refused: a store must replace its file."""
        return key in self._refused

    def accept(self, key: bytes, *, written: bool = True) -> None:
        """This process stored the page, so a refusal ends; `written`: it was not there before.

        Then a check found it before the store was known to have ended, and it is no reason to
        doubt.
        """
        self._refused.pop(key, None)
        if written and key in self._doubts:
            self._doubts.discard(key)
            if not self._doubts:
                self._doubted_until = -math.inf
        self.add(key, can_wait=False)
        self.changes.hasten(key)

    def take_changes(self, most: int, *, anew: bool) -> list[tuple[PageKey, bool]]:
        """See `SecondaryTier.take_changes`: what this process stored is told at once."""
        return self.changes.take(most, self._present, anew=anew)

    def touch(self, keys: Iterable[bytes]) -> list[bytes]:
        """Make the keys the most recently used; those of them that are known present."""
        return [key for key in keys if self.is_present(key)]

    def forget_request(self, req_id: str) -> None:
        """The request will not ask again."""
        self._absent.pop(req_id, None)
