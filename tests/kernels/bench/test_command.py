"""The command without a GPU, its summary, and the model that it computes instead."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstrata.kernels.bench import cpu
from kvstrata.kernels.bench.__main__ import main
from kvstrata.kernels.bench.cost_model import (
    Prediction,
    load_speed,
    pieces,
    predict,
    stock_load_speed,
    store_speed,
)
from kvstrata.kernels.bench.models import MODELS
from kvstrata.kernels.bench.neighbours import GEMM
from kvstrata.kernels.bench.results.cases import (
    BESIDE,
    BOTH,
    CEILING,
    HOST,
    INDEXED,
    LOAD,
    OURS,
    PER_FRAGMENT,
    SHARE,
    SLOWDOWN,
    SPEED,
    STAGED,
    STORE,
    SUBMIT,
    Case,
    Result,
)
from kvstrata.kernels.bench.results.kernel_targets import TARGETS, held
from kvstrata.kernels.bench.results.report import plot, rows
from kvstrata.kernels.bench.results.tables import print_table
from kvstrata.kernels.bench.results.targets import summary

MIB = 1 << 20
LLAMA_8B, LLAMA_70B = MODELS[:2]
PNG = b"\x89PNG"


def a_result(contestant: str, metric: str, value: float, **changes: object) -> Result:
    case = Case(LLAMA_70B.name, "LBHNC", STORE, 1, 512, 320 * MIB, 8192)
    return Result(case._replace(**changes), contestant, metric, value, "GB/s")  # type: ignore[arg-type]


def test_the_command_without_a_gpu(tmp_path: Path) -> None:
    small = ["--repeat", "1", "--cpu-mib", "8", "--per-chunk", "1", "--layout", "LBNHC"]
    files = ["--csv", "kernels.csv", "--plot", "kernels.png"]
    ran = subprocess.run(
        [sys.executable, "-m", "kvstrata.kernels.bench", "--model", LLAMA_8B.name, *small, *files],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = ran.stdout.splitlines()
    assert [line for line in lines if line.startswith("no GPU here")]
    assert f"{LLAMA_8B.name}, LBNHC, chunks of 1, 4096 fragments of 512 B per page " in ran.stdout
    assert lines[-1].startswith("targets: ") and f" {len(TARGETS) - 2} not measured" in lines[-1]

    with (tmp_path / "kernels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"machine", "gpu", "driver", "torch", "triton"} <= rows[0].keys()
    assert {row["contestant"] for row in rows} == {cpu.OURS, cpu.MEMCPY}
    host = [row for row in rows if row["metric"] == HOST]
    assert len(host) == 2 * 2  # models, operations
    assert all(float(row["value"]) > 0 and row["unit"] == "us per slot" for row in host)
    # figures, operations, orders of blocks
    assert len(rows) - len(host) == 3 * 2 * 2 * len(cpu.SHAPES)
    assert "model" not in (tmp_path / "kernels.csv").read_text()
    assert (tmp_path / "kernels.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--model", "GPT-2", "Llama-3-8B"),
        ("--layout", "HBLNC", "LBHNC"),
        ("--blocks", "4", "16"),
        ("--repeat", "0", "less than 1"),
        ("--part", "6", "5"),
        ("--csv", "/nowhere/x.csv", "no directory /nowhere"),
        ("--plot", "x.xyz", ".png"),
    ],
)
def test_a_wrong_option_is_refused_with_what_is_right(
    option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([option, value])
    out, err = capsys.readouterr()
    assert said in err.splitlines()[-1] and not out


def test_what_a_model_says_has_a_column_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    results = [a_result(OURS, SPEED, 51.5), a_result(OURS, SHARE, 0.97)]
    prediction = Prediction("a case", "model: speed", 13.2, "GB/s")
    print_table(rows(results, [prediction]), 2)
    heading, measured, model = capsys.readouterr().out.splitlines()
    at = heading.index(OURS) + len(OURS), heading.index("model") + len("model")
    assert measured[: at[0]].endswith(" 51.50 (0.97)") and not measured[at[0] :].strip()
    assert model[: at[1]].endswith(" 13.20") and "13" not in model[: at[0]]


def test_the_plot_of_a_gpu_needs_no_complete_run(tmp_path: Path) -> None:
    links = [Result(Case("", "", op), CEILING, SPEED, 55.0, "GB/s") for op in (STORE, LOAD, BOTH)]
    small = a_result(PER_FRAGMENT, SPEED, 1.0, nbytes=MIB)
    plot([*links, a_result(OURS, SPEED, 51.5), small], [], tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").read_bytes().startswith(PNG)


def test_the_summary_names_what_was_met_missed_and_not_measured() -> None:
    results = [
        a_result(STAGED, SHARE, 0.96),
        a_result(STAGED, SHARE, 0.5, nbytes=MIB),  # too small to count
        a_result(OURS, SHARE, 0.5),  # not staged, and not both
        a_result(OURS, SPEED, 30.0),
        a_result(PER_FRAGMENT, SPEED, 13.0),
        a_result(OURS, SUBMIT, 3.0),
        a_result(PER_FRAGMENT, SUBMIT, 65.0),
        a_result(OURS, SLOWDOWN, 1.02, operation=GEMM),
        a_result(OURS, BESIDE, 40.0, operation=GEMM),
        a_result(OURS, SLOWDOWN, 1.09, operation=GEMM, model="other"),
        a_result(OURS, BESIDE, 40.0, operation=GEMM, model="other"),
        a_result(OURS, SLOWDOWN, 1.5, operation=GEMM, model="nothing moved"),
        a_result(OURS, BESIDE, 0.0, operation=GEMM, model="nothing moved"),
    ]
    line = summary(held(results))
    assert "\n" not in line
    assert "2 met (staged, of the ceiling: 0.96 >= 0.95, the worst of 1 case; CPU submit" in line
    assert "against per-fragment: 0.05 <= 0.1, the worst of 1 case)" in line
    assert (
        "2 missed (Llama-3-70B TP8 LBHNC, against per-fragment >= 3 in 1 of 1, worst: 2.31" in line
    )
    assert "GEMM beside a transfer <= 1.03 in 1 of 2, worst: 1.09 other" in line
    assert f"{len(TARGETS) - 4} not measured (both at once" in line


def test_the_best_baseline_is_what_counts() -> None:
    ours = a_result(OURS, SPEED, 50.0, model=LLAMA_8B.name)
    others = [
        a_result(name, SPEED, value, model=LLAMA_8B.name)
        for name, value in ((PER_FRAGMENT, 40.0), (INDEXED, 52.0), (CEILING, 55.0))
    ]
    assert "Llama-3-8B TP1, against the best baseline >= 1 in 1 of 1, worst: 0.96" in summary(
        held([ours, *others])
    )


def test_the_model_says_what_was_published_and_not_more_than_the_link() -> None:
    assert 12 <= store_speed(8 << 10) <= 15
    assert store_speed(128 << 10) == pytest.approx(54)
    assert store_speed(64 << 20) == 54
    assert store_speed(64) < 64 / 0.5e-6 / 1e9  # the descriptor alone
    assert all(4 <= load_speed(kib << 10) <= 7 for kib in (4, 8, 16, 24))
    assert 40 <= load_speed(28 << 10) <= 44 and load_speed(64 << 10) == 51
    assert load_speed(64 << 20) == 54 and load_speed(64) < 0.1
    assert stock_load_speed(8 << 10) == 54 and stock_load_speed(28 << 10) == load_speed(28 << 10)


@pytest.mark.parametrize(
    ("model", "layout", "per_chunk", "count", "nbytes"),
    [
        (LLAMA_8B, "LBHNC", 1, 32 * 8, 8192),  # a layer's head
        (LLAMA_8B, "LBNHC", 4, 4 * 32 * 8 * 16, 512),  # a token of it
        (LLAMA_8B, "BHLNC", 1, 1, 2 * MIB),  # the page itself
        (LLAMA_70B, "LBNHC", 1, 80, 8192),  # one head: its tokens are neighbours
        (MODELS[3], "LBHNC", 16, 16 * 61, 64 * 576 * 2),
        (MODELS[4], "LBHNC", 1, 2 * 12 * 8, 4096),  # both groups
    ],
)
def test_the_model_counts_fragments_of_real_plans(
    model: object, layout: str, per_chunk: int, count: int, nbytes: int
) -> None:
    found = pieces(model, layout, per_chunk)  # type: ignore[arg-type]
    assert (found.fragments, found.mean_bytes) == (count, nbytes)


def test_every_line_of_the_model_says_so() -> None:
    predictions = list(predict(MODELS, ["LBHNC", "BHLNC"], [1, 4]))
    # speeds of stores, loads, and stock's, and the CPU's time
    assert len(predictions) == len({p[:2] for p in predictions}) == 4 * len(MODELS) * 2 * 2
    assert all(p.metric.startswith("model: ") for p in predictions)
