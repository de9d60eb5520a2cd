"""Two servers, one directory, and room in it for half of what they are asked about.

Run it with `make demo-shared MINUTES=10`. Both answer questions about the same documents in random
order, so each finds pages that the other stored, and both evict all the time. It watches the
directory, compares every answer with the first one of its kind, and exits 0 only if no answer
differed, nothing failed and the directory never grew above the budget by more than its slack
(docs/budget.md). It writes `demo-shared-report.json`.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from server import BLOCK_SIZE, Answer, Server, kv_transfer_config, serve_args
from smollm2 import smollm2

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
MODEL = CACHE / "smollm2-135m"
KV_DIR = CACHE / "shared-kv"
REPORT = ROOT / "demo-shared-report.json"

WORDS = (ROOT / "LICENSE").read_text().split()
DOCUMENTS = 20
DOCUMENT_WORDS = 250  # about 400 tokens
ANSWER_TOKENS = 8
# float32: 30 layers, 3 heads, keys and values of 64 elements; and the file's header
FILE_BYTES = BLOCK_SIZE * 30 * 3 * 2 * 64 * 4 + 4096
PAGES_EACH = 12  # full blocks of a prompt, about
BUDGET = DOCUMENTS * PAGES_EACH * FILE_BYTES // 2
SERVE_ARGS = serve_args(max_model_len=768)  # so that the tiers are asked for the next prompt
# the CPU tier holds some prompts, so that most must come from files
KV_TRANSFER_CONFIG = kv_transfer_config("96MiB", type="fs", root_dir=str(KV_DIR), max_bytes=BUDGET)
SLACK = 2**24  # of `max_bytes`: docs/budget.md, "What is promised"
# What two servers that evict each other's files may see, and recompute.
EXPECTED_FAILURES = {"missing", "checksum", "key"}

console = Console(highlight=False)


class Watch:
    """Measures the directory, as `du` does, until it is stopped."""

    def __init__(self) -> None:
        self.most_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            sizes: dict[int, int] = {}
            for directory, _, names in os.walk(KV_DIR):
                for path in (directory, *(os.path.join(directory, name) for name in names)):
                    with suppress(FileNotFoundError):
                        found = os.lstat(path)
                        sizes[found.st_ino] = 512 * found.st_blocks
            self.most_bytes = max(self.most_bytes, sum(sizes.values()))


class Client:
    """Asks one server about random documents until the time is over."""

    def __init__(self, server: Server, seed: int, end: float, first: dict[int, Answer]) -> None:
        self.answers: list[Answer] = []
        self.wrong: list[str] = []
        self.error: Exception | None = None
        self._chance = random.Random(seed)
        self._arguments = server, end, first
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        server, end, first = self._arguments
        try:
            while time.monotonic() < end:
                number = self._chance.randrange(DOCUMENTS)
                start = number * 60
                words = (WORDS * 2)[start : start + DOCUMENT_WORDS]
                answer = server.ask(f"Document {number}: {' '.join(words)}", ANSWER_TOKENS)
                self.answers.append(answer)
                expected = first.setdefault(number, answer)
                if answer.token_ids != expected.token_ids:
                    self.wrong.append(f"document {number}: {answer.text!r}, not {expected.text!r}")
        except Exception as error:  # an engine that died must end the run, and be reported
            self.error = error


def failures(server: Server) -> dict[str, int]:
    """Failures of the filesystem tier so far, by cause."""
    url = f"http://127.0.0.1:{server.port}/metrics"
    with urllib.request.urlopen(url, timeout=30) as response:
        metrics = response.read().decode()
    found = re.findall(
        r'^kvstrata_tier_failures_total\{.*?cause="([^"]+)".*?\} (\S+)', metrics, re.M
    )
    return {cause: int(float(count)) for cause, count in found if float(count)}


def errors_in(number: int) -> list[str]:
    """The errors that a server has logged."""
    log = (CACHE / f"demo-shared-{number}.log").read_text(errors="replace")
    return [line for line in log.splitlines() if re.search(r"\bERROR\b", line)]


def run(minutes: float) -> dict[str, object]:
    """Serve, ask and watch for so long; the report."""
    shutil.rmtree(KV_DIR, ignore_errors=True)
    KV_DIR.mkdir(parents=True)
    smollm2(MODEL)
    with ExitStack() as stack:
        servers = []
        for number in (1, 2):
            log = CACHE / f"demo-shared-{number}.log"
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str((number - 1) % (os.cpu_count() or 1))
            servers.append(Server(MODEL, KV_TRANSFER_CONFIG, SERVE_ARGS, log))
            stack.callback(servers[-1].stop)
        for server in servers:
            server.wait_until_ready()
        console.print(f"two servers answer for {minutes:g} minutes ...")
        watch = Watch()
        stack.callback(watch.stop)
        end = time.monotonic() + 60 * minutes
        first: dict[int, Answer] = {}
        clients = [Client(server, seed, end, first) for seed, server in enumerate(servers)]
        for client in clients:
            client.thread.join()
        causes = [failures(server) for server in servers]
        hits = [server.offloaded_hits() for server in servers]
        # vLLM's API server may log one of its own when it ends the engine under it
        errors = [line for number in (1, 2) for line in errors_in(number)]
    answers = [answer for client in clients for answer in client.answers]
    return {
        "minutes": minutes,
        "answers": len(answers),
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "tokens_from_kvstrata": sum(hits),
        "wrong_answers": [text for client in clients for text in client.wrong],
        "errors": [
            *(repr(client.error) for client in clients if client.error),
            *errors,
        ],
        "tier_failures": causes,
        "budget_bytes": BUDGET,
        "most_bytes": watch.most_bytes,
    }


def main(minutes: Annotated[float, typer.Option(help="How long the servers answer.")] = 10) -> None:
    """Run, report, and exit with 1 if anything was wrong."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    CACHE.mkdir(exist_ok=True)
    report = run(minutes)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    for name, value in report.items():
        console.print(f"  {name}: {escape(str(value))}")
    strange = [cause for causes in report["tier_failures"] for cause in causes]
    sound = (
        not report["wrong_answers"]
        and not report["errors"]
        and set(strange) <= EXPECTED_FAILURES
        and report["most_bytes"] <= BUDGET + SLACK
        and report["tokens_from_kvstrata"] > 0
    )
    console.print("[green]all well[/]" if sound else "[bold red]something was wrong[/]")
    raise typer.Exit(0 if sound else 1)


if __name__ == "__main__":
    typer.run(main)
