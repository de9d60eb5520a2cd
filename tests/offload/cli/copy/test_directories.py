"""`kvstrata copy` from one root to another."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvstrata.tiers.base import EPOCH, TierContext
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.trust import distrust
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.testing import CONTEXT, find, load, make_data, make_key
from tests.conftest import FillRoot
from tests.offload.cli.cli_world import KEYS, PAGES, fill, outcome, run, run_json
from tests.spoiling import flip

SIZE = CONTEXT.layouts[0].nbytes
MANY = {make_key(n): make_data(n, SIZE) for n in range(200)}
OTHER = replace(CONTEXT, model="other", namespace={**CONTEXT.namespace, "another": 1})


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Where to; it is not there yet."""
    return tmp_path / "copy"


def sound(root: Path) -> int:
    """The pages below the root, all of which are sound."""
    found = run_json("check", root)
    assert found["left"] == 0 and not found["findings"]
    return int(found["files"])


def counts(done: dict[str, Any]) -> tuple[int, int, list[str], str | None]:
    return done["pages"], done["there"], [each["reason"] for each in done["bad"]], done["stopped"]


def test_a_copy_is_a_root(root: Path, paths: NamespacePaths, copy: Path) -> None:
    done = run_json("copy", root, copy)
    nbytes = sum(os.path.getsize(paths.page(key)) for key in KEYS)
    assert done == {
        "namespaces": [paths.name],
        "pages": 3,
        "bytes": nbytes,
        "there": 0,
        "gone": 0,
        "private": [],
        "bad": [],
        "stopped": None,
    }
    theirs = NamespacePaths(str(copy), paths.name)
    for ours, made in ((paths.page(key), theirs.page(key)) for key in KEYS):
        assert Path(made).read_bytes() == Path(ours).read_bytes()
        modes = [os.stat(path).st_mode & 0o777 for path in (made, os.path.dirname(made))]
        assert modes == [0o600, 0o700]
    assert Path(theirs.config).read_bytes() == Path(paths.config).read_bytes()
    assert sound(copy) == 3
    assert counts(run_json("copy", root, copy)) == (0, 3, [], None)
    assert run("copy", root, copy) == "0 pages, 0 B copied, 3 were there already\n"
    tier = FsTier({"root_dir": str(copy)}, CONTEXT)
    for key, data in PAGES.items():
        find(tier, key)
        assert load(tier, [key])[1] == {key: data}
    assert tier.shutdown(60.0)


def test_namespaces_by_prefix(root: Path, paths: NamespacePaths, copy: Path) -> None:
    other = fill(root, OTHER)
    said = run("copy", root, copy, "--prefix", "none", exit_code=2)
    assert said.splitlines()[0] == f"kvstrata: no namespace in '{root}' begins with none:"
    assert [line.strip() for line in said.splitlines()[1:]] == [paths.name, other.name]
    assert not copy.exists()
    assert run_json("copy", root, copy, "--prefix", "oth")["namespaces"] == [other.name]
    digest = paths.name[-12:]
    assert run_json("copy", root, copy, "--prefix", digest[:6])["namespaces"] == [paths.name]
    both = run_json("copy", root, copy, "--prefix", "org", "--prefix", "other")
    assert both["namespaces"] == [paths.name, other.name] and both["there"] == 6


def test_newer(root: Path, paths: NamespacePaths, page: Path, copy: Path) -> None:
    then = time.time() - 7200
    os.utime(page, (then, then))
    assert counts(run_json("copy", root, copy, "--newer", "90 min")) == (2, 0, [], None)
    assert counts(run_json("copy", root, copy, "--newer", "3h")) == (1, 2, [], None)
    code, _, said = outcome("copy", root, copy, "--newer", "soon")
    assert code == 2 and "'soon' is no age" in said


def test_bad_pages_are_named(root: Path, paths: NamespacePaths, copy: Path) -> None:
    flip(paths.page(KEYS[0]))
    os.truncate(paths.page(KEYS[1]), 5000)
    strange = Path(paths.pages, "abc", "de_g0", "zz.safetensors")
    strange.parent.mkdir(parents=True)
    strange.touch()
    before = sorted(root.rglob("*"))
    done = run_json("copy", root, copy, exit_code=1)
    assert (done["pages"], done["stopped"]) == (1, None)
    assert {each["path"]: each["reason"].split(":")[0] for each in done["bad"]} == {
        paths.page(KEYS[0]): "checksum",
        paths.page(KEYS[1]): "truncated",
        str(strange): "key",
    }
    assert sorted(root.rglob("*")) == before, "nothing is moved"
    assert sound(copy) == 1
    shown = run("copy", root, copy, exit_code=1).splitlines()
    assert f"not copied: {paths.page(KEYS[0])}: checksum: " in "\n".join(shown)
    assert shown[-1] == "0 pages, 0 B copied, 1 were there already, 3 not copied"


def test_what_is_no_page_in_the_way(root: Path, paths: NamespacePaths, copy: Path) -> None:
    """One of the wrong size is replaced, as the tier does it; one of the right size stays."""
    run("copy", root, copy)
    theirs = NamespacePaths(str(copy), paths.name)
    os.truncate(theirs.page(KEYS[0]), 10)
    flip(theirs.page(KEYS[1]))
    kept = Path(theirs.page(KEYS[1])).read_bytes()
    assert counts(run_json("copy", root, copy)) == (1, 2, [], None)
    assert Path(theirs.page(KEYS[0])).read_bytes() == Path(paths.page(KEYS[0])).read_bytes()
    assert Path(theirs.page(KEYS[1])).read_bytes() == kept


def test_namespaces_that_cannot_be_copied(root: Path, paths: NamespacePaths, copy: Path) -> None:
    """Each is named, and the others are copied."""
    distrust(fill(root, OTHER), 0o600)
    fields = {**CONTEXT.namespace, "third": 1}
    shutil.rmtree(fill(root, replace(CONTEXT, model="third", namespace=fields)).home)
    done = run_json("copy", root, copy, exit_code=1)
    assert done["pages"] == 3
    reasons = {each["path"]: each["reason"] for each in done["bad"]}
    assert [reason.split()[0] for reason in sorted(reasons.values())] == ["audits", "missing:"]


def test_an_untrusted_copy_takes_nothing(root: Path, paths: NamespacePaths, copy: Path) -> None:
    run("copy", root, copy, "--newer", "9999d")
    theirs = NamespacePaths(str(copy), paths.name)
    os.unlink(theirs.page(KEYS[0]))
    distrust(theirs, 0o600)
    (bad,) = run_json("copy", root, copy, exit_code=1)["bad"]
    assert bad["path"] == theirs.home and not os.path.exists(theirs.page(KEYS[0]))


def test_private_pages_are_left_out(root: Path, copy: Path) -> None:
    context = TierContext("m", {**CONTEXT.namespace, EPOCH: "x"}, CONTEXT.layouts)
    tier = FsTier(
        {"root_dir": str(root), "max_files": 1000}, replace(context, region=CONTEXT.region)
    )
    assert tier.shutdown(60.0)
    done = run_json("copy", root, copy)
    assert (done["private"], done["pages"]) == (done["namespaces"], 0)
    assert not copy.exists()


# ---- places that are none ----


def test_places_that_cannot_be_used(root: Path, paths: NamespacePaths, tmp_path: Path) -> None:
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    said = run("copy", missing, empty, exit_code=2)
    assert said == f"kvstrata: '{missing}': No such file or directory\n"
    assert run("copy", empty, missing, exit_code=2) == f"kvstrata: no namespaces in '{empty}'\n"
    link = tmp_path / "link"
    link.symlink_to(root)
    for other in (root, root / "inside", tmp_path, link, f"{link}/inside"):
        assert "give two places apart" in run("copy", root, other, exit_code=2)
    assert not missing.exists() and not (root / "inside").exists()
    (tmp_path / "file").touch()
    assert "is not a directory" in run("copy", root, tmp_path / "file/x", exit_code=2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ftp://kv", "url: 'ftp://kv' is wrong; give \"s3://bucket/prefix\""),
        ("host:/kv", "root_dir: 'host:/kv' is a URL, or names another host"),
        ("{", "TO: this is no JSON"),
        ('{"type": "memory"}', "TO: pages of type 'memory' cannot be copied; give a directory"),
        ('{"type": "pool"}', "name is missing: give the pool's name"),
        ('{"type": "fs", "root_dir": ["/a", "/b"]}', "TO: root_dir has several directories"),
        ('{"type": "fs", "path": "/a"}', "'path': use root_dir"),
        ("redis://kv", "url: 'redis://kv' is wrong"),
    ],
)
def test_places_that_are_none(root: Path, paths: NamespacePaths, text: str, said: str) -> None:
    assert said in run("copy", root, text, exit_code=2)


def test_without_permission(
    root: Path,
    paths: NamespacePaths,
    tmp_path: Path,
    another_user: Callable[[], AbstractContextManager[None]],
) -> None:
    tmp_path.chmod(0o755)
    for path in [root, *root.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    if os.geteuid() == 0:
        for above in tmp_path.parents[:-2]:
            above.chmod(0o755)
    os.chmod(paths.page(KEYS[0]), 0)
    os.chmod(os.path.dirname(paths.page(KEYS[2])), 0)
    place = tmp_path / "theirs"
    place.mkdir()
    place.chmod(0o777)
    with another_user():
        said = run("copy", root, tmp_path / "copy", exit_code=2)
        assert "root_dir: " in said and "may not make it" in said
        done = run_json("copy", root, place / "copy", exit_code=1)
    assert done["pages"] == 1
    assert sorted(each["path"] for each in done["bad"]) == sorted(
        [paths.page(KEYS[0]), os.path.dirname(paths.page(KEYS[2]))]
    )
    assert all(each["reason"].startswith("unreadable: ") for each in done["bad"])


# ---- room ----


def test_limits_end_the_copy(root: Path, fill_root: FillRoot, copy: Path) -> None:
    """Nothing is evicted for it."""
    fill_root(root, MANY)
    place = json.dumps({"type": "fs", "root_dir": str(copy), "max_files": 100})
    pages, there, bad, stopped = counts(run_json("copy", root, place, exit_code=1))
    assert 50 < pages < 100 and not there and not bad
    assert stopped == f"TO failed: budget: '{copy}' has no more room within its limits"
    assert sound(copy) == pages
    shown = run("copy", root, place, exit_code=1).splitlines()
    assert shown[-1].startswith(f"stopped: {stopped}; free some of the disk, or give TO as JSON")
    assert shown[-1].endswith(", and run it again")
    assert sound(copy) - pages in range(10)


def test_the_disk_keeps_its_floor(root: Path, paths: NamespacePaths, copy: Path) -> None:
    place = json.dumps({"type": "fs", "root_dir": str(copy), "min_free_bytes": "99.9%"})
    pages, _, _, stopped = counts(run_json("copy", root, place, exit_code=1))
    assert pages == 0 and stopped is not None and "no more room" in stopped


def test_beside_a_server(root: Path, fill_root: FillRoot, copy: Path) -> None:
    """It hears of each page, and its budget holds: it evicts for the copy as for others."""
    fill_root(root, MANY)
    tier = FsTier({"root_dir": str(copy), "max_files": 60, "min_free_bytes": 0}, CONTEXT)
    assert counts(run_json("copy", root, copy)) == (len(MANY), 0, [], None)
    files = [path for path in copy.rglob("*") if path.is_file()]
    assert len(files) <= 60
    keys = [make_key(int(path.stem[:16], 16)) for path in files if path.suffix == ".safetensors"]
    result, arrived = load(tier, keys)
    assert arrived == {key: MANY[key] for key in keys if key not in result.failed}
    assert arrived and set(result.failed.values()) <= {"missing"}, "evicted since"
    find(tier, next(reversed(arrived)))
    assert tier.shutdown(60.0)


# ---- interrupted, and two at once ----

_KILLED = """
import os, signal, sys
from kvstrata.tiers.fs import page_files
left, rename = 50, os.rename
def count(*arguments, **more):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*arguments, **more)
page_files.os.rename = count
from kvstrata.offload.cli.main import main
main()
"""
_STOPPED = """
import os, signal, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, too
from kvstrata.offload.cli.copy import pages
from kvstrata.tiers.fs import page_files
left, rename, noted = 50, os.rename, threading.Event()
class Pool(pages.ThreadPoolExecutor):
    def __exit__(self, *error):
        noted.set()
        return super().__exit__(*error)
pages.ThreadPoolExecutor = Pool
def count(*arguments, **more):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), NUMBER)
    if left <= 0:
        noted.wait(60)
    rename(*arguments, **more)
page_files.os.rename = count
from kvstrata.offload.cli.main import main
main()
"""
_WHOLE = "from kvstrata.offload.cli.main import main; main()"


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_and_run_again(root: Path, fill_root: FillRoot, copy: Path) -> None:
    fill_root(root, MANY)
    process = start(_KILLED, "copy", root, copy)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = len(list(copy.rglob("*.safetensors")))
    assert 0 < left < len(MANY)
    assert counts(run_json("copy", root, copy)) == (len(MANY) - left, left, [], None)
    found = run_json("check", copy, "--fix")
    assert (found["files"], found["left"]) == (len(MANY), 0)
    assert sound(copy) == len(MANY)
    assert not list(copy.rglob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_run_again(root: Path, fill_root: FillRoot, copy: Path, number: int) -> None:
    fill_root(root, MANY)
    process = start(f"NUMBER = {int(number)}{_STOPPED}", "copy", root, copy, "--json")
    said, _ = process.communicate()
    pages, _, bad, stopped = counts(json.loads(said))
    assert (process.returncode, bad, stopped) == (1, [], "interrupted")
    assert 0 < pages < len(MANY) and sound(copy) == pages
    assert not list(copy.rglob("*.tmp"))
    assert counts(run_json("copy", root, copy)) == (len(MANY) - pages, pages, [], None)


def test_two_at_once(root: Path, fill_root: FillRoot, copy: Path) -> None:
    fill_root(root, MANY)
    both = [start(_WHOLE, "copy", root, copy, "--json") for _ in range(2)]
    for process in both:
        said, errors = process.communicate()
        assert (process.returncode, errors) == (0, "")
        pages, there, bad, stopped = counts(json.loads(said))
        assert (pages + there, bad, stopped) == (len(MANY), [], None)
    assert sound(copy) == len(MANY)


def test_a_bar_on_a_terminal(root: Path, paths: NamespacePaths, copy: Path) -> None:
    ours, theirs = pty.openpty()
    words = [sys.executable, "-c", _WHOLE, "copy", str(root), str(copy)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=theirs, env=environment) as child:
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # EIO once the child has closed its end
            while part := os.read(ours, 65536):
                shown += part
        said, _ = child.communicate()
    os.close(ours)
    assert child.returncode == 0 and said.startswith(b"3 pages, ")
    assert b"copying" in shown and b"25.9/25.9 kB" in shown
