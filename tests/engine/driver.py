"""Real vLLM engines for the tests: in a process of their own, or as a server."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.sessions import session

MARK = "@@kvstrata "
_OF_THE_SUITE = ("TRITON_INTERPRET", "VLLM_LOGGING_LEVEL")  # set where its modules are imported
ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 600.0  # a start takes 15 to 40 s where the machine has nothing else to do
# Tells this run's engines from others that may run on the machine.
RUN = f"test-{os.getpid()}"
_numbers = itertools.count()
Prompt = str | Sequence[int]  # a text, or token ids
BLOCK = 32  # tokens per block of the engines that use vLLM's CPU attention
GPU_BLOCKS = 24  # few, so that prompts push each other out


def prompt(seed: int, length: int = 320) -> str:
    """A text of `length` tokens that differs from the first token on between seeds."""
    choose = random.Random(seed)
    return "".join(choose.choice("abcdefghijklmnopqrstuvwxyz ,.") for _ in range(length))


def connector(**extra: Any) -> dict[str, Any]:
    """`--kv-transfer-config` with KVStrataSpec and a CPU tier of 64 MiB.

    A filesystem tier leaves nothing free: the default floor is a share of the machine's disk, of
    whose fullness no test may depend.
    """
    for entry in extra.get("secondary_tiers", []):
        if entry.get("type") == "fs":
            entry.setdefault("min_free_bytes", 0)
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "engine_id": f"{RUN}-{next(_numbers)}",
        "kv_connector_extra_config": {
            "spec_name": "KVStrataSpec",
            "cpu_bytes_to_use": "64MiB",
            **extra,
        },
    }


def engine_environment(tp: int = 1) -> dict[str, str]:
    """The environment a user's engine has: none of the test suite's settings.

    One thread per worker: on a busy machine two wait for each other most of the time. Two workers
    run on the first two of the cores that this process may use, or on the only one.
    """
    cores = sorted(os.sched_getaffinity(0))
    env = {k: v for k, v in os.environ.items() if k not in _OF_THE_SUITE}
    env.update(
        HF_HUB_OFFLINE="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND=f"{cores[0]}|{cores[:2][-1]}" if tp == 2 else "nobind",
        OMP_NUM_THREADS="1",
        VLLM_NO_USAGE_STATS="1",
        PYTHONPATH=str(ROOT),
    )
    return env


def vllm_wants_numa_nodes() -> bool:
    """From 0.33 on, the CPU worker of a data-parallel replica fails where there is no NUMA node for
    each, unless it is told to make them up of the cores."""
    import vllm

    return bool(vllm.__version_tuple__ >= (0, 33))


def region_files() -> list[str]:
    """The page regions in /dev/shm of this run's engines."""
    return sorted(path.name for path in Path("/dev/shm").glob(f"kvstrata_*_{RUN}-*"))


class Engine:
    """An engine in a process of its own, without a server.

    Args:
        model: checkpoint folder.
        kv_transfer_config: see `connector`; None runs without offload.
        tp: tensor-parallel size.
        namespace_of: a config.json whose fields the engine is to take for its own namespace's.
        blocks: GPU KV blocks, few so that prompts push each other out.
        log: file for the engine's output.
        arguments: further arguments of `vllm.LLM`.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        *,
        kv_transfer_config: dict[str, Any] | None,
        tp: int = 1,
        blocks: int = 24,
        max_model_len: int = 704,
        namespace_of: Path | None = None,
        **arguments: Any,
    ) -> None:
        self._log = open(log, "w")  # noqa: SIM115  closed in `close`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.engine_process"],
            cwd=ROOT,
            env=engine_environment(tp) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        self._send(
            {
                "model": str(model),
                "namespace_of": str(namespace_of) if namespace_of else None,
                "dtype": "float32",
                "enforce_eager": True,
                "max_model_len": max_model_len,
                "block_size": BLOCK,
                "num_gpu_blocks_override": blocks,
                "tensor_parallel_size": tp,
                "kv_transfer_config": kv_transfer_config,
                **arguments,
            }
        )
        self._receive()

    def generate(
        self, prompts: Sequence[Prompt], max_tokens: int = 12, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """What `EngineProcess.run` returns for each prompt, run together."""
        requests = [{"prompt": p, "max_tokens": max_tokens, "params": params} for p in prompts]
        answers: list[dict[str, Any]] = self._call("run", requests=requests, events=[])
        return answers

    def run(
        self, requests: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]] = ()
    ) -> list[dict[str, Any] | None]:
        """See `EngineProcess.run`."""
        answers: list[dict[str, Any] | None] = self._call(
            "run", requests=list(requests), events=list(events)
        )
        return answers

    def ask(self, prompt: Prompt, **options: Any) -> dict[str, Any]:
        """`generate` for one prompt; its stores have ended on return."""
        answer = self.generate([prompt], **options)[0]
        self._call("settle")
        return answer

    def settle(self) -> None:
        """Wait until all stores have ended."""
        self._call("settle")

    def push_out(self, seeds: range) -> None:
        """Fill the GPU cache with other prompts."""
        for seed in seeds:
            self.ask(prompt(seed), max_tokens=1)

    def reset(self, *, connector: bool) -> bool:
        """Reset the prefix cache, and ours if `connector`."""
        return bool(self._call("reset", connector=connector))

    def sleep(self, level: int) -> None:
        """Put the engine to sleep."""
        self._call("sleep", level=level)

    def wake_up(self) -> None:
        """Wake the engine up."""
        self._call("wake_up")

    def change_weights(self) -> None:
        """Change what the model computes, as an update of its weights does."""
        self._call("change_weights")

    def reload_weights(self) -> None:
        """Load the weights again from the model's files."""
        self._call("reload_weights")

    def slow_transfers(self, least: int, most: int, seed: int = 0) -> None:
        """From now on each GPU transfer takes `least` to `most` steps."""
        self._call("slow_transfers", least=least, most=most, seed=seed)

    def counters(self) -> dict[str, Any]:
        """See `EngineProcess.counters`."""
        answer: dict[str, Any] = self._call("counters")
        return answer

    def distrusted(self) -> list[str]:
        """The tiers from which nothing is loaded, after what audits found."""
        answer: list[str] = self._call("distrusted")
        return answer

    def held(self) -> dict[str, int]:
        """See `EngineProcess.held`."""
        answer: dict[str, int] = self._call("held")
        return answer

    def resources(self) -> dict[str, int]:
        """See `EngineProcess.resources`."""
        answer: dict[str, int] = self._call("resources")
        return answer

    def end(self) -> list[int]:
        """End the engine as a user would end a program; the processes that it left behind."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        deadline = time.monotonic() + 5  # the engine's death is a signal to its I/O processes
        while (left := session(self._process.pid)) and time.monotonic() < deadline:
            time.sleep(0.01)
        return left

    def kill(self) -> None:
        """SIGKILL to the engine and its workers."""
        _kill_group(self._process)

    def close(self) -> None:
        """`end`, and kill what is left."""
        self.end()
        _kill_group(self._process)
        self._log.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _call(self, op: str, **arguments: Any) -> Any:
        self._send({"op": op, "arguments": arguments})
        answer = self._receive()
        if "error" in answer:
            raise RuntimeError(f"engine: {answer['error']}")
        return answer["ok"]

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
            self._log.write(line)
        self._log.flush()
        _kill_group(self._process)
        raise RuntimeError(f"the engine ended:\n{_tail(Path(self._log.name))}")


def ask(
    port: int,
    text: str,
    max_tokens: int = 12,
    replica: int = 0,
    params: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Greedy text and cached prompt tokens of one completion, of whatever serves at the port.

    params: its `kv_transfer_params`.
    """
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    answer = client.completions.create(
        model="model",
        prompt=text,
        max_tokens=max_tokens,
        temperature=0,
        timeout=120,
        extra_headers={"X-data-parallel-rank": str(replica)},
        extra_body={"kv_transfer_params": params} if params else None,
    )
    assert answer.usage is not None
    details = answer.usage.prompt_tokens_details
    return {
        "text": answer.choices[0].text,
        "cached": (details.cached_tokens or 0) if details is not None else 0,
    }


class Server:
    """`vllm serve`, started as a user would, with `replicas` of the engine."""

    def __init__(
        self,
        model: Path,
        log: Path,
        *,
        kv_transfer_config: dict[str, Any],
        replicas: int = 1,
        tp: int = 1,
        site: str | None = None,
        arguments: Sequence[str] = (),
        **environment: str,
    ) -> None:
        """tp: tensor-parallel size. site: with the `sitecustomize.py` of this folder."""
        self.log = log
        env = engine_environment(tp) | environment
        if replicas > 1 and vllm_wants_numa_nodes():
            env.update(VLLM_CPU_SIM_MULTI_NUMA="1", VLLM_CPU_OMP_THREADS_BIND="auto")
        if site is not None:
            env["PYTHONPATH"] = f"{Path(__file__).with_name(site)}:{env['PYTHONPATH']}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                [
                    # what `vllm serve` runs; the command itself asks for a distribution named
                    # "vllm", which vllm-cpu 0.32.0 is not
                    sys.executable,
                    "-m",
                    "vllm.entrypoints.openai.api_server",
                    f"--model={model}",
                    "--served-model-name=model",
                    "--host=127.0.0.1",
                    f"--port={self.port}",
                    "--dtype=float32",
                    "--enforce-eager",
                    "--max-model-len=704",
                    f"--block-size={BLOCK}",
                    f"--num-gpu-blocks-override={GPU_BLOCKS}",
                    f"--data-parallel-size={replicas}",
                    f"--tensor-parallel-size={tp}",
                    "--enable-prompt-tokens-details",
                    f"--kv-transfer-config={json.dumps(kv_transfer_config)}",
                    *arguments,
                ],
                cwd=ROOT,
                env=env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Wait until the server answers.

        Raises:
            RuntimeError: it ended or did not become ready; with the end of its log.
        """
        import urllib.request

        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended:\n{_tail(self.log)}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            time.sleep(0.2)
        raise RuntimeError(f"the server did not become ready:\n{_tail(self.log)}")

    def ask(self, text: str, **options: Any) -> dict[str, Any]:
        """See `ask`."""
        return ask(self.port, text, **options)

    def metrics(self) -> str:
        """The Prometheus page."""
        import urllib.request

        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as page:
            text: bytes = page.read()
        return text.decode()

    def io_processes(self) -> list[int]:
        """The I/O processes of its tiers."""
        return [pid for pid in session(self.process.pid) if _is_io_process(pid)]

    def terminate(self) -> float:
        """End it as an operator's tool would, with SIGTERM; how long it and its tiers took."""
        started = time.monotonic()
        self.process.terminate()
        self.process.wait(60)
        while session(self.process.pid):
            assert time.monotonic() < started + 120, "processes of the server are left"
            time.sleep(0.01)
        return time.monotonic() - started

    def kill(self) -> None:
        """SIGKILL to the server and all its workers."""
        _kill_group(self.process)

    def close(self) -> None:
        """Stop as a user would, with SIGINT; then make sure."""
        self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        self.kill()


@contextlib.contextmanager
def serving(
    model: Path, log: Path, *, kv_transfer_config: dict[str, Any], **options: Any
) -> Iterator[Server]:
    """A server that is ready, closed at the end; for the options see `Server`."""
    server = Server(model, log, kv_transfer_config=kv_transfer_config, **options)
    try:
        server.wait_ready()
        yield server
    finally:
        server.close()


def _is_io_process(pid: int) -> bool:
    try:
        return b"kvstrata.tiers.process.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _kill_group(process: subprocess.Popen[Any]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def _tail(log: Path, lines: int = 60) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
