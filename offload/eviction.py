"""Which page of the primary tier goes next: LRU and ARC over keys, pure book-keeping.

A policy orders the keys that may be evicted. A key in use is taken out with `pin` and
comes back with `unpin`, so that choosing a victim never walks over pages in use.
"""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping


class EvictionPolicy(ABC):
    """Resident keys in the order of eviction; every key is either idle or pinned.

    A policy of your own is named by `eviction_policy` as "package.module:Class".
    """

    @abstractmethod
    def __init__(self, capacity: int) -> None:
        """Begin with nothing; at most `capacity` keys will be resident."""

    @abstractmethod
    def admit(self, key: bytes) -> None:
        """Room will be made for this new key: called once, before any `evict` for it."""

    @abstractmethod
    def insert(self, key: bytes) -> None:
        """An admitted key became resident; it starts pinned (it is being written)."""

    @abstractmethod
    def touch(self, key: bytes) -> None:
        """A resident key was used."""

    @abstractmethod
    def pin(self, key: bytes) -> None:
        """An idle key must not be evicted until `unpin`."""

    @abstractmethod
    def unpin(self, key: bytes) -> None:
        """A pinned key may be evicted again."""

    @abstractmethod
    def remove(self, key: bytes) -> None:
        """A resident key is gone for another reason than eviction; no trace is kept."""

    @abstractmethod
    def evict(self) -> bytes:
        """Choose an idle key, forget it as resident and return it.

        Raises:
            LookupError: no key is idle.
        """

    @abstractmethod
    def idle(self) -> int:
        """How many keys could be evicted now."""

    @abstractmethod
    def clear(self) -> None:
        """Forget everything."""


class LRU(EvictionPolicy):
    """Least recently used first. The end of a use counts as a use.

    A pinned key stays in its place until its turn comes, and is then passed over once: pins
    are far more frequent than evictions, and far from each other in memory.
    """

    def __init__(self, capacity: int) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()
        self._pinned: set[bytes] = set()  # those in the order that are pinned

    def admit(self, key: bytes) -> None:
        pass  # the order does not depend on what comes in

    def insert(self, key: bytes) -> None:
        pass  # it comes into the order when it is first unpinned

    def touch(self, key: bytes) -> None:
        if key not in self._pinned and key in self._order:
            self._order.move_to_end(key)

    def pin(self, key: bytes) -> None:
        self._pinned.add(key)

    def unpin(self, key: bytes) -> None:
        if key in self._pinned:
            self._pinned.remove(key)
            self._order.move_to_end(key)
        else:
            self._order[key] = None

    def remove(self, key: bytes) -> None:
        self._order.pop(key, None)
        self._pinned.discard(key)

    def evict(self) -> bytes:
        while self._order:
            key, _ = self._order.popitem(last=False)
            if key not in self._pinned:
                return key
            self._pinned.remove(key)
        raise LookupError("no idle key")

    def idle(self) -> int:
        return len(self._order) - len(self._pinned)

    def clear(self) -> None:
        self._order.clear()
        self._pinned.clear()


class ARC(EvictionPolicy):
    """Adaptive replacement cache (Megiddo and Modha, FAST 2003, figure 4).

    T1 holds keys used once, T2 keys used again, B1 and B2 the keys lately evicted from
    each; a miss that is found in B1 or B2 moves the target size of T1. Keys in use are
    kept out of the lists' order and return at the recent end of their list.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._target = 0.0  # p of the paper: wanted size of T1, in keys
        self._lists: dict[int, OrderedDict[bytes, None]] = {1: OrderedDict(), 2: OrderedDict()}
        self._ghosts: dict[int, OrderedDict[bytes, None]] = {1: OrderedDict(), 2: OrderedDict()}
        self._home: dict[bytes, int] = {}  # resident key -> 1 or 2
        self._size = {1: 0, 2: 0}  # resident keys of each list, pinned ones included
        self._from_b2 = False  # the key being admitted is in B2

    def admit(self, key: bytes) -> None:
        ghost = self._ghost(key)
        self._from_b2 = ghost == 2
        if ghost:
            self._adapt(ghost)

    def insert(self, key: bytes) -> None:
        ghost = self._ghost(key)
        if ghost:
            del self._ghosts[ghost][key]
        home = 2 if ghost else 1
        self._home[key] = home
        self._size[home] += 1
        self._trim_ghosts()

    def touch(self, key: bytes) -> None:
        home = self._home.get(key)
        if home is None:
            return
        idle = key in self._lists[home]
        self._lists[home].pop(key, None)
        self._size[home] -= 1
        self._size[2] += 1
        self._home[key] = 2
        if idle:
            self._lists[2][key] = None

    def pin(self, key: bytes) -> None:
        del self._lists[self._home[key]][key]

    def unpin(self, key: bytes) -> None:
        self._lists[self._home[key]][key] = None

    def remove(self, key: bytes) -> None:
        home = self._home.pop(key)
        self._lists[home].pop(key, None)
        self._size[home] -= 1

    def evict(self) -> bytes:
        size = self._size[1]
        home = 1 if size > self._target or (self._from_b2 and 0 < size == self._target) else 2
        if not self._lists[home]:
            home = 3 - home
        if not self._lists[home]:
            raise LookupError("no idle key")
        key = self._lists[home].popitem(last=False)[0]
        del self._home[key]
        self._size[home] -= 1
        self._ghosts[home][key] = None
        return key

    def idle(self) -> int:
        return len(self._lists[1]) + len(self._lists[2])

    def clear(self) -> None:
        for keys in (*self._lists.values(), *self._ghosts.values()):
            keys.clear()
        self._home.clear()
        self._size = {1: 0, 2: 0}
        self._target = 0.0

    def _ghost(self, key: bytes) -> int:
        return 1 if key in self._ghosts[1] else 2 if key in self._ghosts[2] else 0

    def _adapt(self, ghost: int) -> None:
        one, two = len(self._ghosts[1]), len(self._ghosts[2])
        if ghost == 1:
            self._target = min(self._target + max(1.0, two / one), float(self._capacity))
        else:
            self._target = max(self._target - max(1.0, one / two), 0.0)

    def _trim_ghosts(self) -> None:
        while self._ghosts[1] and self._size[1] + len(self._ghosts[1]) > self._capacity:
            self._ghosts[1].popitem(last=False)
        total = self._size[1] + self._size[2] + len(self._ghosts[1]) + len(self._ghosts[2])
        while self._ghosts[2] and total > 2 * self._capacity:
            self._ghosts[2].popitem(last=False)
            total -= 1


_BUILT_IN: Mapping[str, type[EvictionPolicy]] = {"lru": LRU, "arc": ARC}


def policy_class(name: object) -> type[EvictionPolicy]:
    """The policy that `eviction_policy` asks for: a built-in name or "package.module:Class".

    Raises:
        ValueError: there is no such policy; names the key, the value and the remedy.
    """
    found = _BUILT_IN.get(name) if isinstance(name, str) else None
    if found is not None:
        return found
    wrong = f"eviction_policy={name!r}"
    module, _, attribute = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not module or not attribute:
        raise ValueError(
            f'{wrong}: use one of {", ".join(_BUILT_IN)}, or "package.module:Class" for your own'
        )
    try:
        imported = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the module is foreign code and may raise anything
        raise ValueError(
            f"{wrong} cannot be imported: {type(error).__name__}: {error}; "
            "give the path of a class that the engine's processes can import"
        ) from error
    if not isinstance(imported, type) or not issubclass(imported, EvictionPolicy):
        raise ValueError(
            f"{wrong} is no eviction policy: give a class derived from "
            f"{EvictionPolicy.__module__}:{EvictionPolicy.__name__}"
        )
    if inspect.isabstract(imported):
        missing = ", ".join(sorted(imported.__abstractmethods__))
        raise ValueError(f"{wrong} lacks {missing}: give a class that defines them")
    return imported
