"""kvstrata at work: one long text, three questions, asked cold, from CPU memory and from files.

Run it with `make demo`. It prints a table, writes `demo-report.json`, leaves the files in
`.cache/demo-kv/`, and exits 0 only if every answer is right and both hits were real.
"""

from __future__ import annotations

import json
import shutil
import time

from passes import CACHE, MODEL, QUESTIONS, ROOT, SERVE_ARGS, Row, faults, run_pass
from rich import box
from rich.markup import escape
from rich.table import Table
from server import kv_transfer_config, serving
from show import console, end_with, step
from smollm2 import smollm2

KV_DIR = CACHE / "demo-kv"
REPORT = ROOT / "demo-report.json"
KV_TRANSFER_CONFIG = kv_transfer_config("1GiB", type="fs", root_dir=str(KV_DIR))
FILES_DEADLINE_S = 120


def wait_for_files(cold: Row) -> None:
    """Wait until every full block of the prompts has its file, so that the next engine finds it."""
    deadline = time.monotonic() + FILES_DEADLINE_S
    with step("writing the files") as detail:
        while (found := sum(1 for _ in KV_DIR.rglob("*.safetensors"))) < cold.pages:
            if time.monotonic() > deadline:
                raise RuntimeError(f"only {found} of {cold.pages} pages were written to {KV_DIR}")
            detail(f"{found} of {cold.pages} pages")
            time.sleep(0.2)


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
    started = time.monotonic()
    REPORT.unlink(missing_ok=True)
    shutil.rmtree(KV_DIR, ignore_errors=True)
    CACHE.mkdir(exist_ok=True)
    with step("preparing SmolLM2-135M-Instruct (converted once)"):
        smollm2(MODEL)
    with serving(MODEL, KV_TRANSFER_CONFIG, SERVE_ARGS, CACHE / "demo-server-1.log") as server:
        cold = run_pass("cold", server, cold=None)
        cpu_hit = run_pass("CPU-tier hit", server, cold.answers)
        wait_for_files(cold)
    with serving(MODEL, KV_TRANSFER_CONFIG, SERVE_ARGS, CACHE / "demo-server-2.log") as server:
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
    end_with(main)
