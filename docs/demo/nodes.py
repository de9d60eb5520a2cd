"""Two servers on two "nodes", and a tier that both reach: what one computed, the other loads.

Run it with `make demo-object`, `demo-valkey`, `demo-mooncake` or `demo-pool`. The nodes are two
processes with a CPU tier each; what is between them is a real server, started here, or shared
memory. It prints a table, exits 0 only if the second node loaded what the first had stored
and its answers are the same, and stops and removes all that it started.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from passes import CACHE, MODEL, QUESTIONS, ROOT, SERVE_ARGS, Row, faults, run_pass
from rich import box
from rich.markup import escape
from rich.table import Table
from server import Server, kv_transfer_config, serving
from show import console, end_with, step
from smollm2 import smollm2

from kvstrata.tiers.pool.tools import PoolKept, remove_pool

sys.path.append(str(ROOT))  # for the servers of the tests
from tests.tiers.mooncake.pool import Master, Peer, why_not
from tests.tiers.object.server import BUCKET, S3Server, credentials
from tests.tiers.object.server import server_binary as s3_binary
from tests.tiers.valkey.server import Server as ValkeyServer
from tests.tiers.valkey.server import server_binary as valkey_binary

POOL = "kvstrata-demo"
STORED_DEADLINE_S = 120


@contextmanager
def bucket(folder: Path) -> Iterator[dict[str, Any]]:
    """A bucket of SeaweedFS; its credentials are in the environment, as the tier wants them."""
    if (weed := s3_binary()) is None:
        raise RuntimeError("no server that speaks S3 is installed: run `make install`")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(credentials(folder))
    server = S3Server(weed, folder)
    try:
        yield {"url": f"s3://{BUCKET}/kv", "endpoint": server.endpoint}
    finally:
        server.close()


@contextmanager
def values(folder: Path) -> Iterator[dict[str, Any]]:
    """A Valkey server that evicts what was not loaded for long."""
    if valkey_binary() is None:
        raise RuntimeError("no Valkey server is installed: run `make install`")
    server = ValkeyServer(folder, "--maxmemory", "1gb", "--maxmemory-policy", "allkeys-lru")
    try:
        yield {"url": server.url}
    finally:
        server.kill()


@contextmanager
def pool(folder: Path) -> Iterator[dict[str, Any]]:
    """Shared memory; what a killed demo left of it goes first."""
    _remove_pool()
    try:
        yield {"name": POOL, "max_bytes": "1GiB"}
    finally:
        _remove_pool()


def _remove_pool() -> None:
    try:
        with suppress(FileNotFoundError):
            remove_pool(POOL)
    except PoolKept as error:  # by another demo
        raise RuntimeError(str(error)) from error


@contextmanager
def lent_memory(folder: Path) -> Iterator[dict[str, Any]]:
    """A Mooncake master, and a process that lends memory."""
    if why := why_not():
        raise RuntimeError(why)
    with ExitStack() as started:
        master = Master()
        started.callback(master.kill)
        started.callback(Peer(master, 2**29).kill)
        yield {"master": master.address}


# By the tier's type, what starts all that it needs and says the tier's options.
TIERS: dict[str, Callable[[Path], AbstractContextManager[dict[str, Any]]]] = {
    "object": bucket,
    "valkey": values,
    "mooncake": lent_memory,
    "pool": pool,
}


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
