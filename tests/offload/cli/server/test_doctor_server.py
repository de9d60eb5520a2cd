"""`kvstrata doctor --server`: what is printed, and the exit codes."""

import json
import subprocess
import sys

import pytest

from kvstrata.offload.metering import names as n
from tests.offload.cli.cli_world import outcome, run, run_json
from tests.offload.cli.server.server_world import FakeServer, Metrics, healthy, started

NOW = ("--for", "0s")


def test_nothing_is_wrong() -> None:
    with FakeServer(healthy().text()) as server:
        assert run("doctor", "--server", server.url, *NOW) == (
            f"{server.url} (llama): nothing is wrong\n"
        )
        found = run_json("doctor", "--server", server.url, *NOW)
    one = {"url": server.url, "engine": "0", "model": "llama", "findings": []}
    assert found == {"ok": True, "servers": [one], "across": []}


def test_what_happens_between_the_reads_is_seen() -> None:
    sick = healthy().count(n.QUARANTINED, 1, tier="fs", cause="checksum")
    with FakeServer(healthy().text(), sick.text()) as server:
        shown = run("doctor", "--server", server.url, *NOW, exit_code=1)
    title, line = shown.splitlines()
    assert title == f"{server.url} (llama): 1 thing is wrong"
    assert line.startswith("  ! quarantined pages, fs: 1 pages were put aside")
    assert " they were computed instead. Look at the disk (smartctl, dmesg)" in line
    assert line.endswith(".")


def test_a_server_that_just_started() -> None:
    with FakeServer(started(Metrics()).text()) as server:
        shown = run("doctor", "--server", server.url, *NOW)
    title, line = shown.splitlines()
    assert title.endswith(": nothing is wrong")
    assert line.startswith("  - too little traffic, engine: Requests needed 0 chunks")


def test_before_the_first_request_nothing_is_judged() -> None:
    fresh = "# TYPE vllm:x gauge\n# TYPE kvstrata_info gauge\n"
    with FakeServer(fresh) as server:
        code, out, err = outcome("doctor", "--server", server.url, *NOW)
    assert (code, out) == (2, "")
    assert err.startswith(f"kvstrata: {server.url} has told nothing of its tiers yet")
    assert "send it a request" in err
    with FakeServer(fresh, started(Metrics()).text()) as server:
        assert "too little traffic" in run("doctor", "--server", server.url, *NOW)


def test_servers_that_cannot_share_and_engines_of_one() -> None:
    one = started(Metrics(), hashing="sha256:aa")
    texts = [started(Metrics(engine=k), "b", "xxhash:bb").text() for k in ("0", "1")]
    lines = dict.fromkeys(line for text in texts for line in text.splitlines())
    two = "\n".join(lines) + "\n"
    with FakeServer(one.text()) as first, FakeServer(two) as second:
        arguments = ("doctor", "--server", first.url, "--server", second.url, *NOW)
        shown = run(*arguments, exit_code=1)
        found = run_json(*arguments, exit_code=1)
    assert f"{second.url} engine 1 (llama): nothing is wrong" in shown
    assert "all of them together: 1 thing is wrong\n  ! hash seeds differ, llama: " in shown
    assert [(each["url"], each["engine"]) for each in found["servers"]] == [
        (first.url, "0"),
        (second.url, "0"),
        (second.url, "1"),
    ]
    (across,) = found["across"]
    assert across.keys() == {"fault", "about", "found", "remedy", "wrong"}


def test_names_of_a_server_do_not_control_the_terminal() -> None:
    evil = healthy().gauge(n.DISTRUSTED, 1, tier="\x1b[31mfs")
    with FakeServer(evil.text()) as server:
        shown = run("doctor", "--server", server.url, *NOW, exit_code=1)
    assert "\x1b" not in shown and "\\x1b[31mfs" in shown


def test_what_cannot_be_read() -> None:
    code, out, err = outcome("doctor", "--server", "http://127.0.0.1:1", *NOW)
    assert (code, out) == (2, "") and err.startswith("kvstrata: http://127.0.0.1:1 does not answer")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("/tmp", "--server", "x"), "give one of PATH"),
        (("--for", "3s"), "--for goes with --server"),
        (("--server", "x", "--for", "3"), "'3' is no time"),
    ],
)
def test_wrong_options(arguments: tuple[str, ...], says: str) -> None:
    assert says in " ".join(run("doctor", *arguments, exit_code=2).split())


def test_it_loads_neither_vllm_nor_torch() -> None:
    script = """
import sys
from typer.testing import CliRunner
from kvstrata.offload.cli.main import app
CliRunner().invoke(app, ["doctor", "--server", "127.0.0.1:1"])
assert "prometheus_client" in sys.modules
print(*sorted({"torch", "triton", "vllm", "textual"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_keys_of_the_json_are_of_every_finding() -> None:
    with FakeServer(started(Metrics()).text()) as server:
        (one,) = json.loads(run("doctor", "--server", server.url, *NOW, "--json"))["servers"]
    (told,) = one["findings"]
    assert told["fault"] == "too little traffic" and told["wrong"] is False
