"""Reading options: every mistake is one error that names the key, the value and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from fractions import Fraction
from typing import Any

from kvstrata.tiers.base import TierConfigError

# Keys that an entry of `secondary_tiers` of any type may have; the last two are the manager's.
COMMON_KEYS = ("type", "module_path", "store_threshold", "max_tracker_size")

MAX_BYTES = 2**60  # 1 EiB: no medium is larger, so a larger number is a mistake

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"([0-9]{1,24}(?:\.[0-9]{1,24})?) ?([A-Za-z]*)")


def nearest(word: str, known: Collection[str]) -> str:
    """` (did you mean 'x'?)` with the known word that looks most like `word`, or nothing."""
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_keys(where: str, options: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse keys that `where` does not know.

    Raises:
        TierConfigError: naming the first unknown key, the nearest known one, and all known.
    """
    for key in options:
        if key not in known:
            names = ", ".join(sorted(known)) or "none"
            raise TierConfigError(
                f"{where}: unknown key {key!r}{nearest(str(key), known)}; known keys: {names}"
            )


def check_tier_keys(where: str, options: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse options that a tier does not know; the message names the `COMMON_KEYS` as well.

    Raises:
        TierConfigError: as `check_keys`.
    """
    check_keys(where, options, {*known, *COMMON_KEYS})


def parse_bytes(key: str, value: object) -> int:
    """A size in bytes from an int or from a string such as "8GiB", "500MB" or "1.5TiB".

    Units are B, KB, MB, GB, TB (powers of 1000) and KiB, MiB, GiB, TiB (powers of 1024), in
    any case; a string without a unit counts bytes. A fraction of a byte is dropped.

    Raises:
        TierConfigError: not a size, not positive, or larger than `MAX_BYTES`.
    """
    remedy = 'give a positive number of bytes or a string such as "8GiB"'
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        unit = _UNITS.get(match[2].lower() or "b") if match else None
        if match is None or unit is None:
            units = "B, KB, MB, GB, TB, KiB, MiB, GiB, TiB"
            raise TierConfigError(f"{key}: {value!r} is not a size; {remedy} (units: {units})")
        size = int(Fraction(match[1]) * unit)
    elif isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        raise TierConfigError(f"{key}: {value!r} is not a size; {remedy}")
    if size <= 0:
        raise TierConfigError(f"{key}: {value!r} is not positive; {remedy}")
    if size > MAX_BYTES:
        raise TierConfigError(f"{key}: {value!r} is more than 2**60 bytes; {remedy}")
    return size


def parse_count(key: str, value: object, most: int) -> int:
    """A whole number from 1 to `most`.

    Raises:
        TierConfigError: another type or outside the range.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise TierConfigError(f"{key}: {value!r} is wrong; give a whole number from 1 to {most}")
    return value


def parse_choice(key: str, value: object, choices: Collection[str]) -> str:
    """One of the words in `choices`.

    Raises:
        TierConfigError: anything else; the message lists the choices.
    """
    if isinstance(value, str) and value in choices:
        return value
    raise TierConfigError(f"{key}: {value!r} is wrong; give one of {', '.join(sorted(choices))}")


def parse_mode(key: str, value: object, needed: int) -> int:
    """Permission bits from an int or from an octal string such as "0640".

    `needed` are the bits without which the tier could not use its own files.

    Raises:
        TierConfigError: not permission bits (above 0o777), or a needed bit is missing.
    """
    remedy = f'give an octal string such as "{needed | 0o040:04o}"'
    mode = value
    if isinstance(value, str):
        mode = int(value, 8) if re.fullmatch(r"(?:0o)?[0-7]{1,6}", value) else None
    if isinstance(mode, bool) or not isinstance(mode, int) or not 0 <= mode <= 0o777:
        raise TierConfigError(f"{key}: {value!r} is not a permission mode; {remedy}")
    if mode & needed != needed:
        raise TierConfigError(f"{key}: {value!r} lacks the owner's {needed:04o}; {remedy}")
    return mode
