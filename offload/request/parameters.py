"""What a request wishes: `kv_transfer_params.kvstrata`.

A wish may keep a user's data off a disk, so wishes fail closed. What looks like one in a wrong
place or form is understood where its meaning is plain. Otherwise the strictest reading holds: the
request's pages stay out of all secondary tiers; of a pin, that nothing is pinned.
"""

from __future__ import annotations

import json
import logging
import re
import reprlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from kvstrata.tiers.options import nearest

logger = logging.getLogger("kvstrata.manager")

LONGEST_PIN_S = 86_400.0
KEYS = ("persist", "tiers", "pin_seconds")
SECTION = "kvstrata"
_FRACTION = "store_fraction"  # nobody can grant it
_OUTER = "kv_transfer_params"  # around itself
# Our words without case and punctuation: clients write kv_strata, pinSeconds and kvstrata.persist.
_WORDS = {
    "kvstrata": SECTION,
    "kvtransferparams": _OUTER,
    "persist": "persist",
    "tiers": "tiers",
    "tier": "tiers",
    "pinseconds": "pin_seconds",
    "storefraction": _FRACTION,
}
# So alike are "presist" and "persist". None of vLLM's keys is so much like one of ours.
_ALIKE = 0.8
_DEEPEST = 4  # sections in sections
_YES = frozenset(("true", "yes", "on", "1"))
# Clients choose the keys: so much of one and so many of them are looked at, and so many forms are
# warned of in a minute.
_LONGEST_KEY = 100
_MOST_KEYS = 1000  # of a request
_MOST_WARNINGS = 100
WARN_EVERY_S = 60.0
_SHORT = reprlib.Repr()  # of what a client sent, whatever its length
_SHORT.maxstring = _SHORT.maxother = 100


@dataclass(frozen=True, slots=True)
class Parameters:
    """A request's wishes, checked."""

    tiers: frozenset[str] | None = None  # that the request's pages are given to; None: all
    pin_seconds: float = 0.0  # for which its pages are kept from eviction in the primary tier

    def allow(self, tier: str) -> bool:
        """Whether the request's pages may be given to the tier of this name."""
        return self.tiers is None or tier in self.tiers


NO_PARAMETERS = Parameters()
_NOWHERE: frozenset[str] = frozenset()


@dataclass(slots=True)
class _Found:
    """All wishes found in a request; the strictest of each kind holds."""

    tiers: list[frozenset[str]] = field(default_factory=list)
    pins: list[float] = field(default_factory=list)
    keys: int = 0  # that were looked at

    def strictest(self) -> Parameters:
        if not (self.tiers or self.pins):
            return NO_PARAMETERS
        tiers = frozenset.intersection(*self.tiers) if self.tiers else None
        return Parameters(tiers, min(self.pins, default=0.0))


class ParameterReader:
    """Reads wishes. Those in a wrong place or form are counted, and warned of once a minute each.

    Args:
        tiers: names of the secondary tiers.
        clock: seconds, monotonic.
    """

    def __init__(self, tiers: Collection[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._tiers = tuple(tiers)
        self._clock = clock
        self._warned: dict[tuple[str, str], float] = {}  # form -> when
        self.wrong = 0

    def read(self, params: Mapping[str, Any]) -> Parameters:
        """The wishes in a request's `kv_transfer_params`; it never raises."""
        found = _Found()
        self._read_params(params, found, 0)
        return found.strictest()

    def _read_params(
        self, params: Mapping[Any, Any], found: _Found, depth: int, *, foreign: bool = False
    ) -> None:
        """What is ours among the keys of `kv_transfer_params`, most of which are others'.

        In a `foreign` object that is only what has our name, and what is no other word than ours.
        """
        for key, value in self._keys(params, found):
            if key == SECTION and not depth:
                self._read_section(key, value, found, depth)
                continue
            word, sure = _meaning(key)
            if word == SECTION and sure:
                self._warn(key, value, f'it is read as "{SECTION}" in kv_transfer_params')
                self._read_section(key, value, found, depth)
            elif word == SECTION:
                self._refuse(key, value, f'the wishes are in "{SECTION}"', found)
            elif word == _OUTER and sure and value is not None:
                inner = _parsed(value)
                if inner is None or depth >= _DEEPEST:
                    self._refuse(key, value, f'the wishes are in "{SECTION}"', found)
                else:
                    self._read_params(inner, found, depth + 1)
            elif word in (_OUTER, None):
                if isinstance(value, Mapping) and depth < _DEEPEST:
                    self._read_params(value, found, depth + 1, foreign=word is None)
            elif not foreign or "strata" in key.lower() or (sure and word != "tiers"):
                if sure and word != _FRACTION:
                    text = f'it belongs into "{SECTION}": {{...}}, and is read as if it were there'
                    self._warn(key, value, text)
                self._read_wish(key, word, value, found, sure=sure)

    def _read_section(self, key: str, value: object, found: _Found, depth: int) -> None:
        if value is None:
            return  # as clients send what was left out
        wishes = _parsed(value)
        if wishes is None or depth >= _DEEPEST:
            self._refuse(key, value, 'use an object such as {"persist": false}', found)
            return
        if wishes is not value:
            self._warn(key, value, "it is read as the object that its text says")
        for name, wish in self._keys(wishes, found):
            word, sure = _meaning(name)
            if word == SECTION and sure:
                self._warn(name, wish, f'it is in itself; use one "{SECTION}" only')
                self._read_section(name, wish, found, depth + 1)
            elif word in (SECTION, _OUTER, None):
                self._refuse(name, wish, f"the wishes are {', '.join(KEYS)}", found)
            else:
                if sure and name not in (*KEYS, _FRACTION):
                    self._warn(name, wish, f'it is read as "{word}"')
                self._read_wish(name, word, wish, found, sure=sure)

    def _keys(self, given: Mapping[Any, Any], found: _Found) -> Iterator[tuple[str, Any]]:
        """Keys and values, until so many of the request were looked at that no more are."""
        for key, value in given.items():
            found.keys += 1
            if found.keys == _MOST_KEYS + 1:
                self._refuse(_short(key), value, f"send {_MOST_KEYS} keys at most", found)
            if found.keys > _MOST_KEYS:
                return
            yield _short(key), value

    def _read_wish(self, key: str, word: str, value: object, found: _Found, *, sure: bool) -> None:
        """One wish; not `sure`: its key only looks like the word."""
        if word == _FRACTION:
            # vLLM tells an offloading manager no prompt's length.
            remedy = f"send {_OUTER}.max_offload_tokens, beside {SECTION}, instead"
            self._refuse(key, value, remedy, found)
        elif word == "pin_seconds":
            found.pins.append(self._seconds(key, value, sure=sure))
        elif not sure:
            # It may mean the opposite, as "no_persist" does.
            self._refuse(key, value, f"the wishes are {', '.join(KEYS)}{nearest(key, KEYS)}", found)
        elif word == "tiers":
            found.tiers.append(self._names(key, value))
        elif not self._persists(key, value):
            found.tiers.append(_NOWHERE)

    def _persists(self, key: str, value: object) -> bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str):
            persists = value.strip().lower() in _YES
        else:
            persists = isinstance(value, int | float) and value == 1
        self._warn(key, value, f"use true or false; it is read as {str(persists).lower()}")
        return persists

    def _names(self, key: str, value: object) -> frozenset[str]:
        names = value if isinstance(value, list | tuple) else [value]
        if names is value and all(name in self._tiers for name in names):
            return frozenset(names)
        words = [name for name in names if isinstance(name, str)]
        lower = {name.strip().lower() for name in words}
        tiers = frozenset(name for name in self._tiers if name.lower() in lower)
        known = ", ".join(self._tiers) or "there are none"
        read = f"it is read as {sorted(tiers)}"
        self._warn(key, value, f"use a list of names of secondary tiers ({known}); {read}")
        return tiers

    def _seconds(self, key: str, value: object, *, sure: bool) -> float:
        seconds = _number(value) if sure else None
        remedy = f'use "pin_seconds" with a number from 0 to {LONGEST_PIN_S:g}'
        if seconds is None or not 0.0 <= seconds <= LONGEST_PIN_S:
            self._warn(key, value, f"{remedy}; nothing is pinned")
            return 0.0
        if isinstance(value, str):
            self._warn(key, value, f"{remedy}; it is read as {seconds:g}")
        return seconds

    def _refuse(self, key: str, value: object, remedy: str, found: _Found) -> None:
        """Read what nobody understands as strictly as it may have been meant."""
        found.tiers.append(_NOWHERE)
        self._warn(
            key, value, f"it is not understood, so no secondary tier gets the pages; {remedy}"
        )

    def _warn(self, key: str, value: object, text: str) -> None:
        self.wrong += 1
        now, form = self._clock(), (key, text)
        if form not in self._warned and len(self._warned) >= _MOST_WARNINGS:
            recent = {form: at for form, at in self._warned.items() if now - at < WARN_EVERY_S}
            self._warned = recent
            if len(recent) >= _MOST_WARNINGS:
                return
        if now - self._warned.get(form, -WARN_EVERY_S) < WARN_EVERY_S:
            return
        self._warned[form] = now
        logger.warning(
            "a request's wish %s=%s: %s (said once a minute; counted as wrong_wishes)",
            key,
            _SHORT.repr(value),
            text,
        )


@lru_cache(maxsize=1024)
def _meaning(key: str) -> tuple[str | None, bool]:
    """Which of our words a key is, but for case and punctuation, or (False) looks like."""
    letters = re.sub("[^a-z0-9]", "", key.lower())
    inner = letters.removeprefix(SECTION)
    if word := _WORDS.get(inner or letters):
        return word, True
    if "strata" in letters:
        return SECTION, False
    if "persist" in letters:
        return "persist", False
    if "tiers" in letters and "load" not in letters:  # vLLM's kv_load_tiers is not ours
        return "tiers", False
    if len(letters) <= 2 * len(_OUTER):  # others are like none of them, and take long
        for near in get_close_matches(letters, _WORDS, 1, _ALIKE):
            return _WORDS[near], False
    return None, False


def _parsed(value: object) -> Mapping[Any, Any] | None:
    """An object, perhaps as JSON text; None if it is none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, Mapping) else None


def _number(value: object) -> float | None:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    return None


def _short(key: object) -> str:
    return key[:_LONGEST_KEY] if isinstance(key, str) else f"<{type(key).__name__}>"
