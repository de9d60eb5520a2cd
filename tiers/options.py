"""Reading options: every mistake is one error that names the key, the value and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from fractions import Fraction
from math import inf
from typing import Any

from kvstrata.tiers.base import TierConfigError

# Keys that an entry of `secondary_tiers` of any type may have: those that say which class it is,
# and those of the manager.
COMMON_KEYS = (
    *("type", "module_path", "store_threshold", "max_tracker_size"),
    *("enable_kv_events", "locality", "backpressure", "tier_poll_interval_s"),
)

MAX_BYTES = 2**60  # 1 EiB: no medium is larger, so a larger number is a mistake

# "GiB" and "GB", and as Kubernetes writes them "Gi" and "G".
_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtp", start=1):
    _UNITS |= dict.fromkeys((f"{_letter}b", _letter), 1000**_power)
    _UNITS |= dict.fromkeys((f"{_letter}ib", f"{_letter}i"), 1024**_power)
_SIZE = re.compile(r"([0-9]{1,24}(?:\.[0-9]{1,24})?) ?([A-Za-z]*)")

_LEAST_BEGINNING = 3  # characters that name a key


def nearest(word: str, known: Collection[str]) -> str:
    """` (did you mean 'x'?)` with the known word that looks most like `word`, or nothing.

    Case does not count, and the beginning of a word will do.
    """
    by_lower = {each.lower(): each for each in sorted(known)}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.7)
    if not close and len(word) >= _LEAST_BEGINNING:
        close = [each for each in by_lower if each.startswith(word.lower())]
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def size_text(nbytes: int) -> str:
    """`1.5 GiB`: at most four figures and a unit."""
    size, units = float(nbytes), iter(("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))
    unit = next(units)
    while size >= 1023.95 and (larger := next(units, None)):
        size, unit = size / 1024, larger
    return f"{nbytes} B" if unit == "B" else f"{size:.1f} {unit}"


class UnknownKeyError(TierConfigError):
    """An option that `where` does not know: `key`."""

    def __init__(self, where: str, key: object, known: Collection[str]) -> None:
        self.where, self.key = where, str(key)
        names = ", ".join(sorted(known)) or "none"
        near = nearest(self.key, known)
        super().__init__(f"{where}: unknown key {key!r}{near}; known keys: {names}")


def check_keys(where: str, options: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse keys that `where` does not know.

    Raises:
        UnknownKeyError: naming the first unknown key, the nearest known one, and all known.
    """
    for key in options:
        if key not in known:
            raise UnknownKeyError(where, key, known)


def check_tier_keys(where: str, options: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse options that a tier does not know; the message names the `COMMON_KEYS` as well.

    Raises:
        UnknownKeyError: as `check_keys`.
    """
    check_keys(where, options, {*known, *COMMON_KEYS})


def parse_bytes(key: str, value: object) -> int:
    """A size in bytes from a number or from a string such as "8GiB", "500MB" or "1.5TiB".

    Units are K, M, G, T and P, alone or with B (powers of 1000), and Ki, Mi, Gi, Ti and Pi, alone
    or with B (powers of 1024), in any case; a string without a unit counts bytes. A fraction of a
    byte is dropped: vLLM's `--kv-offloading-size` makes one of a fraction of a GiB.

    Raises:
        TierConfigError: not a size, not positive, or larger than `MAX_BYTES`.
    """
    remedy = 'give a positive number of bytes or a string such as "8GiB"'
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            units = "KB, MB, GB, TB, PB, KiB, MiB, GiB, TiB, PiB, or without the B"
            raise TierConfigError(f"{key}: {value!r} is not a size; {remedy} (units: {units})")
        size = int(Fraction(match[1]) * unit)
    elif isinstance(value, int | float) and not isinstance(value, bool) and -inf < value < inf:
        size = int(value)
    else:
        raise TierConfigError(f"{key}: {value!r} is not a size; {remedy}")
    if size <= 0:
        raise TierConfigError(f"{key}: {value!r} is not positive; {remedy}")
    if size > MAX_BYTES:
        raise TierConfigError(f"{key}: {value!r} is more than {size_text(MAX_BYTES)}; {remedy}")
    return size


def parse_count(key: str, value: object, most: int) -> int:
    """A whole number from 1 to `most`.

    Raises:
        TierConfigError: another type or outside the range.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        unquoted = ", without quotes" if isinstance(value, str) and value.isdecimal() else ""
        raise TierConfigError(
            f"{key}: {value!r} is wrong; give a whole number from 1 to {most:,}{unquoted}"
        )
    return value


def parse_choice(key: str, value: object, choices: Collection[str]) -> str:
    """One of the words in `choices`.

    Raises:
        TierConfigError: anything else; the message lists the choices.
    """
    if isinstance(value, str) and value in choices:
        return value
    near = nearest(value, choices) if isinstance(value, str) else ""
    raise TierConfigError(
        f"{key}: {value!r} is wrong{near}; give one of {', '.join(sorted(choices))}"
    )


def parse_mode(key: str, value: object, needed: int, most: int = 0o777) -> int:
    """Permission bits from an int or from an octal string such as "0640".

    `needed` are the bits without which the tier could not use its own files; `most` has all
    that may be set.

    Raises:
        TierConfigError: bits that are not in `most`, or a needed bit is missing.
    """
    with_group = needed | (needed & 0o500) >> 3  # reads, and enters a directory
    remedy = f'give an octal string such as "{with_group:04o}"'
    mode = value
    if isinstance(value, str):
        mode = int(value, 8) if re.fullmatch(r"(?:0o)?[0-7]{1,6}", value) else None
    if isinstance(mode, bool) or not isinstance(mode, int) or mode < 0 or mode & ~most:
        raise TierConfigError(f"{key}: {value!r} is not a permission mode; {remedy}")
    if mode & needed != needed:
        raise TierConfigError(f"{key}: {value!r} lacks the owner's {needed:04o}; {remedy}")
    return mode
