"""The example of a third-party tier keeps the contract, and stores what a file holds."""

import importlib
import sqlite3
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvstrata.tiers.base import Lookup, SecondaryTier, TierConfigError, TierContext
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.page.identity import namespace_digest
from kvstrata.tiers.registry import ENTRY_POINT_GROUP, tier_class
from kvstrata.tiers.testing import (
    CONTEXT,
    MakeTier,
    TierContract,
    load,
    make_data,
    make_key,
    settle,
    store,
)
from tests.tiers.fs.test_contract import written_by_the_book

EXAMPLE = Path(__file__).parents[2] / "docs/examples/sqlite_tier"
KEY = make_key(1, group=1)
PAGE = {KEY: make_data(1, CONTEXT.layouts[1].nbytes)}
DIGEST = namespace_digest(CONTEXT.namespace)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the package were installed, also for I/O processes."""
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLE), prepend=":")


@pytest.fixture
def open_tier(tmp_path: Path) -> Iterator[Callable[[TierContext], SecondaryTier]]:
    made: list[SecondaryTier] = []

    def make(context: TierContext = CONTEXT) -> SecondaryTier:
        chosen = tier_class({"type": "SqliteTier", "module_path": "kvstrata_sqlite"})
        context = replace(context, region=CONTEXT.region)
        made.append(chosen({"path": str(tmp_path / "pages.db")}, context))
        return made[-1]

    yield make
    for tier in made:
        assert tier.shutdown(60.0)


class Database:
    """The database, reached without the tier."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def put(self, tier: SecondaryTier, context: TierContext, key: bytes, data: bytes) -> None:
        whole = written_by_the_book(context, DIGEST, key, data)
        self.execute("INSERT INTO pages VALUES (?, ?)", DIGEST.encode() + key, whole)

    def get(self, tier: SecondaryTier, context: TierContext, key: bytes) -> bytes | None:
        rows = self.execute("SELECT whole FROM pages WHERE name = ?", DIGEST.encode() + key)
        return rows[0][0][-context.layouts[key[-1]].nbytes :] if rows else None

    def execute(self, sql: str, *values: bytes) -> list[Any]:
        database = sqlite3.connect(self.path)
        with database:
            rows = database.execute(sql, values).fetchall()
        database.close()
        return rows


@pytest.fixture
def medium(tmp_path: Path) -> Database:
    return Database(tmp_path / "pages.db")


class TestSqliteTier(TierContract):
    @pytest.fixture
    def make_tier(self, open_tier: MakeTier) -> MakeTier:
        return open_tier

    @pytest.fixture
    def medium(self, medium: Database) -> Database:
        return medium


def test_its_package_names_it() -> None:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    entry = project["project"]["entry-points"][ENTRY_POINT_GROUP]["sqlite"]
    module, _, name = entry.partition(":")
    assert module in project["tool"]["setuptools"]["py-modules"]
    assert issubclass(getattr(importlib.import_module(module), name), SecondaryTier)


def test_it_is_short() -> None:
    assert len((EXAMPLE / "kvstrata_sqlite.py").read_text().splitlines()) < 80


def test_a_page_can_be_copied_into_a_directory(
    open_tier: Callable[[], SecondaryTier], medium: Database, tmp_path: Path
) -> None:
    """And back: on every medium it is the same bytes."""
    options = {"root_dir": str(tmp_path / "kv"), "min_free_bytes": 0}
    files = FsTier(options, CONTEXT)
    ours = open_tier()
    store(ours, PAGE)
    ((whole,),) = medium.execute("SELECT whole FROM pages")
    path = Path(files.paths[0].page(KEY))
    path.parent.mkdir(parents=True)
    path.write_bytes(whole)
    assert load(files, [KEY])[1] == PAGE
    path.unlink()
    assert not store(files, PAGE).failed and path.read_bytes() == whole
    assert files.shutdown(60.0)


@pytest.mark.parametrize("end", [-1, 0, 5000])
def test_a_bad_page_is_not_served_until_it_is_stored_again(
    open_tier: Callable[[], SecondaryTier], medium: Database, end: int
) -> None:
    tier = open_tier()
    store(tier, PAGE)
    ((whole,),) = medium.execute("SELECT whole FROM pages")
    medium.execute("UPDATE pages SET whole = ?", whole[:end])
    assert load(tier, [KEY])[0].failed == {KEY: "truncated"}
    assert settle(tier, KEY) is Lookup.MISS
    assert not store(tier, PAGE).failed
    assert load(tier, [KEY])[1] == PAGE


@pytest.mark.parametrize("path", [None, "", 3, "/proc/pages.db"])
def test_a_path_that_cannot_be_used_is_named(path: object) -> None:
    chosen = tier_class({"type": "SqliteTier", "module_path": "kvstrata_sqlite"})
    with pytest.raises(TierConfigError, match="path"):
        chosen({"path": path}, CONTEXT)
