"""Options from one table: a dataclass in which each field says how its key is read and what it is.

    @dataclass(frozen=True)
    class BucketOptions:
        bucket: str = option(parse_text, "the bucket for the pages")
        io_threads: int = option(partial(parse_count, most=64), "threads for I/O", default=8)

    options = parse_options(BucketOptions, {"bucket": "kv"}, "bucket tier")

Every mistake is one error that names the key, the value and the remedy.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field
from fractions import Fraction
from math import inf
from typing import Any, TypeVar

T = TypeVar("T")

MAX_BYTES = 2**60  # 1 EiB: no medium is larger, so a larger number is a mistake

# "GiB" and "GB", and as Kubernetes writes them "Gi" and "G".
_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtp", start=1):
    _UNITS |= dict.fromkeys((f"{_letter}b", _letter), 1000**_power)
    _UNITS |= dict.fromkeys((f"{_letter}ib", f"{_letter}i"), 1024**_power)
_SIZE = re.compile(r"([0-9]{1,24}(?:\.[0-9]{1,24})?) ?([A-Za-z]*)")

_LEAST_BEGINNING = 3  # characters that name a key


class ConfigError(ValueError):
    """A configuration is wrong: the message names the key, the value and the remedy."""


class TierConfigError(ConfigError):
    """The options of a tier are wrong."""


class WrongValue(TierConfigError):
    """The value of `key` is wrong; `remedy` says what to give instead."""

    def __init__(self, key: str, value: object, remedy: str) -> None:
        super().__init__(f"{key}: {value!r} is wrong; give {remedy}")


class UnknownKeyError(TierConfigError):
    """A key that `where` does not know; `instead` says what to use, if that is known."""

    def __init__(self, where: str, key: object, known: Collection[str], instead: str = "") -> None:
        self.where, self.key, self.known, self.instead = where, str(key), known, instead
        names = ", ".join(sorted(known)) or "none"
        text = f"{nearest(self.key, known)}; known keys: {names}"
        super().__init__(f"{where}: unknown key {key!r}{f': {instead}' if instead else text}")


@dataclass(frozen=True, slots=True)
class Option:
    """A key of a configuration."""

    # Makes of key and value what the field holds, or raises a `TierConfigError`
    parse: Callable[[str, Any], Any]
    help: str  # what it is, in Markdown; of a required one it begins with what to give
    default: str  # what holds without the key, in Markdown: as one would write it, or in words
    required: bool
    idle: bool  # it is taken, and does nothing; `help` says why
    other_names: str  # by which people look for it, between blanks


def option(
    parse: Callable[[str, Any], Any],
    help: str,
    default: Any = MISSING,
    *,
    key: str = "",
    shown: str = "",
    idle: bool = False,
    other_names: str = "",
) -> Any:
    """A dataclass field that is an option. An `InitVar` is checked, and not kept.

    Args:
        parse, help, idle, other_names: see `Option`.
        default: what the field holds without the key; left out, the key is required.
        key: where it is not the field's name.
        shown: the default in words, where it is not what one would write.
    """
    required = default is MISSING
    if not shown and required:
        shown = "required"
    elif not shown:
        shown = f"`{json.dumps(default, default=str)}`" if default is not None else "none"
    made = Option(parse, help, shown, required, idle, other_names)
    return field(default=default, kw_only=not required, metadata={"option": made, "key": key})


def same_option(cls: type, name: str) -> Any:
    """A dataclass field that is the same option as the field `name` of `cls`."""
    like = cls.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return field(default=like.default, kw_only=like.kw_only, metadata=like.metadata)


def options_of(cls: type) -> dict[str, Option]:
    """The options that a dataclass declares, by key."""
    return {key: made for key, _, made in _declared(cls)}


def parse_options(cls: type[T], given: Mapping[str, Any], where: str) -> T:
    """The dataclass of what is `given`, whose options it declares.

    Args:
        cls: a dataclass with an `option` for each field.
        given: keys and values, as the user wrote them.
        where: what has these options, for errors: "fs tier".

    Raises:
        TierConfigError: naming the key, the value and the remedy.
    """
    return cls(**read_options(cls, given, where))


def read_options(cls: type, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What is given, checked, by the name of the field; see `parse_options`."""
    known = options_of(cls)
    for key in given:
        if key not in known:
            raise UnknownKeyError(where, key, known, use_instead(str(key), known))
    values: dict[str, Any] = {}
    for key, name, made in _declared(cls):
        if made.required and given.get(key) is None:
            raise TierConfigError(f"{key} is missing: give {plain(made.help.partition(';')[0])}")
        if key in given:
            values[name] = made.parse(key, given[key])
    return values


def use_instead(key: str, known: Mapping[str, Option]) -> str:
    """`use x` or `use x and y`: the options people call `key`, however written; "" for none."""
    word = _letters(key)
    found = [k for k, made in known.items() if word in map(_letters, made.other_names.split())]
    return f"use {' and '.join(found)}" if found else ""


def plain(markdown: str) -> str:
    """The text of a `help` without links and code marks."""
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", markdown).replace("`", "")


def nearest(word: object, known: Collection[str]) -> str:
    """` (did you mean 'x'?)` with the known word that looks most like `word`, or nothing.

    Case does not count, and the beginning of a word will do.
    """
    if not isinstance(word, str):
        return ""
    by_lower = {each.lower(): each for each in sorted(known)}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.7)
    if not close and len(word) >= _LEAST_BEGINNING:
        close = [each for each in by_lower if each.startswith(word.lower())]
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def format_bytes(nbytes: int) -> str:
    """`1.5 GiB`: at most four figures and a unit."""
    size, units = float(nbytes), iter(("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))
    unit = next(units)
    while size >= 1023.95 and (larger := next(units, None)):
        size, unit = size / 1024, larger
    return f"{nbytes} B" if unit == "B" else f"{size:.1f} {unit}"


# -- what an option's value may be: each takes the key and the value, and raises TierConfigError --


def parse_any(key: str, value: Any) -> Any:
    """Whatever it is: somebody else checks it."""
    return value


def or_none(parse: Callable[[str, Any], T]) -> Callable[[str, Any], T | None]:
    """A parser that takes None as well, as if the key were left out."""
    return lambda key, value: None if value is None else parse(key, value)


def parse_text(key: str, value: object) -> str:
    """A string that is not empty."""
    if not isinstance(value, str) or not value:
        raise WrongValue(key, value, "a string")
    return value


def parse_bytes(key: str, value: object, *, zero: bool = False) -> int:
    """A size in bytes from a number or from a string such as "8GiB", "500MB" or "1.5TiB".

    Units are K, M, G, T and P, alone or with B (powers of 1000), and Ki, Mi, Gi, Ti and Pi, alone
    or with B (powers of 1024), in any case; a string without a unit counts bytes. A fraction of a
    byte is dropped: vLLM's `--kv-offloading-size` makes one of a fraction of a GiB.

    Raises:
        TierConfigError: not a size, larger than `MAX_BYTES`, or not positive (nor 0, with `zero`).
    """
    remedy = 'give a positive number of bytes or a string such as "8GiB"'
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            units = "KB, MB, GB, TB, PB, KiB, MiB, GiB, TiB, PiB, or without the B"
            raise TierConfigError(f"{key}: {value!r} is not a size; {remedy} (units: {units})")
        exact = Fraction(match[1]) * unit
    elif isinstance(value, int | float) and not isinstance(value, bool) and -inf < value < inf:
        exact = Fraction(value)
    else:
        raise TierConfigError(f"{key}: {value!r} is not a size; {remedy}")
    if exact < 1 and not (zero and exact == 0):
        raise TierConfigError(f"{key}: {value!r} is not positive; {remedy}")
    if exact >= MAX_BYTES + 1:
        raise TierConfigError(f"{key}: {value!r} is more than {format_bytes(MAX_BYTES)}; {remedy}")
    return int(exact)


def parse_count(key: str, value: object, most: int, least: int = 1) -> int:
    """A whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        remedy = f"a whole number from {least} to {most:,}"
        raise WrongValue(key, value, remedy + _unquoted(value))
    return value


def parse_number(
    key: str, value: object, most: float, *, least: float = 0.0, zero: bool = False
) -> float:
    """A number above 0, or from 0 on with `zero`, at least `least`, and at most `most`."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not least <= value <= most  # NaN is not either
        or (value == 0 and not zero)
    ):
        bounds = f"from 0 to {most:g}" if zero else f"above 0 and at most {most:g}"
        if least:
            bounds = f"of at least {least:g} and at most {most:g}"
        raise WrongValue(key, value, f"a number {bounds}{_unquoted(value)}")
    return float(value)


def parse_flag(key: str, value: object) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise WrongValue(key, value, f"true or false{_unquoted(value)}")
    return value


def parse_choice(key: str, value: object, choices: Collection[str]) -> str:
    """One of the words in `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise WrongValue(key, value, f"one of {', '.join(choices)}{nearest(value, choices)}")
    return value


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


def _declared(cls: type) -> list[tuple[str, str, Option]]:
    """Key, field and option of each field that is one."""
    # `dataclasses.fields` leaves `InitVar`s out
    fields = getattr(cls, "__dataclass_fields__", {}).values()
    return [
        (each.metadata["key"] or each.name, each.name, each.metadata["option"])
        for each in fields
        if "option" in each.metadata
    ]


def _letters(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _unquoted(value: object) -> str:
    """What to say of a number, or true or false, that was written as a string."""
    written = isinstance(value, str) and re.fullmatch(r"true|false|-?[0-9]+(\.[0-9]+)?", value)
    return ", without quotes" if written else ""
