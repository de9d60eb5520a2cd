"""Where the probe of a tier lies: apart from all pages of models, and removed whatever happens.

A directory, a prefix of a bucket or a pool of its own, with the name of a temporary: what a probe
that was killed left, the next one there removes. Values of a server go by themselves.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from kvstrata.offload.cli.copy.opening import open_place
from kvstrata.offload.cli.copy.place import Place, PlaceError
from kvstrata.tiers.base import TierConfigError, TierContext
from kvstrata.tiers.fs.files.temporary import is_abandoned, is_temporary, temporary_name
from kvstrata.tiers.page.identity import directory_name, namespace_digest
from kvstrata.tiers.registry import tier_options

# Those of the probe's pages, which are of group 0.
PROBE_KEYS = [hashlib.sha256(bytes([number])).digest() + bytes(4) for number in range(17)]
_POOL_BYTES = 2**27  # of the probe's pool
_TTL_S = 120  # of the probe's values, whatever the tier's: they must outlast the probe


@dataclass(frozen=True, slots=True)
class Ground:
    """What a tier is opened with for the probe.

    Attributes:
        options: the tier's, for a place of the probe's own.
        places: which list what is there; none for a tier that they do not know.
        removed: whether the place is removed; else the tier is asked to reject the pages.
    """

    options: Mapping[str, Any]
    places: Sequence[Place] = ()
    removed: bool = True


def namespace_of(context: TierContext) -> str:
    """What its namespace is called."""
    return directory_name(context.model, namespace_digest(context.namespace))


@contextmanager
def ground_of(entry: Mapping[str, Any], context: TierContext) -> Iterator[Ground]:
    """That of an entry whose options are right; at the end nothing of it is left.

    `context` is the probe's: no engine has its namespace.

    Raises:
        TierConfigError, PlaceError, OSError: it cannot be had, or not be removed.
    """
    kind, options = entry["type"], tier_options(entry)
    kinds = {"fs": _files, "pool": _pool, "object": _objects, "valkey": _values}
    if "module_path" in entry or kind not in kinds:
        yield Ground(options, removed=False)
        return
    with kinds[kind](options, context) as ground:
        yield ground


@contextmanager
def _files(options: dict[str, Any], context: TierContext) -> Iterator[Ground]:
    """Directories in those that are given, or where these would be made."""
    from kvstrata.tiers.fs.config import FsConfig
    from kvstrata.tiers.fs.refusals import refusal
    from kvstrata.tiers.fs.startup import check_budget

    # these bound what is in the whole root
    asked = {key: options[key] for key in options.keys() - {"max_bytes", "max_files"}}
    made: list[str] = []
    try:
        for config in FsConfig.parse(options):
            check_budget(config, context)
            where = os.path.realpath(config.root_dir)
            while not os.path.lexists(where):
                where = os.path.dirname(where)
            try:
                _sweep_directory(where)
                made.append(os.path.join(where, temporary_name()))
                os.mkdir(made[-1], 0o700)
            except OSError as error:
                why = refusal(config.root_dir, error)
                raise TierConfigError(f"root_dir: {config.root_dir!r} {why}") from None
        entries = [{"type": "fs", **asked, "root_dir": path} for path in made]
        places = [open_place("tier", json.dumps(entry)) for entry in entries]
        yield Ground({**asked, "root_dir": made}, places)
    finally:
        for path in made:
            with suppress(FileNotFoundError):
                shutil.rmtree(path)


def _sweep_directory(where: str) -> None:
    for name in filter(is_temporary, os.listdir(where)):
        path = os.path.join(where, name)
        with suppress(OSError):
            if os.path.isdir(path) and is_abandoned(name, time.time() - os.lstat(path).st_mtime):
                shutil.rmtree(path)


@contextmanager
def _pool(options: dict[str, Any], context: TierContext) -> Iterator[Ground]:
    """A pool beside the one that is given."""
    from kvstrata.offload.cli.doctor.pool import check_pool
    from kvstrata.tiers.fs.startup import check_budget
    from kvstrata.tiers.pool.place import make_pool, pool_names, pool_path
    from kvstrata.tiers.pool.tools import PoolKept, remove_pool

    for name in pool_names():
        with suppress(OSError, PoolKept):
            if is_abandoned(f".{name}.tmp", time.time() - os.lstat(pool_path(name)).st_mtime):
                remove_pool(name)
    name = temporary_name().removeprefix(".").removesuffix(".tmp")
    try:
        check_budget(check_pool(options, 0).files, context)
        place = open_place("tier", make_pool(name))
        yield Ground({**options, "name": name, "max_bytes": _POOL_BYTES}, [place])
    finally:
        try:
            remove_pool(name)
        except FileNotFoundError:
            pass
        except PoolKept as kept:
            raise PlaceError(str(kept)) from None


@contextmanager
def _objects(options: dict[str, Any], context: TierContext) -> Iterator[Ground]:
    """A prefix below the one that is given."""
    from kvstrata.offload.cli.copy.bucket import BucketPlace

    around = open_place("tier", json.dumps({"type": "object", **options}))
    assert isinstance(around, BucketPlace)
    for folder in filter(is_temporary, around.folders()):
        written = max((written for _, written in around.objects(folder)), default=0.0)
        if is_abandoned(folder, time.time() - written):
            around.remove(folder)
    name = temporary_name()
    below = {**options, "url": f"{around.shown}/{name}"}
    try:
        yield Ground(below, [open_place("tier", json.dumps({"type": "object", **below}))])
    finally:
        around.remove(name)


@contextmanager
def _values(options: dict[str, Any], context: TierContext) -> Iterator[Ground]:
    """Values that end by themselves, should nobody remove them."""
    from kvstrata.offload.cli.copy.server import ServerPlace

    below = {**options, "ttl_s": _TTL_S}
    place = open_place("tier", json.dumps({"type": "valkey", **below}))
    assert isinstance(place, ServerPlace)
    try:
        yield Ground(below, [place])
    finally:
        place.remove(namespace_of(context), PROBE_KEYS)
