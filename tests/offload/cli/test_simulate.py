"""`kvstrata simulate`: from options to a table, or JSON."""

import errno
import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvstrata.offload.cli.main import app
from kvstrata.offload.simulate import chart
from kvstrata.offload.simulate.generate import MOONCAKE, Chats, generate
from kvstrata.offload.simulate.generate import main as print_trace

LARGE = '{"cpu_bytes_to_use": "64GiB", "eviction_policy": "lru"}'
TIERED = (
    '{"cpu_bytes_to_use": "1GiB", "eviction_policy": "lru", "store_threshold": 2, '
    '"secondary_tiers": [{"type": "fs", "root_dir": "/mnt/kv", "max_bytes": "40GiB"}]}'
)
ENDLESS = '{"cpu_bytes_to_use": "1GiB", "secondary_tiers": [{"type": "fs"}]}'


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("traces") / "chats.jsonl"
    path.write_text("\n".join(generate(MOONCAKE, Chats(chats=30))))
    return str(path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["simulate", *arguments, "--bytes-per-token", "128KiB"])


def test_a_table(trace: str) -> None:
    shown = run(trace, "--config", LARGE, "--config", TIERED, "--endurance", "1x3.84TB")
    assert shown.exit_code == 0, shown.output
    first, head, *rows = shown.stdout.splitlines()
    assert " requests in " in first and first.endswith("chunks of 512 tokens")
    for name in (
        "hit rate",
        "cpu",
        "fs",
        "gpu-cpu",
        "fs-cpu",
        "fs evicted pages",
        "endurance",
        "TTFT p90",
    ):
        assert f"  {name}" in head
    assert rows[0].startswith("cpu 64.0 GiB, lru ")
    assert rows[1].startswith("cpu 1.0 GiB, fs 40.0 GiB, lru, store_threshold 2 ")


def test_json(trace: str) -> None:
    shown = run(trace, "--config", TIERED, "--gpu", "4GiB", "--endurance", "7PB", "--json")
    found = json.loads(shown.stdout)
    (each,) = found["results"]
    assert found["trace"]["tokens"] == each["tokens"]
    assert [*each["hit_rates"]] == ["gpu", "cpu", "fs"]
    assert each["hit_rate"] == pytest.approx(sum(each["tokens_served"].values()) / each["tokens"])
    assert [*each["bytes_moved"]] == ["gpu-cpu", "cpu-gpu", "cpu-fs", "fs-cpu"]
    assert each["ttft_s"]["p50"] <= each["ttft_s"]["p90"] <= each["ttft_s"]["p99"]
    written = each["fs_bytes_written_per_day"]
    assert each["endurance_share"] == pytest.approx(written / (7e15 / 1825))
    assert each["price"] is None and found["cheapest"] is None


def test_a_sweep_names_the_cheapest(trace: str) -> None:
    arguments = (trace, "--sweep", "cpu=1GiB..16GiB,fs=0..32GiB", "--price", "cpu=4/GiB,fs=1/GiB")
    shown = run(*arguments, "--target-hit-rate", "0.4", "--json")
    found = json.loads(shown.stdout)
    assert len(found["results"]) == 5 * 5
    good = [each for each in found["results"] if each["hit_rate"] >= 0.4]
    assert found["cheapest"] == min(good, key=lambda each: each["price"])["name"]
    assert 0 < len(good) < 25
    shown = run(*arguments, "--target-hit-rate", "1", "--target-ttft", "0.001")
    assert shown.stdout.endswith("cheapest with a hit rate of 1 and a p90 TTFT of 0.001 s: none\n")


def test_policies_side_by_side(trace: str) -> None:
    shown = run(trace, "--config", LARGE, "--policies", "lru, arc,auto,s3-fifo,optimum", "--json")
    results = json.loads(shown.stdout)["results"]
    names = [each["name"].removeprefix("cpu 64.0 GiB, ") for each in results]
    assert names == ["lru", "arc", "auto", "s3-fifo", "optimum"]
    assert max(each["hit_rate"] for each in results) == results[-1]["hit_rate"]
    assert results[-1]["ttft_s"] == {}


def test_a_curve_is_drawn(trace: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "curve.png"
    shown = run(trace, "--sweep", "cpu=1GiB..4GiB", "--chart", str(path))
    assert shown.exit_code == 0, shown.output
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_curve_that_cannot_be_drawn_is_said_first(
    trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    wrong = run(trace, "--sweep", "cpu=1MiB", "--chart", str(tmp_path / "none/curve.png"))
    # not that no page fits, which is found when it is replayed
    assert wrong.exit_code == 2 and "a directory that exists" in wrong.stderr

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(chart, "draw", full)
    shown = run(trace, "--sweep", "cpu=1GiB", "--chart", str(tmp_path / "curve.png"))
    assert shown.exit_code == 2 and "curve.png': No space left" in shown.stderr
    assert "cpu 1.0 GiB" in shown.stdout  # what was replayed is not lost


def test_speeds_and_servers_count(trace: str) -> None:
    def p90(*more: str) -> float:
        shown = run(trace, "--config", LARGE, "--json", *more)
        (each,) = json.loads(shown.stdout)["results"]
        return float(each["ttft_s"]["p90"])

    assert p90("--speed", "prefill=1000,latency=0") > 5 * p90("--speed", "prefill=20000,gpu=50GB")
    assert p90("--speed", "prefill=1000", "--servers", "8") < p90("--speed", "prefill=1000")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "nothing is to be simulated; give --config or --sweep"),
        (("--config", "{"), "--config: '{' is wrong; give a JSON object"),
        (("--config", "[]"), "--config: '[]' is wrong; give a JSON object"),
        (("--config", "{}"), "cpu_bytes_to_use is missing"),
        (("--config", '{"cpu_bytes_to_use": "1GiB", "evict": 1}'), "unknown key 'evict'"),
        (("--config", LARGE, "--config", TIERED, "--sweep", "fs=0"), "give one --config at most"),
        (
            ("--sweep", "cpu=1MiB..8GiB"),
            "--sweep 'cpu=1MiB..8GiB': cpu_bytes_to_use: 1.0 MiB is less than one page takes",
        ),
        (
            ("--sweep", "cpu=8GiB", "--policies", "lru,belady"),
            "--policies: 'belady' is wrong; give some of auto, lru, arc, s3-fifo, optimum, or",
        ),
        (("--sweep", "cpu=8GiB", "--price", "cpu=4"), "price of cpu: '4' is wrong"),
        (("--config", TIERED, "--price", "cpu=4/GiB"), "--price: that of fs is missing"),
        (("--sweep", "cpu=8GiB,fs=0..1TiB", "--price", "fs=4/GiB"), "that of cpu is missing"),
        (("--config", ENDLESS, "--price", "cpu=4/GiB,fs=1/GiB"), "has no size; give it max_bytes"),
        (("--sweep", "cpu=8GiB", "--target-ttft", "1"), "give --price too"),
        (("--sweep", "cpu=8GiB", "--speed", "prefil=1"), "did you mean 'prefill'?"),
        (("--sweep", "cpu=8GiB", "--speed", "prefill=fast"), "prefill: 'fast' is wrong"),
        (("--sweep", "cpu=8GiB", "--speed", "gpu=25"), "gpu: '25' is wrong; give a unit too"),
        (("--sweep", "cpu=8GiB", "--gpu", "24"), "--gpu: '24' is wrong; give a unit too"),
        (("--sweep", "cpu=8GiB", "--tokens-per-chunk", "500"), "give a multiple of 512"),
    ],
)
def test_a_mistake_is_one_clear_error(trace: str, arguments: tuple[str, ...], said: str) -> None:
    shown = run(trace, *arguments)
    assert shown.exit_code == 2
    assert said in shown.stderr and shown.stderr.count("\n") == 1, shown.stderr
    assert shown.stdout == ""


def test_a_file_that_is_no_trace(tmp_path: Path) -> None:
    for more in (("--sweep", "cpu=8GiB"), ()):
        assert "No such file" in run(str(tmp_path / "none"), *more).stderr
    assert "Is a directory" in run(str(tmp_path)).stderr
    packed = tmp_path / "trace.jsonl.gz"
    packed.write_bytes(gzip.compress(b"{}"))
    assert (
        "trace.jsonl.gz: it is packed; give the file that gunzip makes" in run(str(packed)).stderr
    )
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text("no\n")
    shown = run(str(wrong), "--sweep", "cpu=8GiB")
    assert shown.exit_code == 2 and "wrong.jsonl: line 1: it is no JSON" in shown.stderr


def test_a_last_line_that_was_cut_is_noted(trace: str, tmp_path: Path) -> None:
    cut = tmp_path / "cut.jsonl"
    cut.write_text(f'{Path(trace).read_text()}\n{{"timestamp": 1')
    shown = run(str(cut), "--config", LARGE)
    assert shown.exit_code == 0 and shown.stdout == run(trace, "--config", LARGE).stdout
    assert "the last, is cut; it is left out" in shown.stderr and shown.stderr.count("\n") == 1


def test_a_recording_says_how_large_pages_are(tmp_path: Path) -> None:
    header = {"kvstrata_recording": 1, "tokens_per_chunk": 16, "bytes_per_chunk": 1 << 20}
    row = {"timestamp": 0, "input_length": 40, "output_length": 1, "hash_ids": ["a1", "b2"]}
    path = tmp_path / "own.jsonl"
    path.write_text(f"{json.dumps(header)}\n{json.dumps(row)}\n")
    shown = CliRunner().invoke(app, ["simulate", str(path), "--sweep", "cpu=1GiB", "--json"])
    assert json.loads(shown.stdout)["results"][0]["bytes_moved"]["gpu-cpu"] == 2 << 20
    header.pop("bytes_per_chunk")
    path.write_text(f"{json.dumps(header)}\n{json.dumps(row)}\n")
    shown = CliRunner().invoke(app, ["simulate", str(path), "--sweep", "cpu=1GiB"])
    assert shown.exit_code == 2 and "--bytes-per-token is missing" in shown.stderr


def test_traces_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_trace([MOONCAKE, "3", "7"])
    printed = capsys.readouterr().out.splitlines()
    assert printed == [*generate(MOONCAKE, Chats(chats=3, seed=7))]
    for wrong in ([], ["other"], [MOONCAKE, "x"], [MOONCAKE, "1", "2", "3"]):
        with pytest.raises(SystemExit, match="give mooncake or bailian"):
            print_trace(wrong)
