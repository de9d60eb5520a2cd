"""`kvstrata inspect`: what a file is, whoever made it."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from typer.testing import CliRunner

from kvstrata.offload.cli.main import app
from kvstrata.tiers.base import TierContext
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.temporary import temporary_name
from kvstrata.tiers.page.identity import namespace_digest
from kvstrata.tiers.testing import CONTEXT
from tests.offload.cli.cli_world import HEADER, KEYS, SIZE, fill, run, run_json
from tests.spoiling import flip

NOTHING = {
    "ok": True,
    "reason": None,
    "directory": None,
    "format_version": None,
    "key": None,
    "group": None,
    "tokens": None,
    "namespace": None,
    "data_offset": None,
    "checksum": None,
    "tensors": [],
    "config": None,
    "fields": None,
}
TENSORS = [{"name": "kv", "dtype": "F16", "shape": [4, 3, 16, 7], "bytes": SIZE}]


def sound(path: Path, home: str | None = None, **changed: Any) -> dict[str, Any]:
    """What `inspect --json` prints for KEYS[0] in the namespace whose directory is `home`."""
    expected = {
        **NOTHING,
        "path": str(path),
        "kind": "page",
        "bytes": HEADER + SIZE,
        "directory": home,
        "format_version": "1",
        "config": home and f"{home}/config.json",
        "fields": home and CONTEXT.namespace,
        "key": KEYS[0].hex(),
        "group": 0,
        "tokens": 16,
        "namespace": namespace_digest(CONTEXT.namespace),
        "data_offset": HEADER,
        "checksum": "good",
        "tensors": TENSORS,
    }
    return {**expected, **changed}


def test_inspect_a_page(paths: NamespacePaths, page: Path) -> None:
    assert run_json("inspect", page) == sound(page, paths.home)
    assert run("inspect", page).splitlines() == [
        f"file         {page}",
        "what         page",
        f"bytes        {HEADER + SIZE} (6.6 KiB)",
        "version      1",
        f"key          {KEYS[0].hex()}",
        "group        0",
        "tokens       16",
        f"namespace    {paths.name[-12:]}",
        f"directory    {paths.home}",
        "data offset  4096",
        "checksum     good",
        "verdict      ok",
        "tensor kv    F16 [4, 3, 16, 7], 2688 bytes",
        f"fields       as {paths.config} says",
        '    groups: ["a", "b", "c"]',
        "    test: 1",
        '    pages.0.tensors: [["kv", "F16", [4, 3, 16, 7]]]',
        "    pages.0.tokens: 16",
        '    pages.1.tensors: [["kv", "BF16", [2, 2, 16, 64]], ["kv1", "U8", [1, 1, 16, 5]]]',
        "    pages.1.tokens: 16",
        '    pages.2.tensors: [["kv", "U8", [1, 8192]]]',
        "    pages.2.tokens: 16",
    ]


def test_inspect_a_page_of_two_tensors(paths: NamespacePaths) -> None:
    found = run_json("inspect", paths.page(KEYS[2]))
    assert (found["ok"], found["group"], found["checksum"]) == (True, 1, "good")
    assert found["tensors"] == [
        {"name": "kv", "dtype": "BF16", "shape": [2, 2, 16, 64], "bytes": 8192},
        {"name": "kv1", "dtype": "U8", "shape": [1, 1, 16, 5], "bytes": 80},
    ]


def test_a_copy_elsewhere_is_still_a_sound_page(
    paths: NamespacePaths, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copy(page, tmp_path / "copy")
    assert run_json("inspect", copy) == sound(copy)
    unknown = f"unknown: no config.json of namespace {paths.name[-12:]} beside it"
    assert run("inspect", copy).splitlines()[-1] == (
        f"fields       {unknown}, and it lies in no namespace"
    )
    config = shutil.copy(paths.config, tmp_path)  # it was copied along
    found = {"config": config, "fields": CONTEXT.namespace}
    assert run_json("inspect", copy) == sound(copy, **found)
    Path(config).write_text('{"test": 2}')  # that of another namespace
    assert run_json("inspect", copy) == sound(copy)
    monkeypatch.chdir(page.parent)  # in its place, under a relative name
    assert run_json("inspect", page.name) == sound(Path(page.name), paths.home)


def test_the_fields_of_a_page_in_the_wrong_namespace(
    root: Path, paths: NamespacePaths, page: Path
) -> None:
    """They are those of the namespace that the page names, wherever it lies."""
    fields = {**CONTEXT.namespace, "test": 2}
    other = fill(root, TierContext("other", fields, CONTEXT.layouts))
    Path(paths.quarantine).mkdir()
    taken = shutil.copy(other.page(KEYS[0]), Path(paths.quarantine, "1-namespace-x"))
    expected = {"namespace": other.name[-12:], "config": other.config, "fields": fields}
    assert run_json("inspect", taken) == sound(taken, paths.home, **expected)
    os.unlink(other.config)
    found = run_json("inspect", taken)
    assert (found["directory"], found["config"], found["fields"]) == (paths.home, None, None)
    unknown = f"unknown: no config.json of namespace {other.name[-12:]} below its root"
    assert run("inspect", taken).splitlines()[-1] == f"fields       {unknown}"


def test_several_files(paths: NamespacePaths, page: Path, tmp_path: Path) -> None:
    both = run("inspect", page, paths.config)
    assert both == run("inspect", page) + "\n" + run("inspect", paths.config)
    first, second = run("inspect", page, page, "--json").split("\n}\n{\n")
    assert json.loads(first + "}") == json.loads("{" + second) == sound(page, paths.home)
    flip(page, -1)
    assert "bad: checksum" in run("inspect", page, paths.config, exit_code=1)
    absent = tmp_path / "absent"
    said = f"kvstrata: '{absent}': No such file or directory\n"
    assert run("inspect", absent, page, exit_code=2) == said


def test_a_long_field_is_cut_where_people_read(tmp_path: Path) -> None:
    layers = [f"model.layers.{n}.attn" for n in range(80)]
    fields = {"groups": {"0": {"layers": layers}}, "x.y": {}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    *_, cut, last = run("inspect", tmp_path / "config.json").splitlines()
    assert cut.startswith('    groups.0.layers: ["model.layers.0.attn", "model')
    assert cut.endswith("... (80 items)") and len(cut) < 150
    assert last == '    ["x.y"]: {}'
    assert run_json("inspect", tmp_path / "config.json")["fields"] == fields


def rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def header_fields(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(raw: bytes) -> bytes:
        fields = json.loads(raw[8:HEADER])
        change(fields)
        text = json.dumps(fields, separators=(",", ":")).encode()
        return raw[:8] + text.ljust(HEADER - 8) + raw[HEADER:]

    return rewrite(apply)


def header_length(length: int) -> Callable[[Path], object]:
    return rewrite(lambda raw: struct.pack("<Q", length % 2**64) + raw[8:])


def replace_by(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        path.unlink()
        make(path)

    return apply


def another_key(path: Path) -> None:
    place = path.parents[2] / KEYS[1][:-4].hex()[:3] / f"{KEYS[1][:-4].hex()[3:5]}_g0"
    shutil.copy(place / f"{KEYS[1][:-4].hex()}.safetensors", path)


HEADER_UNREAD = {"key": None, "tensors": [], "checksum": None, "data_offset": None}
CUT = {"key": KEYS[0].hex(), "tensors": TENSORS, "checksum": None, "data_offset": None}
WHOLE = {"key": KEYS[0].hex(), "tensors": TENSORS, "data_offset": HEADER}

# how the file is spoilt, the start of the reason, and what is still known of it
SPOILT: dict[str, tuple[Callable[[Path], object], str, dict[str, Any]]] = {
    "empty": (
        rewrite(lambda raw: b""),
        "truncated: the file has fewer than 8 bytes",
        HEADER_UNREAD,
    ),
    "cut in the header": (rewrite(lambda raw: raw[:1000]), "truncated: the header", HEADER_UNREAD),
    "cut in the data": (rewrite(lambda raw: raw[:-1]), "truncated: 6783 bytes instead of", CUT),
    "longer": (rewrite(lambda raw: raw + b"\0"), "size: 6785 bytes instead of 6784", CUT),
    "flipped bit": (lambda path: flip(path, -1), "checksum: ", {**WHOLE, "checksum": "bad"}),
    "zeros": (
        rewrite(lambda raw: bytes(len(raw))),
        "header: its first 8 bytes give 0 as",
        HEADER_UNREAD,
    ),
    "length -1": (
        header_length(-1),
        "header: its first 8 bytes give 18446744073709551615 as",
        HEADER_UNREAD,
    ),
    "length huge": (
        header_length(2**62),
        "header: its first 8 bytes give 4611686018427387904 as",
        HEADER_UNREAD,
    ),
    "length 99 MB": (
        header_length(99_999_992),
        "header: its first 8 bytes give 99999992 as",
        HEADER_UNREAD,
    ),
    "nested": (
        rewrite(lambda raw: raw[:8] + b"[" * HEADER),
        "header: the header is nested too deep",
        HEADER_UNREAD,
    ),
    "no metadata": (
        header_fields(lambda f: f.pop("__metadata__")),
        "header: the header lacks the field '__metadata__'",
        HEADER_UNREAD,
    ),
    "another version": (
        header_fields(lambda fields: fields["__metadata__"].update(format_version="2")),
        "version: format version '2'",
        HEADER_UNREAD,
    ),
    "another key's": (
        another_key,
        f"key: the page of key {KEYS[1].hex()}",
        {**WHOLE, "key": KEYS[1].hex(), "checksum": "good"},
    ),
    "another namespace's": (
        header_fields(lambda fields: fields["__metadata__"].update(namespace="0" * 12)),
        "namespace: of namespace '000000000000'",
        {**WHOLE, "namespace": "0" * 12, "checksum": "good"},
    ),
    "foreign": (
        replace_by(lambda path: save_file({"a": np.zeros(3)}, path)),
        "header: its first 8 bytes give",
        HEADER_UNREAD,
    ),
}


@pytest.mark.parametrize(("spoil", "reason", "known"), SPOILT.values(), ids=SPOILT.keys())
def test_a_bad_page(
    root: Path, page: Path, spoil: Callable[[Path], object], reason: str, known: dict[str, Any]
) -> None:
    spoil(page)
    found = run_json("inspect", page, exit_code=1)
    assert found["reason"].startswith(reason)
    assert (found["kind"], found["ok"], found["bytes"]) == ("page", False, page.stat().st_size)
    assert {name: found[name] for name in known} == known
    assert found.keys() == NOTHING.keys() | {"path", "kind", "bytes"}
    foreign = found["namespace"] in (None, "0" * 12)
    assert found["fields"] == (None if foreign else CONTEXT.namespace)
    assert f"bad: {reason}" in run("inspect", page, exit_code=1)
    # and `check` says the same
    sizes = sum(path.stat().st_size for path in root.rglob("*.safetensors"))
    checked = run_json("check", root, exit_code=1)
    kind = "place" if reason.startswith(("key", "namespace")) else "page"
    (bad,) = checked["findings"]
    told = {"path": str(page), "kind": kind, "reason": found["reason"]}
    assert bad == told | {"repair": None, "remains": False}
    assert (checked["files"], checked["bytes"], checked["found"]) == (3, sizes, {kind: 1})


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "FIFO"),
        (Path.mkdir, "directory"),
        (lambda path: path.symlink_to("nowhere"), "symbolic link"),
        (lambda path: path.symlink_to("/dev/zero"), "symbolic link"),
    ],
    ids=["FIFO", "directory", "dangling link", "link to a device"],
)
def test_what_is_no_regular_file_is_never_opened(
    root: Path, page: Path, make: Callable[[Path], object], kind: str
) -> None:
    replace_by(make)(page)
    reason = "not a regular file; the tier never opens it"
    expected = {**NOTHING, "path": str(page), "kind": kind, "bytes": 0, "ok": False}
    assert run_json("inspect", page, exit_code=1) == {**expected, "reason": reason}
    (bad,) = run_json("check", root, exit_code=1)["findings"]
    assert bad["path"] == str(page) and bad["reason"].startswith(("not-regular", "symlink"))


def test_inspect_a_device() -> None:
    assert run_json("inspect", "/dev/zero", exit_code=1)["kind"] == "device"


@pytest.mark.parametrize("command", ["inspect", "ls", "check"])
def test_what_is_not_there_is_a_usage_error(command: str, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    sentence = f"kvstrata: '{absent}': No such file or directory\n"
    assert run(command, absent, exit_code=2) == sentence
    assert run(command, absent, "--json", exit_code=2) == sentence


def test_inspect_a_config(paths: NamespacePaths) -> None:
    expected = {**NOTHING, "path": paths.config, "kind": "config.json"}
    expected["bytes"] = os.path.getsize(paths.config)
    expected |= {"namespace": paths.name[-12:], "fields": CONTEXT.namespace}
    expected |= {"directory": paths.home, "config": paths.config}
    assert run_json("inspect", paths.config) == expected
    assert '\n    groups: ["a", "b", "c"]\n' in run("inspect", paths.config)


BAD_CONFIGS = {
    '{"test": 2}': "config: its fields have the digest ",
    "[1]": "config: not a JSON object",
    "{": "config: Expecting property name",
    '{"test": NaN}': "config: Out of range float values",
    '{"test": 1e999}': "config: Out of range float values",
    '{"test": ' + "[" * 40 + "]" * 40 + "}": "config: nested too deep",
    "[" * 100_000: "config: nested too deep",
    "1" * 2**20 + "1": "config: not a regular file of at most 1 MiB",
}


@pytest.mark.parametrize(("text", "reason"), BAD_CONFIGS.items(), ids=range(len(BAD_CONFIGS)))
def test_a_bad_config(root: Path, paths: NamespacePaths, text: str, reason: str) -> None:
    Path(paths.config).write_text(text)
    assert run_json("inspect", paths.config, exit_code=1)["reason"].startswith(reason)
    totals = run_json("check", root, exit_code=1)
    (bad,) = totals["findings"]
    assert (bad["path"], bad["kind"], totals["files"]) == (paths.config, "config", 3)
    assert bad["reason"].startswith(reason)
    (namespace,) = run_json("ls", root)["namespaces"]
    assert namespace["files"] == 3
    assert namespace["fields"] == ({"test": 2} if text == '{"test": 2}' else None)


def test_a_config_elsewhere_has_no_digest_to_fail(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"test": 2}')
    found = run_json("inspect", tmp_path / "config.json")
    assert (found["ok"], found["namespace"]) == (True, namespace_digest({"test": 2}))


def test_inspect_a_temporary(paths: NamespacePaths, page: Path) -> None:
    ours = page.with_name(temporary_name())
    shutil.copy(page, ours)
    assert run_json("inspect", ours) == sound(ours, paths.home, kind="temporary")
    ours.write_bytes(ours.read_bytes()[:-1])
    found = run_json("inspect", ours)
    assert (found["ok"], found["kind"], found["checksum"]) == (True, "temporary", None)
    host, pid, start, rest = ours.name.removeprefix(".kvstrata-").split("-")
    dead = ours.rename(ours.with_name(f".kvstrata-{host}-{pid}-{int(start) - 1}-{rest}"))
    assert run_json("inspect", dead)["kind"] == "abandoned temporary"
    (abandoned,) = run_json("check", page.parents[3])["findings"]
    assert (abandoned["path"], abandoned["kind"]) == (str(dead), "temporary")


def test_inspect_a_foreign_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {"w": np.zeros((2, 3), np.int64), "a": np.zeros(5, np.float32)}
    save_file(tensors, path, {"format": "pt", "key": "x"})
    offset = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    found = run_json("inspect", path)
    sorted_tensors = sorted(found.pop("tensors"), key=lambda tensor: tensor["name"])
    assert sorted_tensors == [
        {"name": "a", "dtype": "F32", "shape": [5], "bytes": 20},
        {"name": "w", "dtype": "I64", "shape": [2, 3], "bytes": 48},
    ]
    expected = {**NOTHING, "path": str(path), "bytes": offset + 68, "data_offset": offset}
    del expected["tensors"]
    assert found == {**expected, "kind": "foreign safetensors"}


def test_a_page_of_a_later_version_is_no_foreign_file(page: Path, tmp_path: Path) -> None:
    SPOILT["another version"][0](page)
    found = run_json("inspect", shutil.copy(page, tmp_path), exit_code=1)
    assert (found["kind"], found["reason"]) == ("page", "version: format version '2'")
    assert (found["format_version"], found["tensors"]) == ("2", TENSORS)


def test_inspect_hides_what_could_control_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff\x1b[2J")
    save_file({"\x1b]0;title\a[red]": np.zeros(1, np.int8)}, path)
    shown = run("inspect", path)
    assert "tensor \\x1b]0;title\\x07[red]  I8 [1], 1 bytes\n" in shown
    assert run_json("inspect", path)["path"] == str(path)
    (tmp_path / "config.json").write_text(r'{"\u001b[2J": "\u001b[2J"}')
    assert r'    ["\u001b[2J"]: "\u001b[2J"' in run("inspect", tmp_path / "config.json")
    path.unlink()
    assert "\\udcff\\x1b[2J" in run("inspect", path, exit_code=2)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"hello\n", "the file has fewer than 8 bytes"),
        (b"some notes of mine\n", "its first 8 bytes give 8390045716234202995 as the header's"),
        (struct.pack("<Q", HEADER - 8) + b"{}".ljust(99), "the header is cut off"),
        (struct.pack("<Q", HEADER - 8) + b"{".ljust(HEADER), "the header is not JSON"),
        (struct.pack("<Q", HEADER - 8) + b"\xff" * HEADER, "the header is not JSON"),
        (struct.pack("<Q", HEADER - 8) + b"[]".ljust(HEADER), "the values in the header are"),
    ],
    ids=range(6),
)
def test_inspect_what_is_no_page_at_all(tmp_path: Path, raw: bytes, reason: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(raw)
    found = run_json("inspect", path, exit_code=1)
    assert found["reason"].startswith(f"not a page file: {reason}")
    assert f"bad: not a page file: {reason}" in run("inspect", path, exit_code=1)


raw_files = st.one_of(
    st.binary(max_size=200),
    st.tuples(st.integers(0, 2**64 - 1) | st.integers(0, 64), st.binary(max_size=64)).map(
        lambda parts: struct.pack("<Q", parts[0]) + parts[1]
    ),
    st.text(max_size=60).map(lambda text: struct.pack("<Q", len(text.encode())) + text.encode()),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=raw_files, name=st.sampled_from(["x", "config.json", temporary_name()]))
def test_inspect_survives_any_bytes(tmp_path: Path, raw: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(raw)
    result = CliRunner().invoke(app, ["inspect", str(path), "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == (0 if found["ok"] else 1)
    assert found["bytes"] in (len(raw), 0) and found["ok"] is (found["reason"] is None)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, HEADER + SIZE - 1), bit=st.integers(0, 7))
def test_check_finds_any_flipped_bit(root: Path, page: Path, position: int, bit: int) -> None:
    good = page.read_bytes()
    raw = bytearray(good)
    raw[position] ^= 1 << bit
    page.write_bytes(raw)
    (bad,) = run_json("check", root, exit_code=1)["findings"]
    assert bad["path"] == str(page)
    assert run_json("inspect", page, exit_code=1)["reason"] == bad["reason"]
    page.write_bytes(good)
