"""Media for the tests, as I/O processes import them: pages as plain files in one folder."""

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from kvstrata.tiers.base import PageKey, TierContext
from kvstrata.tiers.page.form import BadPage
from kvstrata.tiers.page.page import PageForm
from kvstrata.tiers.process.medium import Host, Medium, Outcome, PageRef


class Folder(Medium):
    """What is asked of every medium, and no more."""

    def __init__(self, folder: str, context: TierContext, host: Host, reader: bool) -> None:
        self.folder = Path(folder)
        self.form = PageForm(context)
        self.host = host
        self.reader = reader

    def exists(self, keys: Sequence[PageKey]) -> list[bool]:
        return [self.path(key).exists() for key in keys]

    def store(self, page: PageRef, view: memoryview, access: int) -> Outcome:
        if self.path(page.key).exists() and not page.rewrite:
            return Outcome()
        new = self.folder / secrets.token_hex()
        new.write_bytes(self.form.header(page.key, view) + view)
        os.rename(new, self.path(page.key))
        return Outcome(moved=True)

    def load(self, page: PageRef, view: memoryview, access: int) -> Outcome:
        try:
            whole = self.path(page.key).read_bytes()
        except FileNotFoundError:
            return Outcome("missing", gone=True)
        self.form.read(page.key, whole, view)
        return Outcome(moved=True)

    def path(self, key: PageKey) -> Path:
        return self.folder / key.hex()


class Bulk(Folder):
    """Is asked for many pages at once."""

    def store_many(
        self, pages: Sequence[PageRef], views: Sequence[memoryview], access: int
    ) -> list[Outcome]:
        return [Folder.store(self, p, v, access) for p, v in zip(pages, views, strict=True)]

    def load_many(
        self, pages: Sequence[PageRef], views: Sequence[memoryview], access: int
    ) -> list[Outcome]:
        return [Folder.load(self, p, v, access) for p, v in zip(pages, views, strict=True)]

    def store(self, page: PageRef, view: memoryview, access: int) -> Outcome:
        raise AssertionError("pages are stored together")

    def load(self, page: PageRef, view: memoryview, access: int) -> Outcome:
        raise AssertionError("pages are loaded together")


class Talker(Folder):
    """Tells of whatever it hears, and tidies up of its own accord."""

    def used(self, keys: Sequence[PageKey], access: int) -> None:
        self.host.say(f"used {len(keys)}, {'reader' if self.reader else 'writer'}")
        self.host.trust(False)
        self.host.tell([(keys[0], False), (b"no key", True), (b"", True), (b"?" * 2**20, True)])

    def promised(self, keys: Sequence[PageKey], access: int) -> None:
        raise RuntimeError("promises are not kept here")


class Teller(Folder):
    """Tells of all that is there, once; the folder's `unsure` says that this is not all."""

    def __init__(self, folder: str, context: TierContext, host: Host, reader: bool) -> None:
        super().__init__(folder, context, host, reader)
        if not reader:
            names = [name for name in os.listdir(folder) if name != "unsure"]
            host.tell([(bytes.fromhex(name), True) for name in names])
            host.complete("unsure" not in os.listdir(folder))


class Wild(Folder):
    """Fails as the first byte of the key's hash's last one says."""

    def load(self, page: PageRef, view: memoryview, access: int) -> Outcome:
        fault = page.key[7]
        if fault == 1:
            raise ConnectionResetError("the wire was cut")
        if fault == 2:
            raise ZeroDivisionError("a mistake")
        if fault == 3:
            raise BadPage("checksum", "bits have rotted")
        if fault == 4:
            return Outcome("\ud800 no \u00e4 short word " * 100, detail="\ud800" * 5000)
        return super().load(page, view, access)


class Careless(Folder):
    """Returns what is no outcome, or one with wrong fields, as the key's hash's last byte says."""

    def load(self, page: PageRef, view: memoryview, access: int) -> Outcome:
        wrong: dict[int, object] = {
            1: None,
            2: True,
            3: Outcome(cause=ValueError("no word")),  # type: ignore[arg-type]
            4: Outcome("short", detail=ValueError("no text")),  # type: ignore[arg-type]
            5: Outcome(moved=object()),  # type: ignore[arg-type]
        }
        if page.key[7] in wrong:
            return wrong[page.key[7]]  # type: ignore[return-value]
        return super().load(page, view, access)


class Miscounting(Folder):
    """Answers for too few."""

    def load_many(
        self, pages: Sequence[PageRef], views: Sequence[memoryview], access: int
    ) -> list[Outcome]:
        return [Outcome(moved=True)] * (len(pages) - 1)

    def exists(self, keys: Sequence[PageKey]) -> list[bool]:
        raise TimeoutError("nobody answers")


class Stillborn(Folder):
    """Cannot be opened."""

    def __init__(self, folder: str, context: TierContext, host: Host, reader: bool) -> None:
        raise OSError("there is nothing")
