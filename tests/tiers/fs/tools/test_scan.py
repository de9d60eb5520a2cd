"""What the command line sees of a root."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvstrata.tiers.base import TierContext
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.temporary import temporary_name
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.fs.tools.listing import list_namespaces
from kvstrata.tiers.fs.tools.scan import FileReport, check_root, inspect_file
from kvstrata.tiers.testing import CONTEXT, load, make_data, make_key, store
from tests.conftest import FillRoot
from tests.spoiling import flip

KEYS = [make_key(n) for n in range(3)]
SIZE = CONTEXT.layouts[0].nbytes


@pytest.fixture
def filled(fill_root: FillRoot, root: Path, paths: NamespacePaths) -> NamespacePaths:
    """Three pages of group 0 and one of group 1."""
    pages = {key: make_data(n, SIZE) for n, key in enumerate(KEYS)}
    fill_root(root, {**pages, make_key(9, 1): make_data(9, CONTEXT.layouts[1].nbytes)})
    return paths


def test_inspect(filled: NamespacePaths) -> None:
    report = inspect_file(filled.page(make_key(9, 1)))
    assert report.cause is None and report.header is not None
    assert report.header.key == make_key(9, 1)
    assert report.header.namespace == filled.name[-12:]
    assert report.header.layout.tensors == CONTEXT.layouts[1].tensors
    assert report.header.layout.tokens == 16
    assert report.size == os.path.getsize(report.path)


@pytest.mark.parametrize(
    ("position", "cause"),
    [(-1, "checksum"), (4096, "checksum"), (8, "header"), (2, "truncated"), (40, "checksum")],
)
def test_inspect_a_flipped_bit(filled: NamespacePaths, position: int, cause: str) -> None:
    path = filled.page(KEYS[0])
    flip(path, position)
    assert inspect_file(path).cause == cause


def test_inspect_a_header_in_another_form(filled: NamespacePaths) -> None:
    path = Path(filled.page(KEYS[0]))
    raw = path.read_bytes()
    path.write_bytes(raw[:4095] + b"\t" + raw[4096:])
    assert inspect_file(str(path)).cause == "header"


def test_inspect_other_things(tmp_path: Path, filled: NamespacePaths) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("no page at all")
    (tmp_path / "link").symlink_to(filled.page(KEYS[0]))
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "long").write_bytes(Path(filled.page(KEYS[0])).read_bytes() + b"\0")
    (tmp_path / "short").write_bytes(Path(filled.page(KEYS[0])).read_bytes()[:4095])
    names = ["absent", "empty", "text", "link", "fifo", "long", "short", "."]
    causes = [inspect_file(str(tmp_path / name)).cause for name in names]
    assert causes == [
        *["missing", "truncated", "header", "symlink"],
        *["not-regular", "size", "truncated", "not-regular"],
    ]


def test_list(filled: NamespacePaths, root: Path, open_tier: Callable[..., FsTier]) -> None:
    open_tier(TierContext("other", {"x": 1}, CONTEXT.layouts))
    (root / "unrelated").mkdir()
    (root / "a file").touch()
    Path(filled.pages, "000", temporary_name()).touch()
    ours, theirs = list_namespaces(str(root))
    assert (ours.model, ours.digest) == ("org_model", filled.name[-12:])
    assert (ours.path, ours.fields) == (filled.home, CONTEXT.namespace)
    assert (ours.files, ours.temporary, ours.quarantined) == (4, 1, 0)
    assert ours.bytes == sum(p.stat().st_size for p in root.rglob("*.safetensors"))
    assert (theirs.model, theirs.files, theirs.bytes) == ("other", 0, 0)


def test_check_a_sound_root(filled: NamespacePaths, root: Path) -> None:
    seen: list[FileReport] = []
    report = check_root(str(root), seen.append)
    assert (report.files, report.bad, report.temporary, report.quarantined) == (4, [], 0, 0)
    assert report.bytes == sum(p.stat().st_size for p in root.rglob("*.safetensors"))
    assert [r.cause for r in seen] == [None] * 4
    assert check_root(f"{root}/").bad == []


def test_check_finds_one_flipped_byte(filled: NamespacePaths, root: Path) -> None:
    flip(filled.page(KEYS[1]), 5000)
    (bad,) = check_root(str(root)).bad
    assert (bad.path, bad.cause) == (filled.page(KEYS[1]), "checksum")


def test_check_finds_files_in_the_wrong_place(filled: NamespacePaths, root: Path) -> None:
    os.replace(filled.page(KEYS[0]), filled.page(KEYS[1]))
    other_group = Path(filled.page(KEYS[2][:-1] + b"\1"))
    other_group.parent.mkdir(exist_ok=True)
    os.rename(filled.page(KEYS[2]), other_group)
    assert [bad.cause for bad in check_root(str(root)).bad] == ["key", "key"]


def test_check_finds_a_file_of_another_namespace(
    filled: NamespacePaths, root: Path, open_tier: Callable[..., FsTier]
) -> None:
    other = open_tier(TierContext("org/model", {"x": 1}, CONTEXT.layouts))
    store(other, {KEYS[0]: make_data(5, SIZE)})
    os.replace(other.paths[0].page(KEYS[0]), filled.page(KEYS[0]))
    assert [bad.cause for bad in check_root(str(root)).bad] == ["namespace"]


def test_check_counts_temporaries_and_the_quarantine(
    filled: NamespacePaths, root: Path, open_tier: Callable[..., FsTier]
) -> None:
    flip(filled.page(KEYS[1]), 5000)
    load(open_tier(), KEYS)
    Path(filled.home, temporary_name()).touch()
    report = check_root(str(root))
    assert (report.files, report.bad, report.temporary, report.quarantined) == (3, [], 1, 1)


@pytest.mark.parametrize(
    ("text", "cause"), [(None, "missing"), ("{", "config"), ('{"test": 2}', "config")]
)
def test_check_finds_a_bad_config(
    filled: NamespacePaths, root: Path, text: str | None, cause: str
) -> None:
    os.unlink(filled.config)
    if text is not None:
        Path(filled.config).write_text(text)
    (bad,) = check_root(str(root)).bad
    assert (bad.path, bad.cause) == (filled.config, cause)
    assert check_root(str(root)).files == 4


@pytest.mark.parametrize("stored_again", [True, False])
def test_a_page_that_is_recycled_while_it_is_read_is_not_bad(
    filled: NamespacePaths, root: Path, monkeypatch: pytest.MonkeyPatch, stored_again: bool
) -> None:
    """The keeper renames a victim, and a store overwrites it: also in the hands of a reader."""
    page = Path(filled.page(KEYS[0]))
    raw = page.read_bytes()

    def recycled(path: str) -> FileReport:
        if path != str(page) or recycled.done:
            return inspect_file(path)
        recycled.done = True
        page.rename(root / "spare")
        flip(root / "spare", -1)
        report = replace(inspect_file(str(root / "spare")), path=path)
        if stored_again:
            page.write_bytes(raw)
        return report

    recycled.done = False
    monkeypatch.setattr("kvstrata.tiers.fs.tools.scan.inspect_file", recycled)
    report = check_root(str(root))
    assert recycled.done and (report.bad, report.files) == ([], 3 + stored_again)


def test_check_survives_special_files(filled: NamespacePaths, root: Path) -> None:
    place = Path(filled.page(KEYS[0])).parent
    os.mkfifo(place / "fifo.safetensors")
    (place / "dir.safetensors").mkdir()
    (place / "loop.safetensors").symlink_to("loop.safetensors")
    (place / "up").symlink_to(root)
    causes = sorted(bad.cause or "" for bad in check_root(str(root)).bad)
    assert causes == ["not-regular", "not-regular", "symlink"]


@pytest.mark.parametrize("function", [check_root, list_namespaces])
def test_no_root(function: Callable[[str], object], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError):
        function(str(tmp_path / "absent"))
    with pytest.raises(NotADirectoryError):
        function(str(tmp_path / "file"))
    assert list_namespaces(str(tmp_path)) == []
