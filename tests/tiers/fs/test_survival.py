"""I/O processes whose engine is killed: what they were given is written, and soon they are gone."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvstrata.tiers.base import EPOCH, unseen
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.fs.tools.repair import examine
from kvstrata.tiers.machine.liveness import process_state
from kvstrata.tiers.process.survival import is_worthwhile, packets, watch
from kvstrata.tiers.testing import CONTEXT, load, make_data, make_key, store
from tests.waiting import wait_until

SIZE = CONTEXT.layouts[0].nbytes
PAGES = {make_key(n): make_data(n, SIZE) for n in range(40)}
HALF = make_key(1000)  # the engine was about to fill its page
FAULTY = str(Path(__file__).with_name("faulty_worker.py"))

# Has a page stored, then gives 40 others to I/O processes that hang, and fills half of one more.
ENGINE = textwrap.dedent("""
    import json, sys, time
    from dataclasses import replace
    from pathlib import Path
    from kvstrata.tiers.process import process
    from kvstrata.tiers.fs.tier import FsTier
    from kvstrata.tiers.testing import CONTEXT, Slots, make_data, make_job, make_key, store
    root, faulty, control, more = sys.argv[1:]
    process.COMMAND = (sys.executable, "-P", faulty, control)
    context = replace(CONTEXT, namespace={**CONTEXT.namespace, **json.loads(more)})
    options = {"root_dir": root, "n_read_threads": 2, "n_write_threads": 2, "max_bytes": "100MiB"}
    tier = FsTier(options, context)
    size = CONTEXT.layouts[0].nbytes
    assert not store(tier, {make_key(99): make_data(99, size)}).failed
    hang = Path(control).with_suffix(".hang")
    hang.rename(control)
    slots = Slots.make(41, size)
    for n in range(40):
        slots.view(n)[:] = make_data(n, size)
    tier.submit_store(make_job(2, [make_key(n) for n in range(40)], slots, CONTEXT))
    slots.view(40)[: size // 2] = make_data(1000, size)[: size // 2]
    assert not tier.drain(0.2)
    assert not any(group.queue for group in tier.processes[0]._groups)
    print(*tier.processes[0].pids(), flush=True)
    time.sleep(600)
""")


@dataclass
class Engine:
    """An engine whose I/O processes hang in their stores; see `ENGINE`."""

    process: subprocess.Popen[bytes]
    io: list[int]
    faults: Path

    def kill(self) -> None:
        """As vLLM does: all processes that descend from it, then itself."""
        if self.process.poll() is not None:
            return
        for pid in [*descendants(self.process.pid), self.process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def go_on(self) -> None:
        """What hung goes on."""
        write(self.faults, {})

    def gone(self) -> bool:
        """Whether no I/O process is left."""
        return all(process_state(pid)[0] in ("", "Z", "X") for pid in self.io)


def write(path: Path, faults: dict[str, Any]) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(faults))
    new.rename(path)


def descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from descendants(int(child))
            yield int(child)


@contextmanager
def engine(root: Path, folder: Path, outlive_s: float = 60.0, **namespace: Any) -> Iterator[Engine]:
    faults = folder / "faults.json"
    write(faults, {"outlive_s": outlive_s})
    write(faults.with_suffix(".hang"), {"pwritev": "hang"})
    arguments = [str(root), FAULTY, str(faults), json.dumps(namespace)]
    with subprocess.Popen(
        [sys.executable, "-c", ENGINE, *arguments], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        io = [int(word) for word in process.stdout.readline().split()]
        assert len(io) == 2, "the engine did not get as far as that"
        made = Engine(process, io, faults)
        try:
            yield made
        finally:
            made.kill()
            made.go_on()
            wait_until(made.gone)


def sound(root: Path) -> int:
    """How many page files there are; nothing may be wrong with them, or with the books."""
    done = examine(str(root), False)
    assert not done.findings
    return done.report.files


def test_what_was_given_is_written_when_the_engine_is_killed(
    root: Path, tmp_path: Path, paths: NamespacePaths, open_tier: Callable[..., FsTier]
) -> None:
    with engine(root, tmp_path) as killed:
        killed.kill()
        assert not killed.gone(), "they were killed with the engine"
        tier = open_tier()  # a restart at once, beside them
        assert not store(tier, {make_key(200): make_data(200, SIZE)}).failed
        assert load(tier, list(PAGES)[:4])[1] == {}
        killed.go_on()
        wait_until(killed.gone)
        wait_until(lambda: load(tier, list(PAGES))[1] == PAGES)
        assert not Path(paths.page(HALF)).exists(), "a page that nobody gave away"
        assert tier.shutdown(60.0)
    assert sound(root) == len(PAGES) + 2


def test_the_books_are_right_after_them(root: Path, tmp_path: Path) -> None:
    with engine(root, tmp_path) as killed:
        killed.kill()
        killed.go_on()
        wait_until(killed.gone)
        assert sound(root) == len(PAGES) + 1


def test_what_hangs_ends_in_time(
    root: Path, tmp_path: Path, open_tier: Callable[..., FsTier]
) -> None:
    with engine(root, tmp_path, outlive_s=0.5) as killed:
        killed.kill()
        wait_until(killed.gone)  # although the disk still hangs
        tier = open_tier()
        assert not store(tier, PAGES).failed
        assert load(tier, list(PAGES))[1] == PAGES


def test_stopped_ones_are_woken(root: Path, tmp_path: Path) -> None:
    with engine(root, tmp_path) as killed:
        for pid in killed.io:
            os.kill(pid, signal.SIGSTOP)
        killed.go_on()
        killed.kill()
        wait_until(killed.gone)
        assert sound(root) == len(PAGES) + 1


def test_the_first_sigterm_is_for_the_engine_and_the_second_ends_them(
    root: Path, tmp_path: Path
) -> None:
    with engine(root, tmp_path) as killed:
        for number in (signal.SIGTERM, signal.SIGINT):  # as systemd does, to all processes
            for pid in killed.io:
                os.kill(pid, number)
        killed.kill()
        assert not killed.gone()
        for pid in killed.io:
            wait_until(lambda pid=pid: not is_caught(pid, signal.SIGTERM))
            os.kill(pid, signal.SIGTERM)
        wait_until(killed.gone)  # although they had more to do


def is_caught(pid: int, number: int) -> bool:
    """Whether the process takes the signal itself."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return bool(int(fields["SigCgt"], 16) >> (number - 1) & 1)


def test_what_was_sent_is_read_although_the_engine_left_records_unread() -> None:
    engine, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        ours.send(b"a record")
        for packet in (b"1", b"2", b"3"):
            engine.send(packet)
        engine.close()
        assert list(packets(ours)) == [b"1", b"2", b"3"]


def test_what_was_sent_is_read_although_a_copy_of_the_engine_holds_the_socket() -> None:
    engine, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with engine, ours, subprocess.Popen([sys.executable, "-c", "pass"]) as dead:
        started = process_state(dead.pid)[1]
        dead.wait()
        engine.send(b"1")
        watch(dead.pid, started, ours)
        assert list(packets(ours)) == [b"1"]


@pytest.mark.parametrize("field", [{EPOCH: "1"}, {"weights": unseen("they are not files")}])
def test_files_that_nobody_could_read_are_not_written(
    root: Path, tmp_path: Path, field: dict[str, str]
) -> None:
    assert is_worthwhile(CONTEXT.namespace)
    assert not is_worthwhile(field)
    with engine(root, tmp_path, **field) as killed:
        os.kill(killed.io[0], signal.SIGSTOP)
        killed.process.kill()  # what descends from it goes with it
        killed.process.wait()
        wait_until(killed.gone)


def test_it_goes_on_once_its_family_is_left() -> None:
    """However long the process in between takes to end."""
    slow = textwrap.dedent("""
        import os, time
        from kvstrata.tiers.process.survival import leave_family
        fork, family = os.fork, os.getpid()
        def fork_slowly():
            child = fork()
            time.sleep(0.3 if child else 0.0)
            return child
        os.fork = fork_slowly
        leave_family()
        print(family, os.getppid())
    """)
    ran = subprocess.run([sys.executable, "-c", slow], capture_output=True, text=True, check=True)
    family, parent = ran.stdout.split()
    assert parent != family
