"""A tier of one's own: pages in a SQLite database."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvstrata.tiers.base import PageKey, TierConfigError, TierContext
from kvstrata.tiers.options import option, parse_options, parse_text
from kvstrata.tiers.page.page import PageForm
from kvstrata.tiers.process.medium import Host, Medium, MediumSpec, Outcome, PageRef
from kvstrata.tiers.process.tier import ProcessTier

TABLE = "CREATE TABLE IF NOT EXISTS pages (name BLOB PRIMARY KEY, whole BLOB) WITHOUT ROWID"


def connect(path: str) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=30, isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute(TABLE)
    return database


class SqliteMedium(Medium):
    """Lives in an I/O process; its methods may block, and several threads call them."""

    def __init__(self, path: str, context: TierContext, host: Host, reader: bool) -> None:
        self._form = PageForm(context)  # the bytes of pages, the same on every medium
        self._path, self._of_thread = path, threading.local()

    def exists(self, keys: Sequence[PageKey]) -> list[bool]:
        return [self._one("SELECT 1 FROM pages WHERE name = ?", key) is not None for key in keys]

    def store(self, page: PageRef, view: memoryview, access: int) -> Outcome:
        whole = self._form.header(page.key, view) + view
        sql = f"INSERT OR {'REPLACE' if page.rewrite else 'IGNORE'} INTO pages VALUES (?, ?)"
        return Outcome(moved=self._one(f"{sql} RETURNING 1", page.key, whole) is not None)

    def load(self, page: PageRef, view: memoryview, access: int) -> Outcome:
        found = self._one("SELECT whole FROM pages WHERE name = ?", page.key)
        if found is None:
            return Outcome("missing", gone=True)
        self._form.read(page.key, found[0], view)  # verified; BadPage if it is not the page
        return Outcome(moved=True)

    def reject(self, page: PageRef, computed: memoryview, distrust: bool) -> Outcome:
        self._one("DELETE FROM pages WHERE name = ? RETURNING 1", page.key)
        return Outcome(gone=True)

    def _one(self, sql: str, key: PageKey, *values: bytes) -> tuple[Any, ...] | None:
        if not hasattr(self._of_thread, "database"):
            self._of_thread.database = connect(self._path)
        name = self._form.namespace.encode() + key
        return next(iter(self._of_thread.database.execute(sql, (name, *values)).fetchall()), None)


@dataclass(frozen=True)
class SqliteOptions:
    path: str = option(parse_text, "the database's file, an absolute path")


class SqliteTier(ProcessTier):
    """Lives in the engine: has the options, and says how the medium is made."""

    medium, name, rejects, Options = "STORAGE", "sqlite", True, SqliteOptions

    def __init__(self, options: Mapping[str, Any], context: TierContext) -> None:
        path = parse_options(SqliteOptions, options, "sqlite tier").path
        try:
            connect(path).close()
        except sqlite3.Error as error:
            raise TierConfigError(
                f"path: {path!r} cannot be used ({error}); give another"
            ) from None
        spec = MediumSpec("kvstrata_sqlite:SqliteMedium", path)
        super().__init__(context, [spec], n_read_threads=4, n_write_threads=2)
