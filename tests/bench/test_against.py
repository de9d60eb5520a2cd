"""`make bench-* AGAINST=...`: the ratio of each figure to the committed one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import against
from tests.docs.blocks import ROOT

BENCH = ROOT / "docs" / "bench"
HEAD = "machine,python,vllm,contestant,page_bytes,value,target"


def lines(*rows: str) -> list[str]:
    return [HEAD, *(f"a CPU,3.11,none,{row}" for row in rows)]


@pytest.mark.parametrize("path", sorted(BENCH.glob("*.csv")), ids=lambda path: path.name)
def test_each_committed_file_can_be_compared(path: Path) -> None:
    """A figure by itself is 1, whatever the file's columns."""
    text = path.read_text().splitlines()
    ratios = against.compare(text, text)
    assert len(ratios) == len({ratio.what for ratio in ratios}) > 10
    assert all(ratio.value in (1.0, None) for ratio in ratios)


def test_the_same_case_is_compared_and_no_other() -> None:
    now = lines("ours,4096,3,9", "theirs,4096,5,9", "ours,8192,7,9")
    then = lines("ours,4096,2,8", "ours,1024,1,8", "theirs,4096,0,8")
    assert against.compare(now, then) == [("ours, 4096", 3, 2), ("theirs, 4096", 5, 0)]
    assert [ratio.value for ratio in against.compare(now, then)] == [1.5, None]


def test_of_several_committed_lines_it_is_their_median() -> None:
    then = lines("ours,4096,1,", "ours,4096,4,", "ours,4096,2,")
    assert against.compare(lines("ours,4096,4,"), then) == [("ours, 4096", 4, 2)]


def run(then: Path, now: Path, script: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, against.__file__, str(then), str(now)]
    return subprocess.run([*command, "bash", "-c", script], capture_output=True, text=True)


def test_only_what_the_command_appended_counts(tmp_path: Path) -> None:
    then, now = tmp_path / "then.csv", tmp_path / "now.csv"
    then.write_text("\n".join([*lines("ours,4096,2,", "ours,8192,2,"), ""]))
    now.write_text("\n".join([*lines("ours,8192,1,"), ""]))
    done = run(then, now, f"echo measured; echo a CPU,3.11,none,ours,4096,3, >> {now}; exit 3")
    assert done.returncode == 3
    assert re.findall(r"^ +(\S+) .*  (ours.*)$", done.stdout, re.M) == [("1.50", "ours, 4096")]
    assert "here: a CPU" in done.stdout


def test_a_new_file_is_compared_whole(tmp_path: Path) -> None:
    then, now = tmp_path / "then.csv", tmp_path / "now.csv"
    then.write_text("\n".join([*lines("ours,4096,2,"), ""]))
    done = run(then, now, f"echo {HEAD} > {now}; echo a CPU,3.11,none,ours,4096,3, >> {now}")
    assert done.returncode == 0
    assert "1.50" in done.stdout


def test_nothing_to_compare(tmp_path: Path) -> None:
    then, now = tmp_path / "then.csv", tmp_path / "now.csv"
    then.write_text("\n".join([*lines("ours,4096,2,"), ""]))
    done = run(then, now, "true")
    assert (done.returncode, done.stderr) == (2, f"nothing of this is in {then}\n")


@pytest.mark.parametrize("text", [None, "", "a,b\n1,2\n"])
def test_a_wrong_file_is_told_before_anything_is_measured(text: str | None, tmp_path: Path) -> None:
    then = tmp_path / "then.csv"
    if text is not None:
        then.write_text(text)
    done = run(then, tmp_path / "now.csv", f"touch {tmp_path}/measured")
    assert done.returncode == 2
    assert done.stderr.startswith(f"AGAINST={then}: ")
    assert not (tmp_path / "measured").exists()


@pytest.mark.parametrize("name", ["fs", "tiers", "kernels", "manager", "eviction", "ttft"])
@pytest.mark.parametrize("python", [[], ["PYTHON=python3"]])
def test_make_passes_it_on(name: str, python: list[str]) -> None:
    target = [f"bench-{name}", f"AGAINST=docs/bench/{name}.csv"]
    done = subprocess.run(
        ["make", "--dry-run", *target, *python], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (measured,) = re.findall(
        r"^.* tests/bench/against\.py .*$", done.stdout.replace("\\\n", " "), re.M
    )
    assert f"against.py docs/bench/{name}.csv .bench/{name}.csv env " in measured
    assert f"--csv .bench/{name}.csv" in measured
