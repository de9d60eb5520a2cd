"""The options of the filesystem tier."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from kvstrata.tiers.base import TierConfigError
from kvstrata.tiers.fs.budget.limits import BLOCK, parse_space
from kvstrata.tiers.options import (
    check_tier_keys,
    parse_choice,
    parse_count,
    parse_mode,
)

_KEYS = (
    "root_dir",
    "n_read_threads",
    "n_write_threads",
    "file_mode",
    "dir_mode",
    "durability",
    "io",
    "max_bytes",
    "max_files",
    "min_free_bytes",
)
_MAX_THREADS = 1024
_MAX_FILES = 2**40
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_VARIABLE = re.compile(r"\$\{?[A-Za-z_]|\$\(|\{\{")  # of a shell, Kubernetes or a template
_MOST_DIR_MODE = 0o2777  # with the setgid bit


@dataclass(frozen=True, slots=True)
class FsConfig:
    """Options of the filesystem tier for one root directory, checked.

    Attributes:
        root_dir: absolute path, `~` expanded; one of those in the option's list.
        n_read_threads, n_write_threads: size of the two thread groups.
        file_mode, dir_mode: permission bits of what the tier creates. A directory also keeps
            the setgid bit that it inherits.
        durability: "fsync" makes a page survive a crash of the machine once it counts as
            stored; "none" leaves that to the kernel.
        io: "direct" demands O_DIRECT, "buffered" avoids it, "auto" uses it where it works.
        max_bytes, max_files: most that everything below `root_dir` may take, 0 for no limit.
        min_free_bytes: bytes that stay free on the file system; 0 for no limit, None for the
            default (see `default_floor`). This and `max_bytes` may be a share of the file
            system, as a fraction.
    """

    root_dir: str
    n_read_threads: int = 16
    n_write_threads: int = 16
    file_mode: int = 0o600
    dir_mode: int = 0o700
    durability: str = "none"
    io: str = "auto"
    max_bytes: int | Fraction = 0
    max_files: int = 0
    min_free_bytes: int | Fraction | None = None

    @property
    def limited(self) -> bool:
        """Whether a limit was asked for."""
        return bool(self.max_bytes or self.max_files or self.min_free_bytes)

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> tuple[FsConfig, ...]:
        """Check the options without touching the file system; one for each root directory.

        Raises:
            TierConfigError: naming the key, the value and the remedy.
        """
        check_tier_keys("fs tier", options, _KEYS)
        get = options.get
        roots = _root_dirs(get("root_dir"))
        first = cls(
            root_dir=roots[0],
            n_read_threads=parse_count("n_read_threads", get("n_read_threads", 16), _MAX_THREADS),
            n_write_threads=parse_count(
                "n_write_threads", get("n_write_threads", 16), _MAX_THREADS
            ),
            file_mode=parse_mode("file_mode", get("file_mode", 0o600), 0o600),
            dir_mode=parse_mode("dir_mode", get("dir_mode", 0o700), 0o700, _MOST_DIR_MODE),
            durability=parse_choice("durability", get("durability", "none"), ("none", "fsync")),
            io=parse_choice("io", get("io", "auto"), ("auto", "direct", "buffered")),
            max_bytes=_max_bytes(options["max_bytes"]) if "max_bytes" in options else 0,
            max_files=parse_count("max_files", options["max_files"], _MAX_FILES)
            if "max_files" in options
            else 0,
            min_free_bytes=_min_free(options["min_free_bytes"])
            if "min_free_bytes" in options
            else None,
        )
        return tuple(replace(first, root_dir=root) for root in roots)


def _max_bytes(value: object) -> int | Fraction:
    if value is None:
        raise TierConfigError("max_bytes is null: leave it out for no limit")
    size = parse_space("max_bytes", value)
    if isinstance(size, int) and size < BLOCK:
        raise TierConfigError(
            f"max_bytes: {value!r} is less than the smallest file takes; give bytes, or a unit "
            'with them, for example "100GiB", or a share such as "50%"'
        )
    return size


def _min_free(value: object) -> int | Fraction:
    if not isinstance(value, bool) and value in (0, "0"):
        return 0
    if value is None:
        raise TierConfigError(
            "min_free_bytes is null: leave it out for the default, or give 0 for none"
        )
    try:
        return parse_space("min_free_bytes", value)
    except TierConfigError as error:
        raise TierConfigError(f"{error}; or 0 for none") from None


def _root_dirs(value: object) -> list[str]:
    roots = [_root_dir(each) for each in (value if isinstance(value, list) and value else [value])]
    for root in roots:
        inside = [each for each in roots if f"{root}/".startswith(f"{each.rstrip('/')}/")]
        if len(inside) > 1:
            raise TierConfigError(
                f"root_dir: {root!r} is given twice, or lies in another directory of the list; "
                "give one directory for each disk"
            )
    return roots


def _root_dir(value: object) -> str:
    remedy = 'give the directory for the files, for example "/mnt/kv"'
    if value is None:
        raise TierConfigError(f"root_dir is missing; {remedy}")
    if not isinstance(value, str) or not value or "\0" in value:
        raise TierConfigError(f"root_dir: {value!r} is wrong; {remedy}")
    if value != value.strip():
        raise TierConfigError(
            f"root_dir: {value!r} begins or ends with white space; give the path without it"
        )
    if _URL.match(value):
        raise TierConfigError(
            f"root_dir: {value!r} is a URL; the fs tier keeps files in a directory: give the path "
            "at which it is mounted"
        )
    if _VARIABLE.search(value):
        raise TierConfigError(
            f"root_dir: {value!r} has a variable in it, which nobody puts in here; give the path "
            "in full (only ~ is understood)"
        )
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise TierConfigError(
            f"root_dir: {value!r} names a user who is unknown here; give an absolute path"
        )
    if not os.path.isabs(path):
        # engine processes need not share a working directory
        raise TierConfigError(f"root_dir: {value!r} is relative; give an absolute path")
    path = os.path.normpath(path)
    if path.strip("/") == "":
        raise TierConfigError(
            f"root_dir: {value!r} is the root of the whole file system; give a directory for the "
            'files alone, for example "/mnt/kv"'
        )
    return path
