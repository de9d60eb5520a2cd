"""A bucket and a directory are interchangeable: what is copied from one works in the other."""

from pathlib import Path
from typing import Any

from obstore.store import LocalStore, S3Store

from kvstrata.tiers.base import Lookup
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.testing import CONTEXT, load, make_data, make_key, settle, store
from tests.tiers.object.conftest import OpenTier

PAGES = {make_key(n, group=1): make_data(n, CONTEXT.layouts[1].nbytes) for n in range(5)}


def copy(source: S3Store | LocalStore, target: S3Store | LocalStore) -> list[str]:
    """Copy every object that belongs to a namespace; their names."""
    names = [each["path"] for batch in source.list() for each in batch]
    names = [name for name in names if name.startswith("org_model_")]
    for name in names:
        target.put(name, bytes(source.get(name).bytes()))
    return sorted(names)


def open_files(root: Path) -> FsTier:
    return FsTier({"root_dir": str(root), "min_free_bytes": 0}, CONTEXT)


def test_what_a_bucket_holds_is_a_root(
    open_tier: OpenTier, s3_options: dict[str, Any], objects: S3Store, root: Path
) -> None:
    store(open_tier(**s3_options), PAGES)
    root.mkdir()
    assert len(copy(objects, LocalStore(root))) == len(PAGES) + 1, "the pages and config.json"
    files = open_files(root)
    assert all(settle(files, key) is Lookup.HIT for key in PAGES)
    assert load(files, list(PAGES))[1] == PAGES
    assert files.shutdown(60.0)


def test_what_a_root_holds_is_a_bucket(
    open_tier: OpenTier, s3_options: dict[str, Any], objects: S3Store, root: Path
) -> None:
    files = open_files(root)
    store(files, PAGES)
    assert files.shutdown(60.0)
    copy(LocalStore(root), objects)
    tier = open_tier(**s3_options)
    assert all(settle(tier, key) is Lookup.HIT for key in PAGES)
    assert load(tier, list(PAGES))[1] == PAGES


def test_a_page_is_the_same_bytes_under_the_same_name(
    open_tier: OpenTier, s3_options: dict[str, Any], objects: S3Store, root: Path
) -> None:
    files, tier = open_files(root), open_tier(**s3_options)
    for each in (files, tier):
        assert not store(each, PAGES).failed
    assert files.shutdown(60.0)
    names = [path for path in root.rglob("*") if path.suffix in (".safetensors", ".json")]
    assert len(names) == len(PAGES) + 1
    for path in names:
        there = objects.get(path.relative_to(root).as_posix()).bytes()
        assert bytes(there) == path.read_bytes()
