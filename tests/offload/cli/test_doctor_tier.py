"""`kvstrata doctor --tier`: what a tier does is tried, and nothing of it is left."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from kvstrata.tiers.base import Job, JobResult, TierContext, TierStats
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.memory import MemoryTier
from tests.offload.cli.cli_world import run, run_json
from tests.tiers.pool.pool_world import own_shm, pool_dir
from tests.waiting import wait_until

STEPS = ["connect", "store", "look up", "load"]


def examine(entry: Mapping[str, Any], exit_code: int = 0) -> dict[str, dict[str, str]]:
    """The checks by name."""
    found = run_json("doctor", "--tier", json.dumps(entry), exit_code=exit_code)
    return {check["name"]: check for check in found["checks"]}


def picture(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything below the root, with its content."""
    return {
        str(path): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in root.rglob("*")
    }


def test_files(root: Path, paths: NamespacePaths) -> None:
    """Not even the books of the root are touched."""
    before = picture(root)
    checks = examine({"type": "fs", "root_dir": str(root), "max_bytes": "8MiB"})
    assert [*checks][-6:] == [*STEPS, "list", "delete"] and {*checks} >= {"options", "files"}
    assert all(checks[name]["status"] == "ok" for name in (*STEPS, "list", "delete"))
    assert checks["store"]["found"].endswith(" GB/s")
    assert checks["load"]["meaning"].startswith("a page of 2.0 MiB takes ")
    assert checks["list"]["found"] == "17 pages"
    assert picture(root) == before
    last = run("doctor", "--tier", json.dumps({"type": "fs", "root_dir": str(root)}))
    assert last.splitlines()[-1] == "this tier works here"


def test_roots_that_are_not_there(tmp_path: Path) -> None:
    roots = [str(tmp_path / "a"), str(tmp_path / "b" / "c")]
    checks = examine({"type": "fs", "root_dir": roots})
    assert checks["list"]["found"] == "17 pages" and os.listdir(tmp_path) == []


def test_a_pool(tmp_path: Path) -> None:
    with own_shm() as shm:
        checks = examine({"type": "pool", "name": "node", "max_bytes": "64MiB"})
        assert checks["list"]["found"] == "17 pages" and os.listdir(shm) == []
        assert checks["memory"]["found"] in ("small pages", "huge pages")
        checks = examine({"type": "pool", "name": "node", "max_bytes": "900TiB"}, exit_code=1)
        assert "do not fit" in checks["connect"]["meaning"] and os.listdir(shm) == []


def test_a_pool_that_an_engine_refuses() -> None:
    with own_shm() as shm:
        entry = {"type": "pool", "name": "node", "max_bytes": 1}
        checks = examine(entry, exit_code=1)
        assert checks["connect"]["meaning"].startswith("max_bytes: 1 B is too little")
        pool_dir(shm).mkdir()
        pool_dir(shm).chmod(0o777)
        checks = examine({**entry, "max_bytes": "64MiB"}, exit_code=1)
        assert "has mode 0777" in checks["connect"]["meaning"]
        assert os.listdir(shm) == [pool_dir(shm).name]


def test_a_budget_that_an_engine_refuses(tmp_path: Path) -> None:
    entry = {"type": "fs", "root_dir": str(tmp_path), "max_bytes": "1MiB"}
    checks = examine(entry, exit_code=1)
    assert checks["connect"]["meaning"].startswith("max_bytes: 1.0 MiB is too little")


def test_pages_of_this_process_alone() -> None:
    checks = examine({"type": "memory"})
    assert (checks["look up"]["status"], checks["look up"]["found"]) == ("warning", "missing")
    assert (checks["load"]["status"], checks["delete"]["found"]) == ("ok", "rejected")


class Keeps(MemoryTier):
    """One of somebody's own, that cannot delete."""

    def submit_reject(self, job: Job, *, distrust: bool) -> bool:
        return False


class Forgets(MemoryTier):
    """It says that it keeps pages, and does not."""

    def submit_store(self, job: Job) -> None:
        super().submit_store(job)
        self._pages.clear()


class Evicts(Forgets):
    """A store, and its disk is full by the time the other engine looks."""

    medium = "STORAGE"

    def stats(self) -> TierStats:
        return TierStats({"evicted_pages": 3}, {"budget": 2})


class Loses(Forgets):
    medium = "STORAGE"


class HasTails(MemoryTier):
    """It needs room behind each page, as those of vLLM's own manager do."""

    tail_bytes = 128

    def __init__(self, options: Mapping[str, Any], context: TierContext) -> None:
        super().__init__(options, context)
        region, (layout,) = context.region, context.layouts.values()
        assert region is not None and region.slot_bytes >= layout.nbytes + self.tail_bytes
        assert region.slot_bytes % 4096 == 0


class Lends(MemoryTier):
    """Others ask it for pages, and it asks them."""

    serves = True


class Spoils(MemoryTier):
    def submit_load(self, job: Job) -> None:
        super().submit_load(job)
        job.view(job.keys[0], job.slots[0])[:1] = b"x"


class Refuses(MemoryTier):
    def submit_store(self, job: Job) -> None:
        self._finished.append(JobResult(job.job_id, dict.fromkeys(job.keys, "no-space")))


@pytest.mark.parametrize(
    ("name", "step", "status", "words"),
    [
        (
            "Keeps",
            "delete",
            "warning",
            "34.0 MiB of pages that nobody reads stay until it evicts them",
        ),
        ("Forgets", "load", "problem", "1 of 1 pages: missing"),
        ("Loses", "look up", "problem", "another engine does not find what was stored"),
        ("Evicts", "look up", "problem", "no room: pages evicted again: "),
        ("HasTails", "delete", "ok", "what the tier does with pages that it rejects"),
        ("Lends", "store", "warning", "its pages come from other engines"),
        ("Spoils", "load", "problem", "a page came back with other bytes"),
        ("Refuses", "store", "problem", "1 of 1 pages: no-space"),
    ],
)
def test_a_class_of_ones_own(name: str, step: str, status: str, words: str) -> None:
    entry = {"type": name, "module_path": __name__}
    checks = examine(entry, exit_code=1 if status == "problem" else 0)
    assert [*checks][-1] == step and checks[step]["status"] == status
    assert words in checks[step]["meaning"]


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("{", "options", "this is no JSON"),
        ("[]", "options", "this is no object"),
        ('{"type": "disk"}', "options", "unknown type 'disk' (did you mean 'fs'?)"),
        ('{"type": "fs", "root": "/a"}', "options", "use root_dir"),
        ('{"type": "fs", "root_dir": "/dev/null/kv"}', "files", "is not a directory"),
    ],
)
def test_what_is_wrong(text: str, name: str, words: str) -> None:
    found = run_json("doctor", "--tier", text, exit_code=1)
    problem = found["checks"][-1]
    assert (problem["name"], problem["status"]) == (name, "problem")
    assert words in problem["meaning"]


def test_one_thing_at_a_time(root: Path) -> None:
    said = run("doctor", root, "--tier", '{"type": "memory"}', exit_code=2)
    assert "give one of PATH, --config, --tier and" in said


def test_one_line_for_each_check_where_there_is_no_terminal() -> None:
    entry = {"type": "Refuses", "module_path": __name__}
    lines = run("doctor", "--tier", json.dumps(entry), exit_code=1).splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["options", "connect", "store"]
    entry = {"type": "fs", "root_dir": "/dev/null/" + "x" * 100 + "/kv"}
    (line, *_) = run("doctor", "--tier", json.dumps(entry), exit_code=1).splitlines()[1:]
    assert line.startswith("problem  files ") and line.endswith("choose another directory")


# ---- interrupted ----

_HANGS = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, too
from kvstrata.offload.cli.doctor import probe
def hang(self, tier):
    print("stored", flush=True)
    time.sleep(600)
probe.Probe._look_up = hang
from kvstrata.offload.cli.main import main
main()
"""


@pytest.fixture
def doctor(root: Path) -> Iterator[subprocess.Popen[str]]:
    """One that has stored its pages, and hangs."""
    root.mkdir()
    words = [sys.executable, "-c", _HANGS, "doctor", "--tier"]
    entry = json.dumps({"type": "fs", "root_dir": str(root)})
    with subprocess.Popen(
        [*words, entry], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "stored\n"
        assert list(root.rglob("*.safetensors"))
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(doctor: subprocess.Popen[str], root: Path, number: int) -> None:
    doctor.send_signal(number)
    doctor.communicate()
    assert doctor.returncode != 0 and os.listdir(root) == []


def test_killed(doctor: subprocess.Popen[str], root: Path) -> None:
    """The next one there removes what it left; by then the I/O processes have ended."""
    doctor.kill()
    doctor.communicate()
    (left,) = os.listdir(root)
    assert left.startswith(".kvstrata-") and left.endswith(".tmp")
    entry = {"type": "fs", "root_dir": str(root)}
    wait_until(lambda: examine(entry) and os.listdir(root) == [])
