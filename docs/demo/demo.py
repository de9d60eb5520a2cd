"""kvstrata at work: one long text, three questions, asked cold, from CPU memory and from files.

Run it with `make demo`. It prints a table, writes `demo-report.json`, leaves the files in
`.cache/demo-kv/`, and exits 0 only if every answer is right and both hits were real.

The questions come first in their prompts, so the prompts share no prefix, and the GPU cache holds
only one of them: each question pushes the one before out.
"""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from server import BLOCK_SIZE, Answer, Server, kv_transfer_config, serve_args
from smollm2 import smollm2

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
MODEL = CACHE / "smollm2-135m"
KV_DIR = CACHE / "demo-kv"
REPORT = ROOT / "demo-report.json"

TEXT = (ROOT / "LICENSE").read_text()  # about 2,200 tokens
QUESTIONS = (
    "What must a person do who gives others a copy of the work?",
    "Who grants a patent license, and when does it end?",
    "Does the license permit the use of trademarks?",
)
ANSWER_TOKENS = 32

SERVE_ARGS = serve_args(max_model_len=2560)  # one prompt and its answer
KV_TRANSFER_CONFIG = kv_transfer_config("1GiB", KV_DIR)
MIN_SERVED = 0.9  # share of the prompt that a hit must serve
FILES_DEADLINE_S = 120

console = Console(highlight=False)


@dataclass(frozen=True)
class Row:
    """One pass over all questions."""

    name: str
    answers: list[Answer]
    offloaded_tokens: int  # of the cached tokens, those that came from kvstrata
    identical: bool  # the answers' tokens are those of the cold pass

    @property
    def prompt_tokens(self) -> int:
        return sum(answer.prompt_tokens for answer in self.answers)

    @property
    def cached_tokens(self) -> int:
        return sum(answer.cached_tokens for answer in self.answers)

    @property
    def ttft_s(self) -> float:
        return statistics.median(answer.ttft_s for answer in self.answers)


@contextmanager
def step(text: str) -> Iterator[Callable[[str], None]]:
    """Show that `text` is going on and for how long; yields a function that adds a detail."""
    started = time.monotonic()
    if console.is_terminal:
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(text, total=None)
            yield lambda detail: progress.update(task, description=f"{text}: {detail}")
    else:
        console.print(f"  ... {text}")
        yield lambda detail: None
    console.print(f"  [green]done[/] {text} [dim]{time.monotonic() - started:.1f} s[/]")


@contextmanager
def serving(log_name: str) -> Iterator[Server]:
    """A running server whose GPU cache and CPU tier are empty."""
    log = CACHE / log_name
    server = Server(MODEL, KV_TRANSFER_CONFIG, SERVE_ARGS, log)
    try:
        with step(f"starting vLLM with kvstrata (log: {log.relative_to(ROOT)})"):
            server.wait_until_ready()
            # The first request pays for more than its prompt; this one has no block in common with
            # the questions.
            server.ask("Hello!", max_tokens=4)
        yield server
    finally:
        with step("stopping vLLM, and with it the GPU cache and the CPU tier"):
            server.stop()


def run_pass(name: str, server: Server, cold: list[Answer] | None) -> Row:
    """Ask all questions in their order; `cold` are the answers to compare with."""
    before = server.offloaded_hits()
    answers = []
    for number, question in enumerate(QUESTIONS, start=1):
        with step(f"{name}: question {number} of {len(QUESTIONS)}"):
            answers.append(server.ask(f"{question}\n\n{TEXT}\n\n{question}", ANSWER_TOKENS))
        if cold is None:
            console.print(f"       [cyan]Q[/] {escape(question)}")
            console.print(f"       [cyan]A[/] {escape(' '.join(answers[-1].text.split()))} ...")
    expected = cold if cold is not None else answers
    identical = [a.token_ids for a in answers] == [a.token_ids for a in expected]
    return Row(name, answers, server.offloaded_hits() - before, identical)


def wait_for_files(cold: Row) -> None:
    """Wait until every full block of the prompts has its file, so that the next engine finds it."""
    wanted = sum((answer.prompt_tokens - 1) // BLOCK_SIZE for answer in cold.answers)
    deadline = time.monotonic() + FILES_DEADLINE_S
    with step("writing the files") as detail:
        while (found := sum(1 for _ in KV_DIR.rglob("*.safetensors"))) < wanted:
            if time.monotonic() > deadline:
                raise RuntimeError(f"only {found} of {wanted} pages were written to {KV_DIR}")
            detail(f"{found} of {wanted} pages")
            time.sleep(0.2)


def faults(rows: list[Row]) -> list[str]:
    """Say in plain sentences what is wrong with the passes; nothing if all is well."""
    cold, *hits = rows
    found = []
    if cold.cached_tokens:
        found.append(f"cold: {cold.cached_tokens} tokens came from a cache, so it was not cold.")
    for row in hits:
        for number, (got, want) in enumerate(zip(row.answers, cold.answers, strict=True), start=1):
            if got.token_ids != want.token_ids:
                found.append(f"{row.name}: question {number} has a WRONG answer: {got.text!r}")
                found.append(f"  instead of the cold run's: {want.text!r}")
            if got.cached_tokens < MIN_SERVED * got.prompt_tokens:
                served = f"{got.cached_tokens} of {got.prompt_tokens} prompt tokens"
                found.append(f"{row.name}: question {number} was served {served} from cache.")
        if row.offloaded_tokens < MIN_SERVED * row.prompt_tokens:
            found.append(f"{row.name}: only {row.offloaded_tokens} tokens came from kvstrata.")
    return found


def print_table(rows: list[Row]) -> None:
    """Print the passes, compared with the first one."""
    table = Table(
        title="SmolLM2-135M-Instruct: questions on this project's licence",
        caption=f"tokens: sum of {len(QUESTIONS)} questions; TTFT (time to first token): median",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("pass", no_wrap=True)
    for heading in ("prompt tokens", "from cache", "TTFT", "speed-up", "identical"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.prompt_tokens:,}",
            f"{row.cached_tokens:,} ({row.cached_tokens / row.prompt_tokens:.1%})",
            f"{row.ttft_s:.2f} s",
            f"{rows[0].ttft_s / row.ttft_s:.1f}x",
            "[green]yes[/]" if row.identical else "[bold red]NO[/]",
        )
    console.print(table)


def write_report(rows: list[Row], ok: bool) -> None:
    """Write `demo-report.json`; TTFT in seconds."""
    fields = ("name", "prompt_tokens", "cached_tokens", "ttft_s", "identical")
    content = {"rows": [{field: getattr(row, field) for field in fields} for row in rows], "ok": ok}
    REPORT.write_text(json.dumps(content, indent=2) + "\n")


def main() -> int:
    """Run the passes and return the exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # end as Ctrl-C does: the servers with us
        signal.signal(number, lambda *_: sys.exit(1))
    started = time.monotonic()
    REPORT.unlink(missing_ok=True)
    shutil.rmtree(KV_DIR, ignore_errors=True)
    CACHE.mkdir(exist_ok=True)
    with step("preparing SmolLM2-135M-Instruct (converted once)"):
        smollm2(MODEL)
    with serving("demo-server-1.log") as server:
        cold = run_pass("cold", server, cold=None)
        cpu_hit = run_pass("CPU-tier hit", server, cold.answers)
        wait_for_files(cold)
    with serving("demo-server-2.log") as server:
        file_hit = run_pass("file hit", server, cold.answers)

    rows = [cold, cpu_hit, file_hit]
    found = faults(rows)
    print_table(rows)
    write_report(rows, ok=not found)
    console.print(f"{time.monotonic() - started:.0f} s; report: {REPORT.relative_to(ROOT)}")
    if found:
        for fault in found:
            console.print(f"[bold red]error:[/] {escape(fault)}")
        console.print(
            f"The servers' logs are in {CACHE.relative_to(ROOT)}/; `kvstrata check "
            f"{KV_DIR.relative_to(ROOT)}` verifies the files. Please report this with both."
        )
        return 1
    files = sum(1 for _ in KV_DIR.rglob("*.safetensors"))
    console.print(f"{files} pages stay in {KV_DIR.relative_to(ROOT)}/ (see `kvstrata ls`).")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, FileNotFoundError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
