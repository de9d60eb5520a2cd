"""Every file that is not the page it should be is a miss with its cause, and is moved away."""

import json
import os
import shutil
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstrata.tiers.base import Lookup, PageLayout, RequestView, TensorSpec, TierContext
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.quarantine import MAX_FILES, Quarantine, identity
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.page.form import BadPage, encode_header, page_checksum, parse_header
from kvstrata.tiers.testing import CONTEXT, load, make_data, make_key, settle, store
from tests.conftest import FillRoot

SIZE = CONTEXT.layouts[0].nbytes
HEADER = 4096
KEYS = [make_key(n) for n in range(3)]
DATA = {key: make_data(n, SIZE) for n, key in enumerate(KEYS)}
BAD = KEYS[1]  # its neighbours in the job must arrive

OpenTier = Callable[..., FsTier]
Spoil = Callable[[Path], None]
AnotherUser = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def bad_file(fill_root: FillRoot, root: Path, paths: NamespacePaths) -> Path:
    """The file of BAD, sound so far; all three pages are stored."""
    fill_root(root, DATA)
    return Path(paths.page(BAD))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FsTier]:
    """One tier that meets every kind of bad file."""
    tier = FsTier({"root_dir": str(tmp_path_factory.mktemp("server"))}, CONTEXT)
    yield tier
    assert tier.shutdown(60.0)


def rewrite(change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(path: Path) -> None:
        # at once: a tier that looks meanwhile must not see a part of it
        changed = path.with_suffix(".changed")
        changed.write_bytes(change(path.read_bytes()))
        changed.rename(path)

    return spoil


def header_length(length: int) -> Spoil:
    return rewrite(lambda raw: struct.pack("<Q", length % 2**64) + raw[8:])


def header_fields(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def apply(raw: bytes) -> bytes:
        fields = json.loads(raw[8:HEADER])
        change(fields)
        text = json.dumps(fields, separators=(",", ":")).encode()
        return raw[:8] + text.ljust(HEADER - 8) + raw[HEADER:]

    return rewrite(apply)


def metadata(**changed: str) -> Spoil:
    return header_fields(lambda fields: fields["__metadata__"].update(changed))


def header_text(text: bytes) -> Spoil:
    return rewrite(lambda raw: raw[:8] + text.ljust(HEADER - 8)[: HEADER - 8] + raw[HEADER:])


def replace_by(make: Callable[[Path], object]) -> Spoil:
    def apply(path: Path) -> None:
        path.unlink()
        make(path)

    return apply


def elsewhere(path: Path) -> None:
    """The sound file itself, but at the other end of a symbolic link."""
    target = path.parent / "elsewhere"
    path.rename(target)
    path.symlink_to(target)


def another_key(path: Path) -> None:
    neighbour = KEYS[0][:-4].hex()
    shutil.copy(
        path.parents[2] / neighbour[:3] / f"{neighbour[3:5]}_g0" / f"{neighbour}.safetensors", path
    )


def smaller_page(path: Path) -> None:
    """A sound file of the same key, of a model with half the heads."""
    layout = PageLayout((TensorSpec("kv", "F16", (2, 3, 16, 7)),), 16)
    digest = path.parents[2].name.removesuffix("_r0")[-12:]
    data = bytes(layout.nbytes)
    path.write_bytes(encode_header(BAD, digest, layout, page_checksum(data)) + data)


def bind_socket(path: Path) -> None:
    """The path is too long for a socket's address, so bind relative to its directory."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("s")
        os.rename("s", path.name)
    finally:
        os.chdir(here)


def move_data(fields: dict[str, Any]) -> None:
    fields["kv"]["data_offsets"] = [1, SIZE + 1]


SPOILT: dict[str, tuple[Spoil, str]] = {
    "empty": (rewrite(lambda raw: b""), "truncated"),
    "cut in the length": (rewrite(lambda raw: raw[:7]), "truncated"),
    "cut in the header": (rewrite(lambda raw: raw[:1000]), "truncated"),
    "cut after the header": (rewrite(lambda raw: raw[:HEADER]), "truncated"),
    "one byte short": (rewrite(lambda raw: raw[:-1]), "truncated"),
    "one byte long": (rewrite(lambda raw: raw + b"\0"), "size"),
    "flipped bit in the data": (rewrite(lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])), "checksum"),
    "zeros instead of data": (rewrite(lambda raw: raw[:HEADER] + bytes(SIZE)), "checksum"),
    "zeros throughout": (rewrite(lambda raw: bytes(len(raw))), "header"),
    "header length 0": (header_length(0), "header"),
    "header length -1": (header_length(-1), "header"),
    "header length huge": (header_length(2**62), "header"),
    "header length 99 MB": (header_length(99_999_992), "header"),
    "header length a block more": (header_length(2 * HEADER - 8), "header"),
    "header no JSON": (header_text(b"{"), "header"),
    "header not UTF-8": (header_text(b"\xff\xfe\xfd"), "header"),
    "header a list": (header_text(b"[]"), "header"),
    "header nested deep": (header_text(b"[" * HEADER), "header"),
    "header a huge number": (header_text(b'{"__metadata__":' + b"9" * HEADER), "header"),
    "header without metadata": (header_fields(lambda f: f.pop("__metadata__")), "header"),
    "metadata a number": (header_fields(lambda f: f.update(__metadata__=1)), "header"),
    "more metadata": (metadata(x="y"), "header"),
    "tab for a space": (rewrite(lambda raw: raw[: HEADER - 1] + b"\t" + raw[HEADER:]), "header"),
    "NUL padding": (rewrite(lambda raw: raw[: HEADER - 1] + b"\0" + raw[HEADER:]), "header"),
    "another dtype": (header_fields(lambda f: f["kv"].update(dtype="BF16")), "shape"),
    "another shape": (header_fields(lambda f: f["kv"].update(shape=[3, 4, 16, 7])), "shape"),
    "another size": (smaller_page, "shape"),
    "negative shape": (header_fields(lambda f: f["kv"].update(shape=[-4, -3, 16, 7])), "header"),
    "shape of bools": (header_fields(lambda f: f["kv"].update(shape=[True] * 4)), "header"),
    "unknown dtype": (header_fields(lambda f: f["kv"].update(dtype="F4")), "header"),
    "other offsets": (header_fields(move_data), "header"),
    "other tensor name": (header_fields(lambda f: f.update(k=f.pop("kv"))), "shape"),
    "other tokens": (metadata(tokens="8"), "shape"),
    "other version": (metadata(format_version="2"), "version"),
    "other group": (metadata(group="1"), "header"),
    "other namespace": (metadata(namespace="0" * 12), "namespace"),
    "other checksum": (metadata(checksum="xxh3_128:" + "0" * 32), "checksum"),
    "checksum unnamed": (metadata(checksum="0" * 41), "checksum"),
    "another key's file": (another_key, "key"),
    "symlink elsewhere": (elsewhere, "symlink"),
    "dangling symlink": (replace_by(lambda path: path.symlink_to("nowhere")), "symlink"),
    "symlink to a device": (replace_by(lambda path: path.symlink_to("/dev/zero")), "symlink"),
    "FIFO": (replace_by(os.mkfifo), "not-regular"),
    "directory": (replace_by(Path.mkdir), "not-regular"),
    "socket": (replace_by(bind_socket), "not-regular"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "cause"), SPOILT.values(), ids=SPOILT.keys())
def test_load_of_a_bad_file(server: FsTier, spoil: Spoil, cause: str) -> None:
    paths = server.paths[0]
    assert not store(server, DATA).failed
    shutil.rmtree(paths.quarantine, ignore_errors=True)
    before = Counter(server.stats().failures)
    bad_file = Path(paths.page(BAD))
    spoil(bad_file)
    result, arrived = load(server, KEYS)
    assert result.failed == {BAD: cause}
    assert arrived == {key: DATA[key] for key in KEYS if key != BAD}
    assert Counter(server.stats().failures) - before == {cause: 1}
    assert not os.path.lexists(bad_file)
    (name,) = os.listdir(paths.quarantine)
    assert name.endswith(f"-{cause}-{bad_file.name}")
    # it is never believed again, and a new store makes it whole
    request = RequestView(cause)
    assert settle(server, BAD, request) is Lookup.MISS
    assert load(server, [BAD])[0].failed == {BAD: "missing"}
    assert not store(server, {BAD: DATA[BAD]}).failed
    assert load(server, KEYS)[1] == DATA


@pytest.mark.parametrize("what", ["one byte short", "one byte long", "FIFO", "directory", "empty"])
def test_lookup_and_store_see_an_implausible_file(
    open_tier: OpenTier, paths: NamespacePaths, bad_file: Path, what: str
) -> None:
    SPOILT[what][0](bad_file)
    shutil.rmtree(Path(paths.root) / ".kvstrata")  # the books still know it as a page
    tier = open_tier()
    assert settle(tier, BAD) is Lookup.MISS
    assert sum(tier.stats().failures.values()) == 1
    assert len(os.listdir(paths.quarantine)) == 1
    SPOILT[what][0](Path(paths.page(KEYS[2])))
    assert not store(tier, {KEYS[2]: DATA[KEYS[2]]}).failed
    assert load(tier, [KEYS[2]])[1] == {KEYS[2]: DATA[KEYS[2]]}


def test_a_known_page_that_went_bad_leaves_the_index(open_tier: OpenTier, bad_file: Path) -> None:
    tier = open_tier()
    assert settle(tier, BAD) is Lookup.HIT
    assert (BAD, True) in tier.take_changes(99)
    SPOILT["flipped bit in the data"][0](bad_file)
    assert load(tier, [BAD])[0].failed == {BAD: "checksum"}
    assert (BAD, False) in tier.take_changes(99)
    assert settle(tier, BAD) is Lookup.MISS


def test_a_file_of_another_namespace(open_tier: OpenTier, paths: NamespacePaths) -> None:
    other = TierContext(CONTEXT.model, {"another": 1}, CONTEXT.layouts)
    theirs = open_tier(other)
    store(theirs, DATA)
    ours = open_tier()
    store(ours, {KEYS[0]: DATA[KEYS[0]]})
    shutil.copy(theirs.paths[0].page(KEYS[0]), paths.page(KEYS[0]))
    assert load(ours, [KEYS[0]])[0].failed == {KEYS[0]: "namespace"}


def open_up(path: Path, root: Path) -> None:
    """Let another user in, down to `path`."""
    for directory in (path.parent, *path.parent.parents):
        if directory.stat().st_uid == os.geteuid() and directory != Path("/"):
            directory.chmod(0o777 if root in (directory, *directory.parents) else 0o755)


def test_an_unreadable_file(
    open_tier: OpenTier,
    paths: NamespacePaths,
    root: Path,
    bad_file: Path,
    another_user: AnotherUser,
) -> None:
    open_up(bad_file, root)
    Path(paths.quarantine).mkdir(mode=0o777)
    Path(paths.quarantine).chmod(0o777)
    for key in KEYS:
        os.chmod(paths.page(key), 0o644)
    bad_file.chmod(0o000)
    tier = open_tier()
    with another_user():
        result, arrived = load(tier, KEYS)
    assert result.failed == {BAD: "unreadable"} and len(arrived) == 2
    assert not bad_file.exists()


def test_a_bad_file_that_cannot_be_moved_is_not_believed(
    open_tier: OpenTier, root: Path, bad_file: Path, another_user: AnotherUser
) -> None:
    SPOILT["flipped bit in the data"][0](bad_file)
    open_up(bad_file, root)
    bad_file.chmod(0o644)
    bad_file.parent.chmod(0o755)
    if os.geteuid() != 0:
        bad_file.parent.chmod(0o555)
    tier = open_tier()
    assert settle(tier, BAD) is Lookup.HIT
    with another_user():
        assert load(tier, [BAD])[0].failed == {BAD: "checksum"}
        assert settle(tier, BAD) is Lookup.MISS
    assert bad_file.exists()
    bad_file.parent.chmod(0o755)
    # a store replaces it although a file of the right size is there
    assert not store(tier, {BAD: DATA[BAD]}).failed
    assert settle(tier, BAD) is Lookup.HIT
    assert load(tier, [BAD])[1] == {BAD: DATA[BAD]}


def test_the_quarantine_is_bounded(open_tier: OpenTier, paths: NamespacePaths) -> None:
    tier = open_tier()
    keys = [make_key(n) for n in range(MAX_FILES + 20)]
    store(tier, {key: DATA[BAD] for key in keys})
    for index, key in enumerate(keys):
        SPOILT["directory" if index % 10 == 0 else "one byte short"][0](Path(paths.page(key)))
    assert len(load(tier, keys)[0].failed) == len(keys)
    assert len(os.listdir(paths.quarantine)) == MAX_FILES


def test_the_quarantine_leaves_a_file_that_came_later(
    bad_file: Path, paths: NamespacePaths
) -> None:
    quarantine = Quarantine(paths, 0o700)
    found = identity(bad_file.stat())
    os.replace(paths.page(KEYS[0]), bad_file)  # another process repaired it meanwhile
    assert quarantine.take(str(bad_file), "checksum", found) == "gone" and bad_file.exists()
    found = identity(bad_file.stat())
    bad_file.write_bytes(bad_file.read_bytes())  # or recycled the very same file
    assert quarantine.take(str(bad_file), "checksum", found) == "gone" and bad_file.exists()
    assert quarantine.take(str(bad_file), "checksum", None) == "moved" and not bad_file.exists()
    assert quarantine.take(str(bad_file), "checksum", None) == "gone"


def test_each_cause_is_logged_once(
    open_tier: OpenTier, paths: NamespacePaths, caplog: pytest.LogCaptureFixture
) -> None:
    tier = open_tier()
    store(tier, DATA)
    for key in KEYS:
        SPOILT["flipped bit in the data"][0](Path(paths.page(key)))
    load(tier, KEYS)
    assert tier.stats().failures == {"checksum": 3}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.records[0].name == "kvstrata.tiers.fs"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(position=st.integers(0, HEADER + SIZE - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(
    open_tier: OpenTier, paths: NamespacePaths, shared: list[FsTier], position: int, bit: int
) -> None:
    if not shared:
        shared.append(open_tier())
    tier = shared[0]
    assert not store(tier, {BAD: DATA[BAD]}).failed
    path = Path(paths.page(BAD))
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1 << bit
    path.write_bytes(raw)
    assert BAD in load(tier, [BAD])[0].failed
    assert not path.exists()


@pytest.fixture
def shared() -> list[FsTier]:
    """One tier for all examples."""
    return []


@given(st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
def test_parse_header_raises_nothing_else(text: bytes) -> None:
    with pytest.raises(BadPage):
        parse_header(bytes(8) + text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(
    field=st.sampled_from(["__metadata__", "kv", "dtype", "shape", "data_offsets", "key", "group"]),
    value=json_values,
)
def test_parse_header_with_any_json_inside(field: str, value: object) -> None:
    raw = encode_header(BAD, "0" * 12, CONTEXT.layouts[0], page_checksum(b""))
    fields = json.loads(raw[8:])
    for place in (fields, fields["kv"], fields["__metadata__"]):
        if field in place:
            place[field] = value
    try:
        parsed = parse_header(bytes(8) + json.dumps(fields).encode())
    except BadPage:
        return
    assert parsed.layout.nbytes >= 0
