"""vLLM engines for the benchmark, each in a process of its own that rests between requests.

Run as a program, it is such a process: JSON lines in, and JSON lines out that begin with a mark,
since vLLM prints as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

BLOCK = 32  # tokens; vLLM's CPU attention takes no less
ROOT = Path(__file__).parents[3]  # of the repository: there `tests` can be imported
_MARK = "@@kvstrata "
# A Llama whose prefill is slow enough to be measured; four heads share a KV head, as in Llama 3.
_MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "float32",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
VOCABULARY = _MODEL["vocab_size"]
# K and V of all layers in float32
TOKEN_BYTES = (
    2 * 4 * _MODEL["num_hidden_layers"] * _MODEL["num_key_value_heads"] * _MODEL["head_dim"]
)


class Reply(NamedTuple):
    """How long the first token took, in seconds, and how many prompt tokens were not computed."""

    seconds: float
    cached: int


class EngineError(RuntimeError):
    """An engine did not start, or died; the message has the end of its log."""


class Engine:
    """An engine of a random model; it works only while a request is under way.

    Args:
        folder: for the model's configuration and the log.
        name: of the log.
        blocks: GPU KV blocks, few so that prompts push each other out.
        batch_tokens: of a step; longer prompts take several.
        offload: `kv_connector_extra_config`; None runs without offload.

    Raises:
        EngineError: it does not start.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        blocks: int,
        batch_tokens: int,
        offload: dict[str, Any] | None,
    ) -> None:
        model = folder / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(_MODEL))
        connector = {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "engine_id": f"benchmark-{os.getpid()}-{name}",
            "kv_connector_extra_config": offload,
        }
        arguments = {
            "model": str(model),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "dtype": "float32",
            "max_model_len": (blocks - 1) * BLOCK,  # vLLM keeps a block to itself
            "max_num_batched_tokens": batch_tokens,
            "block_size": BLOCK,
            "num_gpu_blocks_override": blocks,
            "kv_transfer_config": connector if offload is not None else None,
        }
        self._log = folder / f"{name}.log"
        settings = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # One thread: with more, other load on the machine multiplies the times.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                cwd=ROOT,
                env=os.environ | settings,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._call(arguments)

    def ask(self, prompt: Sequence[int]) -> Reply:
        """Send one request for one token, and wait until its pages are stored as well."""
        return Reply(**self._call({"prompt": list(prompt)}))

    def counters(self) -> dict[str, int]:
        """The manager's totals."""
        found: dict[str, int] = self._call({})
        return found

    def close(self) -> None:
        """Stop it."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _call(self, message: dict[str, Any]) -> Any:
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # what is read says so
            print(json.dumps(message), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith(_MARK):
                return json.loads(line.removeprefix(_MARK))
        self._process.wait()
        tail = "\n".join(self._log.read_text().splitlines()[-20:])
        raise EngineError(f"an engine ended; the end of its log:\n{tail}")


class _Served:
    """The engine in this process."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM, SamplingParams

        self._llm = LLM(**arguments)
        self._sampling = SamplingParams(
            temperature=0, max_tokens=1, ignore_eos=True, detokenize=False
        )
        core: Any = self._llm.llm_engine.engine_core
        connector = core.engine_core.scheduler.connector
        self._offload = connector.connector_scheduler if connector is not None else None

    def ask(self, prompt: list[int]) -> dict[str, Any]:
        start = time.perf_counter()
        (output,) = self._llm.generate({"prompt_token_ids": prompt}, self._sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        while self._offload is not None and self._offload.has_pending_push_work():
            self._llm.llm_engine.step()  # as a serving engine does while it rests
            time.sleep(0.001)
        return {"seconds": seconds, "cached": output.num_cached_tokens or 0}

    def counters(self) -> dict[str, int]:
        return dict(self._offload.manager._manager.counters) if self._offload is not None else {}


def _main() -> None:
    engine = _Served(json.loads(sys.stdin.readline()))
    print(f"{_MARK}null", flush=True)
    for line in sys.stdin:
        message = json.loads(line)
        answer = engine.ask(message["prompt"]) if message else engine.counters()
        print(f"{_MARK}{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    _main()
