"""A server that is told to end right after an answer: which pages are on the disk?"""

import os
import signal
from pathlib import Path

import pytest

from kvstrata.tiers.fs.tools.repair import examine
from tests.engine.driver import connector, prompt, serving
from tests.waiting import wait_until

pytestmark = pytest.mark.vllm

PAGES = 20  # of a prompt of 640 tokens in blocks of 32
FIRST, SECOND = (prompt(seed, 640) for seed in range(2))


def sound(root: Path) -> int:
    """How many page files there are; nothing may be wrong with them, or with the books."""
    done = examine(str(root), False)
    assert not done.findings
    return done.report.files


def test_a_polite_stop_loses_nothing_and_a_sudden_one_only_what_was_not_handed_over(
    llama: Path, tmp_path: Path
) -> None:
    root = tmp_path / "kv"
    config = connector(secondary_tiers=[{"type": "fs", "root_dir": str(root)}])
    with serving(
        llama,
        tmp_path / "polite.log",
        kv_transfer_config=config,
        arguments=["--shutdown-timeout=15"],
    ) as server:
        server.ask(FIRST, max_tokens=1)
        server.terminate()
    assert "--shutdown-timeout is 0" not in server.log.read_text()
    assert sound(root) == PAGES

    with serving(llama, tmp_path / "sudden.log", kv_transfer_config=config) as server:
        log = server.log.read_text()
        assert "--shutdown-timeout is 0" in log and "--shutdown-timeout 15" in log
        assert server.ask(FIRST, max_tokens=1)["cached"] > 0
        stopped = server.io_processes()
        assert len(stopped) == 2
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        server.ask(SECOND, max_tokens=1)
        wait_until(lambda: _given(server.metrics()) >= PAGES)
        assert sound_pages(root) == PAGES, "the I/O processes are stopped"
        server.terminate()  # the engine is killed at once, and they go on
    assert sound(root) == 2 * PAGES


def sound_pages(root: Path) -> int:
    return len(list(root.glob("*_r0/*/*/*.safetensors")))


def _given(metrics: str) -> float:
    """Pages that the engine has stored, and given to its tier."""
    lines = [line for line in metrics.splitlines() if 'event="stored_pages"' in line]
    return sum(float(line.split()[-1]) for line in lines)
