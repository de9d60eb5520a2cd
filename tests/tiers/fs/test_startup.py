"""What cannot work is one clear error at start."""

import errno
import json
import os
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvstrata.tiers.base import Lookup, TierConfigError, TierContext, unseen
from kvstrata.tiers.fs import startup
from kvstrata.tiers.fs.budget.ledger import Ledger
from kvstrata.tiers.fs.config import FsConfig
from kvstrata.tiers.fs.files import direct_io as io
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.namespace import namespace_paths
from kvstrata.tiers.fs.startup import make_root
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.testing import CONTEXT, load, make_data, make_key, settle, store
from tests.conftest import FillRoot
from tests.spoiling import flip
from tests.waiting import wait_until

OpenTier = Callable[..., FsTier]
PAGE = {make_key(1): make_data(1, CONTEXT.layouts[0].nbytes)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "root_dir is missing"),
        ({"root_dir": ""}, "root_dir: '' is wrong"),
        ({"root_dir": 3}, "root_dir: 3 is wrong"),
        ({"root_dir": "/a\0b"}, "root_dir: .* is wrong"),
        ({"root_dir": "~nosuch/x"}, "root_dir: '~nosuch/x' names a user who is unknown here"),
        ({"root_dir": "kv"}, "root_dir: 'kv' is relative; give an absolute path"),
        ({"root_dir": "/x", "rootdir": "/y"}, r"'rootdir' \(did you mean 'root_dir'\?\)"),
        ({"root_dir": "/x", "max_bytes": "many"}, "max_bytes: 'many' is not a size"),
        ({"root_dir": "/x", "max_bytes": None}, "max_bytes is null"),
        ({"root_dir": "/x", "max_files": 0}, "max_files: 0 is wrong"),
        (
            {"root_dir": "/x", "min_free_bytes": "100%"},
            "min_free_bytes: '100%' is no share of a disk",
        ),
        ({"root_dir": "/x", "max_bytes": "150%"}, "max_bytes: .150%. is no share of a disk"),
        ({"root_dir": "/x", "n_read_threads": 0}, "n_read_threads: 0 is wrong"),
        ({"root_dir": "/x", "n_write_threads": "many"}, "n_write_threads: 'many' is wrong"),
        ({"root_dir": "/x", "file_mode": "0999"}, "file_mode: '0999' is not"),
        ({"root_dir": "/x", "file_mode": "0400"}, "file_mode: '0400' lacks the owner's 0600"),
        ({"root_dir": "/x", "dir_mode": "0600"}, "dir_mode: '0600' lacks the owner's 0700"),
        ({"root_dir": "/x", "durability": "always"}, "durability: .* one of fsync, none"),
        ({"root_dir": "/x", "io": "mmap"}, "io: .* one of auto, buffered, direct"),
    ],
    ids=repr,
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TierConfigError, match=message):
        FsTier.check_options(options)
    with pytest.raises(TierConfigError, match=message):
        FsTier(options, CONTEXT)


def test_check_options_leaves_the_disk_alone(root: Path) -> None:
    FsTier.check_options({"root_dir": str(root), "file_mode": "0640", "io": "direct"})
    assert not root.exists()


def test_home_is_expanded(open_tier: OpenTier, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root))
    open_tier(root_dir="~/deep/kv")
    assert (root / "deep/kv").is_dir()


def test_root_is_a_file(open_tier: OpenTier, root: Path) -> None:
    root.write_text("x")
    with pytest.raises(TierConfigError, match=f"root_dir: '{root}' is not a directory; give"):
        open_tier()
    below = f"root_dir: '{root}/kv' cannot be made: '{root}' is not a directory; choose another"
    with pytest.raises(TierConfigError, match=below):
        open_tier(root_dir=f"{root}/kv")


def test_root_is_a_dangling_link(open_tier: OpenTier, root: Path) -> None:
    root.symlink_to("nowhere")
    words = f"cannot be made: '{root}' is a symbolic link to 'nowhere', which is not there; make"
    for path in (root, root / "kv"):
        with pytest.raises(TierConfigError, match=f"root_dir: '{path}' {words}"):
            open_tier(root_dir=str(path))


@pytest.mark.parametrize("name", ["EACCES", "EIO"])
def test_root_cannot_be_written(
    open_tier: OpenTier, root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    def refuse(*args: object) -> int:
        raise error

    monkeypatch.setattr(io.os, "pwrite", refuse)
    words = {
        "EACCES": r"is not writable by this user \(\d+\): it has user .*; change",
        "EIO": "cannot be used .*Input/output error.*; see to its disk or its mount, or choose",
    }
    with pytest.raises(TierConfigError, match=f"root_dir: '{root}' {words[name]}"):
        open_tier()
    assert not [n for n in os.listdir(next(root.iterdir())) if n.endswith(".tmp")]


def open_to_all(path: Path) -> None:
    """Let every user come as far as `path`."""
    for directory in (path, *path.parents):
        if directory.stat().st_uid == os.geteuid() and directory != Path("/"):
            directory.chmod(0o755)


def test_root_belongs_to_somebody_else(
    open_tier: OpenTier, root: Path, another_user: Callable[[], AbstractContextManager[None]]
) -> None:
    """The remedy is one that helps: nobody is told to take over a directory of the system."""
    root.mkdir()
    for name in ("busy", "closed"):
        (root / name).mkdir()
    (root / "busy/notes").touch()
    open_to_all(root)
    for name in ("busy", "closed"):
        (root / name).chmod(0o555 if name == "busy" else 0)
    expected = {
        root: r"is not writable by this user \(\d+\), and holds other things; give a directory",
        root / "busy": r"is not writable by this user \(\d+\), and holds other things; give a",
        root / "kv/deep": f"does not exist, and this user .* may not make it in '{root}'; make it",
        root / "closed": r"is not writable by this user \(\d+\): it has user \d+, group \d+, mode "
        "0000; change its owner or mode",
        root / "closed/kv": f"cannot be reached: this user .* may not pass '{root}/closed'; give",
        Path("/"): "is the root of the whole file system; give a directory",
    }
    root.chmod(0o555)
    for path, words in expected.items():
        with another_user(), pytest.raises(TierConfigError, match=f"root_dir: '{path}' {words}"):
            open_tier(root_dir=str(path))
    root.chmod(0o755)


def test_the_whole_file_system_is_no_root(open_tier: OpenTier, root: Path) -> None:
    """Not for root's user either, nor through a link."""
    before = os.listdir("/")
    root.symlink_to("/")
    for path in ("/", "//", str(root)):
        with pytest.raises(TierConfigError, match="is the root of the whole file system; give"):
            open_tier(root_dir=path)
    assert os.listdir("/") == before


@pytest.mark.parametrize("theirs", [".kvstrata", "home", "config"])
def test_what_another_user_made_is_named(
    open_tier: OpenTier,
    root: Path,
    paths: NamespacePaths,
    another_user: Callable[[], AbstractContextManager[None]],
    theirs: str,
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be two users")
    tier = open_tier()
    store(tier, PAGE)
    assert tier.shutdown(60.0)
    open_to_all(root)
    for path in (root, *root.rglob("*")):
        os.chown(path, 65534, 65534)
    named = {"home": Path(paths.home), "config": Path(paths.config)}.get(theirs, root / theirs)
    os.chown(named, 0, 0)
    words = f"holds '{named}.*', which this user .* may not use: it has user .*; servers of several"
    with another_user(), pytest.raises(TierConfigError, match=f"root_dir: '{root}' {words}"):
        open_tier()


def test_root_is_on_a_read_only_disk(open_tier: OpenTier, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    words = f"does not exist, and '{small_disk}' is on a read-only file system; mount a volume"
    with pytest.raises(TierConfigError, match=f"root_dir: '{small_disk}/kv' {words}"):
        open_tier(root_dir=f"{small_disk}/kv")


def test_a_root_that_a_group_shares(open_tier: OpenTier, root: Path, paths: NamespacePaths) -> None:
    """What is made in a setgid directory stays open to its group, as in a pod with fsGroup."""
    root.mkdir()
    if os.geteuid() == 0:
        os.chown(root, -1, 2000)
    group = root.stat().st_gid
    root.chmod(0o2770)
    tier = open_tier(dir_mode="0770", file_mode="0660")
    assert not store(tier, PAGE).failed and tier.drain(60.0)
    flip(paths.page(next(iter(PAGE))))
    assert load(tier, list(PAGE))[0].failed  # which makes the quarantine
    assert not store(tier, PAGE).failed
    for path in root.rglob("*"):
        found = path.stat()
        assert found.st_gid == group
        assert stat.S_IMODE(found.st_mode) == (0o2770 if path.is_dir() else 0o660), path
    assert (root / ".kvstrata/spare").is_dir() and Path(paths.quarantine).is_dir()
    made = open_tier(root_dir=str(root / "deep/kv"), dir_mode="0750")
    assert made and stat.S_IMODE((root / "deep/kv").stat().st_mode) == 0o2750


def test_a_mode_may_hold_the_setgid_bit(open_tier: OpenTier, paths: NamespacePaths) -> None:
    store(open_tier(dir_mode="2770"), PAGE)
    page = Path(paths.page(next(iter(PAGE))))
    for directory in (page.parent, page.parent.parent, Path(paths.home), Path(paths.root)):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o2770
    for wrong in ("1770", "4770", "6770"):
        with pytest.raises(TierConfigError, match=f"dir_mode: '{wrong}' is not a permission mode"):
            FsTier.check_options({"root_dir": "/x", "dir_mode": wrong})
    with pytest.raises(TierConfigError, match="file_mode: '2660' is not a permission mode"):
        FsTier.check_options({"root_dir": "/x", "file_mode": "2660"})


def test_a_full_disk_for_real(open_tier: OpenTier, small_disk: Path) -> None:
    with pytest.raises(OSError), open(small_disk / "ballast", "wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))
    tier = open_tier(root_dir=str(small_disk), max_bytes="64MiB")
    assert store(tier, PAGE).failed
    (small_disk / "ballast").unlink()
    deadline = time.monotonic() + 30.0
    while store(tier, PAGE).failed:
        assert time.monotonic() < deadline
    assert load(tier, list(PAGE))[1] == PAGE


def test_a_read_only_disk_serves_what_is_there(open_tier: OpenTier, small_disk: Path) -> None:
    tier = open_tier(root_dir=str(small_disk))
    store(tier, PAGE)
    assert tier.shutdown(60.0)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for more in ({}, {"max_bytes": "1MiB"}):
        tier = open_tier(root_dir=str(small_disk), **more)
        assert load(tier, list(PAGE))[1] == PAGE
        assert settle(tier, next(iter(PAGE))) is Lookup.HIT
        data = make_data(1, CONTEXT.layouts[0].nbytes)
        assert set(store(tier, {make_key(5): data}).failed.values()) <= {"read-only", "budget"}
        assert tier.shutdown(60.0)


def test_engines_that_start_together(open_tier: OpenTier, root: Path) -> None:
    """Each makes the root, or finds it made."""
    configs = FsConfig.parse({"root_dir": str(root / "new")})
    with ThreadPoolExecutor(8) as threads:
        for _ in range(50):
            made = list(threads.map(make_root, configs * 8))
            assert made == list(configs) * 8
            (root / "new").rmdir()


def test_a_budget_too_small_for_a_page(open_tier: OpenTier) -> None:
    with pytest.raises(
        TierConfigError, match=r"max_bytes: 4\.0 KiB is too little for the pages of"
    ):
        open_tier(max_bytes=4096)


PRIVATE = {
    "weights may change": {"epoch": "1"},
    "they are in object storage": {"weights": unseen("they are in object storage")},
    "the draft is random": {"weights": "abc", "draft_weights": unseen("the draft is random")},
}


LIMITS = [{"max_bytes": "50%"}, {"max_files": 9}, {"min_free_bytes": 1}]


@pytest.mark.parametrize(("why", "limit"), list(zip(PRIVATE, LIMITS, strict=True)))
def test_files_that_only_pile_up_need_a_limit(
    open_tier: OpenTier, why: str, limit: dict[str, Any]
) -> None:
    private = replace(CONTEXT, namespace={**CONTEXT.namespace, **PRIVATE[why]})
    with pytest.raises(TierConfigError, match=f"{why}.* need a limit: give max_bytes"):
        open_tier(private)
    open_tier(private, **limit)


def test_books_that_somebody_has_locked(open_tier: OpenTier, root: Path) -> None:
    """The limits of others hold, also for one who could not see them at its start."""
    open_tier(max_files=30).drain(60.0)
    ledger = Ledger(str(root), 0o600, 0o700)
    with ledger.locked():
        tier = open_tier()
        assert set(store(tier, PAGE).failed.values()) <= {"books", "budget"}
    ledger.close()
    deadline = time.monotonic() + 30.0
    while store(tier, PAGE).failed:
        assert time.monotonic() < deadline

    def files(below: Path) -> int:
        return sum(len(names) for _, _, names in os.walk(below))

    for n in range(100, 160):
        store(tier, {make_key(n): make_data(n, CONTEXT.layouts[0].nbytes)})
        # what the books themselves have become since is counted a moment later
        assert files(root) - files(root / ".kvstrata") <= 30
        wait_until(lambda: files(root) <= 30)


def test_config_holds_the_fields(open_tier: OpenTier, paths: NamespacePaths, root: Path) -> None:
    open_tier()
    assert json.loads(Path(paths.config).read_text()) == CONTEXT.namespace
    digest = paths.name.removeprefix("org_model_")
    found = sorted(os.listdir(root))
    assert found == [".kvstrata", f"org_model_{digest}", f"org_model_{digest}_r0"]


def test_the_same_namespace_opens_again(open_tier: OpenTier, paths: NamespacePaths) -> None:
    store(open_tier(), PAGE)
    before = os.stat(paths.config).st_mtime_ns
    reordered = dict(reversed(list(CONTEXT.namespace.items())))
    tier = open_tier(TierContext(CONTEXT.model, reordered, CONTEXT.layouts))
    assert load(tier, list(PAGE))[1] == PAGE
    assert os.stat(paths.config).st_mtime_ns == before


def test_another_model_name_finds_the_same_pages(open_tier: OpenTier, root: Path) -> None:
    store(open_tier(), PAGE)
    before = sorted(os.listdir(root))
    tier = open_tier(TierContext("/models/copy", CONTEXT.namespace, CONTEXT.layouts))
    assert load(tier, list(PAGE))[1] == PAGE
    assert sorted(os.listdir(root)) == before
    other = TierContext("/models/copy", {**CONTEXT.namespace, "test": 2}, CONTEXT.layouts)
    assert load(open_tier(other), list(PAGE))[0].failed.keys() == PAGE.keys()
    assert len(os.listdir(root)) == len(before) + 2


def test_which_directory_of_a_namespace(root: Path, paths: NamespacePaths) -> None:
    def chosen(model: str) -> str:
        return namespace_paths(str(root), model, CONTEXT.namespace).name

    digest = paths.name.removeprefix("org_model_")
    assert chosen("m") == f"m_{digest}"  # there is no root yet
    for name in (f"y_{digest}", f"b_{digest}", f"a_{digest}_r0", "a_0123456789ab", f"x{digest}"):
        (root / name).mkdir(parents=True)
        (root / name / "config.json").touch()
    (root / f"m_{digest}").mkdir()
    assert chosen("m") == f"b_{digest}"  # its own has no config.json
    assert chosen("y") == f"y_{digest}"
    (root / f"m_{digest}/config.json").touch()
    assert chosen("m") == f"m_{digest}"
    assert chosen("other") == f"b_{digest}"


def with_fields(**changes: object) -> str:
    """The contract's namespace with other fields, as JSON."""
    return json.dumps({**CONTEXT.namespace, **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (with_fields(test=2), "field 'test' of .* is 2, .* has 1; move"),
        (with_fields(test=True), "field 'test' of .* is true, .* has 1"),
        (with_fields(test=float("nan")), "field 'test' of .* is NaN, .* has 1"),
        ('{"test": 1}', "field 'groups' of .* is absent, .* has "),
        (with_fields(x=0), "field 'x' of .* is 0, .* has absent"),
        (with_fields(groups=["a", "B", "c"]), r"field 'groups\[1\]' of .* is \"B\", .* has \"b\""),
        (
            with_fields(pages={**CONTEXT.namespace["pages"], "1": {"tokens": 8}}),
            r"field 'pages.1.tensors' of .* is absent, .* has \[\[\"kv\", .*BF16",
        ),
        ("", "is unreadable"),
        ("{", "is unreadable"),
        ("[]", r"is unreadable \(not a JSON object\)"),
        ("[" * 100_000, r"is unreadable \(nested too deep\)"),
        ("\udcff", "is unreadable"),
        (" " * (2**20 + 1), "is unreadable"),
    ],
    ids=lambda value: value[:30],
)
def test_config_that_differs(
    open_tier: OpenTier,
    fill_root: FillRoot,
    root: Path,
    paths: NamespacePaths,
    text: str,
    message: str,
) -> None:
    fill_root(root, {})
    Path(paths.config).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(TierConfigError, match=f"root_dir: .*{message}"):
        open_tier()


@pytest.mark.parametrize("kind", ["symlink", "directory", "fifo", "socket"])
def test_config_that_is_no_file(open_tier: OpenTier, paths: NamespacePaths, kind: str) -> None:
    home = Path(paths.home)
    home.mkdir(parents=True)
    config = Path(paths.config)
    if kind == "symlink":
        config.symlink_to("/etc/hostname")
    elif kind == "directory":
        config.mkdir()
    elif kind == "fifo":
        os.mkfifo(config)
    else:
        here = os.getcwd()
        os.chdir(home)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("config.json")
        os.chdir(here)
    with pytest.raises(TierConfigError, match=r"root_dir: .*config.json' is unreadable"):
        open_tier()


@pytest.mark.parametrize(
    ("options", "file_mode", "dir_mode"),
    [({}, 0o600, 0o700), ({"file_mode": "0664", "dir_mode": 0o775}, 0o664, 0o775)],
    ids=["default", "shared"],
)
def test_modes(
    open_tier: OpenTier,
    paths: NamespacePaths,
    options: dict[str, Any],
    file_mode: int,
    dir_mode: int,
) -> None:
    umask = os.umask(0o077)
    try:
        tier = open_tier(**options)
        store(tier, PAGE)
    finally:
        os.umask(umask)
    page = Path(paths.page(next(iter(PAGE))))
    files = [page, Path(paths.config)]
    directories = [page.parent, page.parent.parent, Path(paths.pages), Path(paths.home)]
    assert [f.stat().st_mode & 0o777 for f in files] == [file_mode] * 2
    assert [d.stat().st_mode & 0o777 for d in directories] == [dir_mode] * 4


def test_direct_where_there_is_none(open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "probe_direct", lambda directory: False)
    with pytest.raises(TierConfigError, match=r"io: 'direct' is wrong for .*give 'auto' or"):
        open_tier(io="direct")
    assert not store(open_tier(io="auto"), PAGE).failed
