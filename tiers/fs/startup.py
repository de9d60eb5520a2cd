"""Opening a namespace: what cannot work is said at start, with the remedy."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from kvstrata.tiers.base import EPOCH, TierConfigError, TierContext, unseen_reason
from kvstrata.tiers.fs.budget.ledger import Ledger, LedgerBusy
from kvstrata.tiers.fs.budget.limits import Limits, default_floor, file_cost
from kvstrata.tiers.fs.config import FsConfig
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.direct_io import probe_direct
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.namespace import make_namespace, namespace_paths, validate_config
from kvstrata.tiers.fs.files.trust import is_trusted
from kvstrata.tiers.fs.ground import Ground
from kvstrata.tiers.fs.refusals import is_whole_system, refusal
from kvstrata.tiers.machine.disk import disk_at
from kvstrata.tiers.options import format_bytes
from kvstrata.tiers.page.form import ALIGNMENT

# The disk may be well again later, or be made so by eviction.
NOT_NOW = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

logger = logging.getLogger("kvstrata.tiers.fs")


@dataclass(frozen=True, slots=True)
class Opened:
    """A root directory that can be used: what the I/O processes must know of it.

    Attributes:
        config: the tier's options.
        paths: where the namespace lies.
        direct: whether O_DIRECT is to be used.
        limits: of the disk budget; None if no books are kept.
        ground: where the root stands.
        trusted: whether the namespace is to be believed.
    """

    config: FsConfig
    paths: NamespacePaths
    direct: bool
    limits: Limits | None
    ground: Ground
    trusted: bool


def open_root(config: FsConfig, context: TierContext) -> Opened:
    """Make and try all that a namespace needs below one root.

    Raises:
        TierConfigError: the options are wrong, or the directory cannot be used.
    """
    config = make_root(config)
    paths = namespace_paths(config.root_dir, context.model, context.namespace)
    check_budget(config, context)
    direct = open_namespace(config, paths, context.namespace)
    limits = open_books(config)
    if limits is not None:
        say_limits(config, limits)
    return Opened(
        config, paths, direct, limits, Ground.of(config.root_dir), trusted=check_trust(paths)
    )


def make_root(config: FsConfig) -> FsConfig:
    """Create the root where it is missing; the options with its path, free of links.

    Raises:
        TierConfigError: naming what is wrong with `root_dir`.
    """
    root = config.root_dir
    try:
        if is_whole_system(root):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), root)
        try:
            os.makedirs(root, config.dir_mode)
            inherited = os.stat(root).st_mode & stat.S_ISGID
            os.chmod(root, config.dir_mode | inherited)  # what the umask took away
        except FileExistsError:  # perhaps another engine that starts was faster
            if not os.path.isdir(root):
                raise
    except OSError as error:
        raise _start_error(root, error) from error
    return replace(config, root_dir=os.path.realpath(root))


def open_namespace(config: FsConfig, paths: NamespacePaths, fields: Mapping[str, Any]) -> bool:
    """Create what is missing below the root, prove that one can write, and compare config.json.

    On a disk that is full or read-only the tier starts all the same: it loads, and eviction may
    make room.

    Returns:
        Whether O_DIRECT is to be used.

    Raises:
        TierConfigError: naming what is wrong with `root_dir`, the field of config.json that
            differs, or that `io` cannot be had.
    """
    try:
        make_namespace(paths, fields, config.file_mode, config.dir_mode)
        direct = probe_direct(paths.home)
    except OSError as error:
        if error.errno not in NOT_NOW:
            raise _start_error(config.root_dir, error) from error
        logger.warning("kvstrata fs tier: %s; nothing can be stored", error)
        direct = True  # `FileIO` finds out
    if nofollow.lexists(paths.config):
        try:
            validate_config(paths, fields)
        except PermissionError as error:
            raise _start_error(config.root_dir, error) from error
    if config.io == "direct" and not direct:
        raise TierConfigError(
            f"io: 'direct' is wrong for {config.root_dir!r}, whose file system has no "
            "O_DIRECT; give 'auto' or 'buffered'"
        )
    return direct and config.io != "buffered"


def open_books(config: FsConfig) -> Limits | None:
    """Prove that books can be kept below `root_dir`, which exists; the limits in bytes.

    None where that cannot be, for want of locks say, and no limit was asked for: the tier works
    without them.

    Raises:
        TierConfigError: the books cannot be used, or the limits need locks.
    """
    try:
        limits = limits_of(config)
    except OSError as error:
        raise _start_error(config.root_dir, error) from error
    try:
        ledger = Ledger(config.root_dir, config.file_mode, config.dir_mode)
        with closing(ledger), ledger.locked():
            return limits
    except OSError as error:
        if isinstance(error, LedgerBusy) or error.errno in NOT_NOW:
            return limits  # nothing is stored until the books can be used
        if error.errno in (errno.EACCES, errno.EPERM):  # the budget of others is ours too
            raise _start_error(config.root_dir, error) from error
        if config.limited:
            raise TierConfigError(
                f"root_dir: {config.root_dir!r} cannot keep a disk budget ({error}); "
                "choose a file system with locks, or leave the budget's options out"
            ) from error
        logger.warning(
            "kvstrata fs tier: %r can have no books (%s); nothing there is evicted, and the "
            "files are unknown after a restart until they are asked for",
            config.root_dir,
            error,
        )
        return None


def check_budget(config: FsConfig, context: TierContext) -> None:
    """Refuse a budget in which not even one page has room, and none where files only pile up.

    Raises:
        TierConfigError: naming the least that makes sense.
    """
    if EPOCH in context.namespace and not config.limited:
        raise TierConfigError(
            "fs tier: where weights may change, each reset of the cache leaves files that nobody "
            'reads again, so they need a limit: give max_bytes, for example "50%", max_files or '
            "min_free_bytes (or weights_fixed: true, if the weights never change)"
        )
    reasons = [unseen_reason(value) for value in context.namespace.values()]
    if any(reasons) and not config.limited:
        raise TierConfigError(
            "fs tier: kvstrata cannot see which weights this engine has "
            f"({'; '.join(filter(None, reasons))}), so nobody reads its files after it ends, and "
            'they need a limit: give max_bytes, for example "50%", max_files or min_free_bytes '
            "(or load the weights from files on this host)"
        )
    layouts = context.layouts
    pages = [file_cost(layout.nbytes + ALIGNMENT) for layout in layouts.values()]
    least = 2 * max(pages, default=0)
    if isinstance(config.max_bytes, int) and 0 < config.max_bytes < least:
        raise TierConfigError(
            f"max_bytes: {format_bytes(config.max_bytes)} is too little for the pages of this "
            f"model, which take up to {format_bytes(least // 2)} each; give at least "
            f"{format_bytes(least)}, and better a hundred times that"
        )


def check_trust(paths: NamespacePaths) -> bool:
    """Whether the namespace is to be believed; says what to do where it is not."""
    try:
        trusted = is_trusted(paths)
    except OSError as error:  # the I/O processes look again
        logger.warning("kvstrata fs tier: %s; until it can be read nothing is loaded", error)
        return False
    if not trusted:
        logger.error(
            "kvstrata fs tier: audits found pages in %s that are not what the model computes "
            "(see %s): nothing is loaded from there or stored there until you run "
            "`kvstrata trust %s %s`",
            paths.pages,
            paths.quarantine,
            paths.root,
            paths.name,
        )
    return trusted


def limits_of(config: FsConfig) -> Limits:
    """The limits in bytes of the file system of `root_dir`, which exists.

    Raises:
        OSError: the file system cannot be asked.
        TierConfigError: a share of a file system that has no size.
    """
    disk = disk_at(config.root_dir)

    def in_bytes(key: str, size: int | Fraction) -> int:
        if not isinstance(size, Fraction):
            return size
        if not disk.bounded:
            raise TierConfigError(
                f"{key}: the file system of {config.root_dir!r} reports no size, so no share of "
                "it can be taken; give bytes"
            )
        return int(disk.total * size)

    least = config.min_free_bytes
    return Limits(
        in_bytes("max_bytes", config.max_bytes),
        config.max_files,
        default_floor(disk.total) if least is None else in_bytes("min_free_bytes", least),
    )


def say_limits(config: FsConfig, limits: Limits) -> None:
    """Say how much of the disk is used where no limit was given, and if there is no room at all.

    Raises:
        OSError: the file system cannot be asked.
    """
    disk = disk_at(config.root_dir)
    least = format_bytes(limits.min_free_bytes)
    if not config.limited:
        rest = f"all but {least} (min_free_bytes)" if limits.min_free_bytes else "all"
        of = f"the {format_bytes(disk.total)}" if disk.bounded else "the space"
        logger.info(
            "kvstrata fs tier: no limit is set for %r: pages may take %s of %s there; to keep "
            'them smaller give max_bytes, for example "100GiB" or "50%%"',
            config.root_dir,
            rest,
            of,
        )
    if disk.free < limits.min_free_bytes:
        logger.warning(
            "kvstrata fs tier: %s are free on the disk of %r and %s are to stay free: as long as "
            "that is so nothing is stored, and what is there is evicted; free some space or give "
            "a smaller min_free_bytes",
            format_bytes(disk.free),
            config.root_dir,
            least,
        )


def _start_error(root: str, error: OSError) -> TierConfigError:
    return TierConfigError(f"root_dir: {root!r} {refusal(root, error)}")
