"""The options of the filesystem tier."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

from kvstrata.tiers.base import TierConfigError
from kvstrata.tiers.fs.budget.limits import BLOCK, parse_space
from kvstrata.tiers.options import (
    option,
    parse_bytes,
    parse_choice,
    parse_count,
    parse_mode,
    read_options,
)

# "s3://bucket" and "nfs:/export"; "C:\kv" and "\\host\kv"
_ELSEWHERE = re.compile(r"[^/\\]+:/")
_WINDOWS = re.compile(r"[A-Za-z]:(?!//)|[^/]*\\")
_VARIABLE = re.compile(r"\$\{?[A-Za-z_]|\$\(|\{\{")  # of a shell, Kubernetes or a template
_NO_SHARE = re.compile(r"\s*0+(\.0+)? ?%\s*")
_MOST_DIR_MODE = 0o2777  # with the setgid bit


def _max_bytes(key: str, value: object) -> int | Fraction:
    if value is None:
        raise TierConfigError(f"{key} is null: leave it out for no limit")
    size = parse_space(key, value)
    if isinstance(size, int) and size < BLOCK:
        raise TierConfigError(
            f"{key}: {value!r} is less than the smallest file takes; give bytes, or a unit "
            'with them, for example "100GiB", or a share such as "50%"'
        )
    return size


def _min_free_bytes(key: str, value: object) -> int | Fraction:
    if value is None:
        raise TierConfigError(f"{key} is null: leave it out for the default, or give 0 for none")
    try:
        if isinstance(value, str) and value.strip().endswith("%"):
            return 0 if _NO_SHARE.fullmatch(value) else parse_space(key, value)
        return parse_bytes(key, value, zero=True)
    except TierConfigError as error:
        raise TierConfigError(f"{error}; or 0 for none") from None


def _root_dirs(key: str, value: object) -> list[str]:
    given = value if isinstance(value, list) and value else [value]
    roots = [_root_dir(key, each) for each in given]
    for root in roots:
        inside = [each for each in roots if f"{root}/".startswith(f"{each.rstrip('/')}/")]
        if len(inside) > 1:
            raise TierConfigError(
                f"{key}: {root!r} is given twice, or lies in another directory of the list; "
                "give one directory for each disk"
            )
    return roots


def _root_dir(key: str, value: object) -> str:
    def wrong(why: str) -> TierConfigError:
        return TierConfigError(f"{key}: {value!r} {why}")

    if not isinstance(value, str) or not value or "\0" in value:
        raise wrong('is wrong; give the directory for the files, for example "/mnt/kv"')
    if value != value.strip():
        raise wrong("begins or ends with white space; give the path without it")
    if _WINDOWS.match(value):
        raise wrong('is a path of Windows; give one of this machine, for example "/mnt/kv"')
    if _ELSEWHERE.match(value):
        raise wrong(
            "is a URL, or names another host; the fs tier keeps files in a directory: give the "
            "path at which it is mounted"
        )
    if _VARIABLE.search(value):
        raise wrong(
            "has a variable in it, which nobody puts in here; give the path in full (only ~ is "
            "understood)"
        )
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise wrong("names a user who is unknown here; give an absolute path")
    if not os.path.isabs(path):  # engine processes need not share a working directory
        raise wrong("is relative; give an absolute path")
    path = os.path.normpath(path)
    if path.strip("/") == "":
        raise wrong(
            "is the root of the whole file system; give a directory for the files alone, for "
            'example "/mnt/kv"'
        )
    return path


@dataclass(frozen=True, slots=True)
class FsConfig:
    """Options of the filesystem tier for one root directory, checked.

    A limit is 0 for none, and may be a share of the file system, as a fraction; `min_free_bytes`
    is None for the default (see `default_floor`).
    """

    root_dir: str = option(
        _root_dirs,
        'the directory for the files, absolute, for example "/mnt/kv"; several servers may share '
        "it; or a list, one for each disk: pages are spread over them by hash, and a lost disk "
        "loses its pages only",
        other_names="path dir directory folder root cache_dir local_path",
    )
    n_read_threads: int = option(
        partial(parse_count, most=1024),
        "threads of the I/O process that reads; it helps the one that writes",
        16,
        other_names="threads n_threads num_threads io_threads workers",
    )
    n_write_threads: int = option(
        partial(parse_count, most=1024),
        "threads of the I/O process that writes; it helps the one that reads",
        16,
        other_names="threads n_threads num_threads io_threads workers",
    )
    io: str = option(
        partial(parse_choice, choices=("auto", "buffered", "direct")),
        "`auto`: from the page cache what is there, else O_DIRECT; `direct`: always O_DIRECT; "
        "`buffered`: never, so that pages fill the page cache too; see [fs.md](fs.md)",
        "auto",
        other_names="o_direct direct use_odirect",
    )
    durability: str = option(
        partial(parse_choice, choices=("fsync", "none")),
        "`none`: atomic rename, and the kernel writes when it likes; `fsync`: file and directory "
        "reach the disk before a page counts as stored",
        "none",
        other_names="sync fsync",
    )
    max_bytes: int | Fraction = option(
        _max_bytes,
        'the disk budget: most bytes below `root_dir`, or a share of the disk such as `"50%"`; the '
        "least recently used pages go first ([budget.md](budget.md))",
        0,
        shown="none",
        other_names="disk_capacity_bytes max_size max_disk_gib size capacity quota",
    )
    max_files: int = option(
        partial(parse_count, most=2**40),
        "the disk budget: most files below `root_dir`",
        0,
        shown="none",
    )
    min_free_bytes: int | Fraction | None = option(
        _min_free_bytes,
        'bytes, or a share such as `"10%"`, that stay free on the file system; 0: none '
        "([budget.md](budget.md))",
        None,
        shown="5 % or 1 GiB, whichever is more; at most a tenth",
        other_names="reserved_bytes min_free free_bytes",
    )
    file_mode: int = option(
        partial(parse_mode, needed=0o600),
        "permissions of the files that are created",
        0o600,
        shown='`"0600"`',
        other_names="mode permissions",
    )
    dir_mode: int = option(
        partial(parse_mode, needed=0o700, most=_MOST_DIR_MODE),
        "permissions of the directories that are created, which also keep an inherited setgid bit",
        0o700,
        shown='`"0700"`',
        other_names="mode permissions",
    )

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
        values = read_options(cls, options, "fs tier")
        roots = values.pop("root_dir")
        return tuple(cls(root_dir=root, **values) for root in roots)
