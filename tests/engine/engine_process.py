"""One vLLM engine in this process, driven by JSON lines on stdin; see `driver.py`.

Run as a program. Answers are lines on stdout that begin with `driver.MARK`.
"""

import json
import sys
import time
from typing import Any

from tests.engine.driver import MARK


class EngineProcess:
    """The engine and what tests may ask of it."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(**arguments)
        core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        connector = self.scheduler.connector
        self.offload = connector.connector_scheduler if connector is not None else None
        self.preemptions = 0
        preempt = self.scheduler._preempt_request

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.preemptions += 1
            return preempt(*args, **kwargs)

        self.scheduler._preempt_request = counting
        self.steps = 0
        schedule = self.scheduler.schedule

        def counting_steps(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.steps += output.total_num_scheduled_tokens > 0
            return output

        self.scheduler.schedule = counting_steps

    def generate(self, prompts: list[str], max_tokens: int, params: dict[str, Any] | None) -> Any:
        """Greedy tokens and the number of cached prompt tokens, per prompt."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            extra_args={"kv_transfer_params": params} if params else None,
        )
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        return [
            {"tokens": list(o.outputs[0].token_ids), "cached": o.num_cached_tokens} for o in outputs
        ]

    def settle(self, timeout_s: float = 30.0) -> None:
        """Step until no store is under way, as a serving engine does while idle."""
        deadline = time.monotonic() + timeout_s
        while self.offload is not None and self.offload.has_pending_push_work():
            self.llm.llm_engine.step()
            if time.monotonic() > deadline:
                raise TimeoutError("stores did not settle")

    def reset(self, connector: bool) -> bool:
        """Reset vLLM's prefix cache, and ours if `connector`."""
        return bool(self.llm.reset_prefix_cache(reset_connector=connector))

    def counters(self) -> dict[str, Any]:
        """The manager's totals, the tiers' failures, the primary tier's slots, and the engine's
        steps that computed something."""
        assert self.offload is not None
        manager = self.offload.manager._manager
        primary = manager.primary
        return {
            **manager.counters,
            "preemptions": self.preemptions,
            "steps": self.steps,
            "slots": primary.slots,
            "unused": primary.free + primary.idle,
            "failures": {n.name: dict(n.tier.stats().failures) for n in manager.tiers},
        }


def main() -> None:
    """Serve until stdin ends."""
    engine = EngineProcess(json.loads(sys.stdin.readline()))
    print(f"{MARK}null", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": getattr(engine, request["op"])(**request["arguments"])}
        except Exception as error:
            answer = {"error": repr(error)}
        print(f"{MARK}{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    main()
