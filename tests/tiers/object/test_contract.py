"""The object tier keeps the contract: over a directory, in which its objects are files, and S3."""

from pathlib import Path
from typing import Any

import pytest
from obstore.store import S3Store

from kvstrata.tiers.base import Lookup, SecondaryTier, TierContext
from kvstrata.tiers.object.tier import ObjectTier
from kvstrata.tiers.page.identity import namespace_digest
from kvstrata.tiers.testing import (
    CONTEXT,
    REQUEST,
    MakeTier,
    TierContract,
    make_data,
    make_key,
    store,
)
from tests.tiers.fs.test_contract import FileMedium, written_by_the_book
from tests.tiers.object.conftest import OpenTier
from tests.waiting import wait_until


class TestOverADirectory(TierContract):
    @pytest.fixture
    def make_tier(self, open_tier: OpenTier, directory: Path) -> MakeTier:
        return lambda context: open_tier(context)

    @pytest.fixture
    def medium(self, directory: Path) -> FileMedium:
        return FileMedium(directory)


class Objects:
    """The bucket, reached without the tier; the names are those that docs/format.md gives files."""

    def __init__(self, store: S3Store) -> None:
        self.store = store

    def put(self, tier: SecondaryTier, context: TierContext, key: bytes, data: bytes) -> None:
        digest = namespace_digest(context.namespace)
        self.store.put(self.name(context, key), written_by_the_book(context, digest, key, data))

    def get(self, tier: SecondaryTier, context: TierContext, key: bytes) -> bytes | None:
        try:
            whole = bytes(self.store.get(self.name(context, key)).bytes())
        except FileNotFoundError:
            return None
        return whole[-context.layouts[key[-1]].nbytes :]

    def name(self, context: TierContext, key: bytes) -> str:
        page, group = key[:-4].hex(), key[-1]
        home = f"org_model_{namespace_digest(context.namespace)}_r0"
        return f"{home}/{page[:3]}/{page[3:5]}_g{group}/{page}.safetensors"


class TestOverS3(TierContract):
    @pytest.fixture
    def make_tier(self, open_tier: OpenTier, s3_options: dict[str, Any]) -> MakeTier:
        return lambda context: open_tier(context, **s3_options)

    @pytest.fixture
    def medium(self, objects: S3Store) -> Objects:
        return Objects(objects)


def test_what_is_there_at_the_start_is_known_without_a_question(
    open_tier: OpenTier, directory: Path
) -> None:
    """A long prefix would else be as many requests, and late."""
    first = open_tier()
    pages = {make_key(n, group=2): make_data(n, CONTEXT.layouts[2].nbytes) for n in range(2500)}
    assert not store(first, pages).failed
    files = [Path(first.opened.paths.page(key)) for key in pages]
    (directory / files[0]).write_bytes(b"too short")
    (directory / files[1]).rename((directory / files[1]).with_name("of nobody.safetensors"))
    tier = open_tier()
    wait_until(lambda: _indexed(tier) >= len(pages) - 2)
    assert _indexed(tier) == len(pages) - 2
    assert {tier.lookup(key, REQUEST) for key in list(pages)[2:]} == {Lookup.HIT}


def _indexed(tier: ObjectTier) -> float:
    tier.on_step_end()
    tier.get_finished()
    return tier.stats().gauges["pages"]
