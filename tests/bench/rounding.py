"""`python -m tests.bench.rounding`: how far pages of one key differ that are all right.

The same prompts are computed by engines that differ in what must not matter (tokens per step,
tensor-parallel size) and, for comparison, in what does (the base of RoPE). Each stores its pages in
files, and the files of equal keys are compared as audits do. The tolerances of
`offload/audit/comparison.py` come from this; docs/audit.md has the figures.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from kvstrata.kernels.bench.results.figures import append_csv, machine_line
from kvstrata.kernels.bench.results.tables import print_table
from kvstrata.offload.audit.comparison import Comparison, Elements, Verdict, compare
from tests.engine.driver import BLOCK, ROOT

# safetensors dtypes of the content, by vLLM's word for the model's
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class Figure(NamedTuple):
    """Errors of the pages of one engine against those of the first.

    Attributes:
        dtype: of the model and its KV cache.
        engine: in what it differs.
        pages: how many were compared.
        equal: how many had the same bits.
        different: how many an audit would refuse.
        median, largest: of the pages' largest relative errors of a row.
    """

    dtype: str
    engine: str
    pages: int
    equal: int
    different: int
    median: float
    largest: float


def engines(heads: int, tokens: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and `vllm.LLM` arguments, for a model with so many attention heads; the first is what
    the others are compared with."""
    yield "one step", {"max_num_batched_tokens": 4 * tokens}
    yield "steps of 128 tokens", {"max_num_batched_tokens": 128, "max_num_seqs": 1}
    yield "steps of 96 tokens", {"max_num_batched_tokens": 96, "max_num_seqs": 2}
    if heads % 2 == 0:
        yield "TP 2", {"max_num_batched_tokens": 4 * tokens, "tensor_parallel_size": 2}
    for factor in (1.01, 1.1, 10.0):
        name = f"RoPE base x {factor:g}"
        yield name, {"max_num_batched_tokens": 4 * tokens, "rope": factor}


def run(
    model: Path, folder: Path, dtype: str, prompts: list[list[int]], more: dict[str, Any]
) -> None:
    """Compute the prompts in an engine of its own, whose pages go to files in `folder`.

    Raises:
        RuntimeError: it failed; the message has the end of its log.
    """
    tp = more.get("tensor_parallel_size", 1)
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1" if tp == 2 else "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    folder.mkdir(parents=True)
    task = {
        "model": str(model.resolve()),
        "folder": str(folder),
        "dtype": dtype,
        "prompts": prompts,
        **more,
    }
    with open(folder / "log", "w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "tests.bench.rounding", "--engine"],
            cwd=ROOT,
            input=json.dumps(task),
            env=os.environ | settings,
            stdout=log,
            stderr=log,
            text=True,
        )
    if done.returncode:
        tail = "\n".join((folder / "log").read_text().splitlines()[-20:])
        raise RuntimeError(f"an engine failed; the end of its log:\n{tail}")


def serve() -> None:
    """The engine's process: the task comes from stdin."""
    from vllm import LLM, SamplingParams, TokensPrompt

    task = json.load(sys.stdin)
    folder, prompts = task.pop("folder"), task.pop("prompts")
    if (factor := task.pop("rope", None)) is not None:
        task["hf_overrides"] = _with_base(Path(task["model"]), factor)
    llm = LLM(
        **task,
        skip_tokenizer_init=True,
        enforce_eager=True,
        block_size=BLOCK,
        max_model_len=-(-(max(map(len, prompts)) + 1) // BLOCK) * BLOCK,
        kv_transfer_config={
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "spec_name": "KVStrataSpec",
                "cpu_bytes_to_use": "1GiB",
                "secondary_tiers": [{"type": "fs", "root_dir": folder}],
            },
        },
    )
    sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    llm.generate(
        [TokensPrompt(prompt_token_ids=each) for each in prompts], sampling, use_tqdm=False
    )
    engine = llm.llm_engine
    while engine.engine_core.engine_core.scheduler.has_requests():  # type: ignore[attr-defined]
        engine.step()


def _with_base(model: Path, factor: float) -> dict[str, Any]:
    """`hf_overrides` that multiply the base of RoPE."""
    config = json.loads((model / "config.json").read_text())
    if "rope_parameters" in config:
        parameters = config["rope_parameters"]
        base = parameters["rope_theta"] * factor
        return {"rope_parameters": {**parameters, "rope_theta": base}}
    return {"rope_theta": config.get("rope_theta", 10000.0) * factor}


def pages(folder: Path) -> dict[str, Path]:
    """The page files by the hash and the group of their keys."""
    return {f"{p.parent.name} {p.name}": p for p in folder.glob("*_r0/*/*_g*/*.safetensors")}


def compared(ours: Mapping[str, Path], theirs: Mapping[str, Path], dtype: str) -> list[Comparison]:
    """The comparisons of the pages that both have."""
    found = []
    for name in sorted(ours.keys() & theirs.keys()):
        one, elements = _read(ours[name], dtype)
        other, _ = _read(theirs[name], dtype)
        found.append(compare(one, other, elements))
    return found


def _read(path: Path, dtype: str) -> tuple[memoryview, list[Elements]]:
    """The content of a page file, and how it is to be read; the last axis of a tensor is a row."""
    data = memoryview(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:start]))
    elements = []
    for name in sorted(header.keys() - {"__metadata__"}):
        first, end = header[name]["data_offsets"]
        _, layers, rows, _ = shape = header[name]["shape"]
        row_bytes = (end - first) // math.prod(shape[:-1])
        elements.append(Elements(end - first, DTYPES[dtype], row_bytes, rows, layers, 2))
    return data[start:], elements


def measure(model: Path, root: Path, dtype: str, count: int, tokens: int) -> Iterator[Figure]:
    """All figures of one dtype."""
    choose = random.Random(1)
    config = json.loads((model / "config.json").read_text())
    vocabulary, heads = config["vocab_size"], config["num_attention_heads"]
    prompts = [choose.choices(range(10, vocabulary - 10), k=tokens) for _ in range(count)]
    first: dict[str, Path] = {}
    for number, (name, more) in enumerate(engines(heads, tokens)):
        print(f"measuring: {dtype}, {name}", file=sys.stderr)
        folder = root / f"{dtype}-{number}"
        run(model, folder, dtype, prompts, more)
        if not first:
            first = pages(folder)
            continue
        found = compared(first, pages(folder), dtype)
        verdicts = [each.verdict for each in found]
        errors = [each.error for each in found]
        counts = verdicts.count(Verdict.EQUAL), verdicts.count(Verdict.DIFFERENT)
        figure = Figure(*(dtype, name, len(found), *counts), statistics.median(errors), max(errors))
        print(f"    of {figure.pages} pages {figure.equal} equal, {figure.different} different")
        yield figure


def main(
    model: Annotated[Path | None, typer.Option(help="A checkpoint's folder.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Append the figures to this file.")] = None,
    dtype: Annotated[list[str], typer.Option(help=", ".join(DTYPES))] = ["float32", "bfloat16"],  # noqa: B006
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 3,
    tokens: Annotated[int, typer.Option(min=2 * BLOCK, help="Tokens of each.")] = 512,
    engine: Annotated[bool, typer.Option("--engine", hidden=True)] = False,
) -> None:
    """Measure by how much right pages differ, and how much wrong ones do."""
    if engine:
        serve()
        return
    if model is None:
        raise typer.BadParameter("give the folder of a checkpoint: --model")
    print(machine_line())
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        figures = [f for each in dtype for f in measure(model, root, each, prompts, tokens)]
    headings = ["dtype", "engine", "pages", "equal", "different", "median error", "largest"]
    rows = [[*map(str, f[:5]), f"{f.median:.2g}", f"{f.largest:.2g}"] for f in figures]
    print_table([headings, *rows], 2)
    if csv:
        append_csv(csv, figures)


if __name__ == "__main__":
    typer.run(main)
