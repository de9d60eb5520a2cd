"""Two servers on two "nodes", and a tier that both reach: what one computed, the other loads.

Run it with `make demo-object`, `demo-valkey`, `demo-mooncake` or `demo-pool`. The nodes are two
processes with a CPU tier each; what is between them is a real server, started here, or shared
memory. It prints a table, exits 0 only if the second node loaded what the first had stored
and its answers are the same, and stops and removes all that it started.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from media import TIERS
from passes import CACHE, MODEL, QUESTIONS, ROOT, SERVE_ARGS, Row, faults, run_pass
from rich import box
from rich.markup import escape
from rich.table import Table
from server import Server, kv_transfer_config, serving
from show import console, end_with, step
from smollm2 import smollm2

STORED_DEADLINE_S = 120


def wait_until_stored(server: Server, pages: int) -> int:
    """Wait until the tier has so many pages of the server's; how many it has."""
    deadline = time.monotonic() + STORED_DEADLINE_S
    with step("storing") as detail:
        while (stored := server.tier_pages("cascaded_pages")) < pages:
            if time.monotonic() > deadline:
                raise RuntimeError(f"only {stored} of {pages} pages were stored; see {server.log}")
            detail(f"{stored} of {pages} pages")
            time.sleep(0.2)
    return stored


def print_table(tier: str, rows: list[Row], stored: list[int], hit: list[int]) -> None:
    """Print what each node stored and loaded, compared with the first one."""
    table = Table(
        title=f"SmolLM2-135M-Instruct on two nodes with a tier between them: {tier}",
        caption=f"prompts of {len(QUESTIONS)} questions; TTFT (time to first token): median",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("node", no_wrap=True)
    for heading in ("tokens", "pages stored", "pages hit", "TTFT", "speed-up", "identical"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row, stored_here, hit_here in zip(rows, stored, hit, strict=True):
        table.add_row(
            row.name,
            f"{row.prompt_tokens:,}",
            f"{stored_here:,}",
            f"{hit_here:,}",
            f"{row.ttft_s:.2f} s",
            f"{rows[0].ttft_s / row.ttft_s:.1f}x",
            "[green]yes[/]" if row.identical else "[bold red]NO[/]",
        )
    console.print(table)


def run(tier: str) -> list[str]:
    """Ask both nodes, print the table, and say what is wrong, if anything is."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="kvstrata-demo-")))
        with step(f"starting what the {tier} tier needs"):
            options = stack.enter_context(TIERS[tier](folder))
        config = kv_transfer_config("512MiB", type=tier, **options)
        nodes, rows, stored, hit = [], [], [], []
        for number in (1, 2):  # the first goes on to live beside the second
            log = CACHE / f"demo-{tier}-node-{number}.log"
            nodes.append(stack.enter_context(serving(MODEL, config, SERVE_ARGS, log)))
            before = [nodes[-1].tier_pages(event) for event in ("cascaded_pages", "promoted_hits")]
            cold = rows[0].answers if rows else None
            rows.append(run_pass(f"node {number}", nodes[-1], cold))
            if cold is None:
                wait_until_stored(nodes[-1], before[0] + rows[0].pages)
            stored.append(nodes[-1].tier_pages("cascaded_pages") - before[0])
            hit.append(nodes[-1].tier_pages("promoted_hits") - before[1])
    print_table(tier, rows, stored, hit)
    found = faults(rows)
    if hit[1] < rows[1].pages:
        found.append(f"node 2: {hit[1]} of {rows[1].pages} pages came from the {tier} tier.")
    return found


def main() -> int:
    """Run the demo of the tier that the command line names; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tier", choices=TIERS)
    tier: str = parser.parse_args().tier
    started = time.monotonic()
    CACHE.mkdir(exist_ok=True)
    with step("preparing SmolLM2-135M-Instruct (converted once)"):
        smollm2(MODEL)
    found = run(tier)
    for fault in found:
        console.print(f"[bold red]error:[/] {escape(fault)}")
    where = f"; the nodes' logs are in {CACHE.relative_to(ROOT)}/" if found else ""
    console.print(f"{time.monotonic() - started:.0f} s{where}")
    return 1 if found else 0


if __name__ == "__main__":
    end_with(main)
