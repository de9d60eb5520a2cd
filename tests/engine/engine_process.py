"""One vLLM engine in this process, driven by JSON lines on stdin; see `driver.py`.

Run as a program. Answers are lines on stdout that begin with `driver.MARK`.
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from tests.engine.driver import MARK
from tests.engine.slow_pipeline import SlowPipeline

# No request of the tests takes a tenth of it, so one that does will never end.
PATIENCE_S = 120.0


class EngineProcess:
    """The engine and what tests may ask of it."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        if (config := arguments.pop("namespace_of")) is not None:
            _force_namespace(json.loads(Path(config).read_text()))
        self.llm = LLM(**arguments)
        core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        connector = self.scheduler.connector
        self.offload = connector.connector_scheduler if connector is not None else None
        self.requests = 0
        self.resets = 0
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

    def run(self, requests: list[dict[str, Any]], events: list[dict[str, Any]]) -> Any:
        """Run requests together, and let things happen to them on the way.

        Args:
            requests: each with `prompt` (a text, or token ids), `max_tokens`, and, where wanted,
                `params` (`kv_transfer_params`) and `arrives` (the step before which it arrives).
            events: each happens once, after the step `when`, or after the first step that
                left a "promotion", "load" or "store" under way: `do` is "abort" (of
                `request`, an index) or "reset" (of the connector as well if `connector`).

        Returns:
            For each request greedy `tokens`, the number of `cached` prompt tokens, and the
            `seconds` that it took; None if it was aborted.

        Raises:
            TimeoutError: the requests do not end.
        """
        engine = self.llm.llm_engine
        answers: list[Any] = [None] * len(requests)
        left = dict(enumerate(requests))  # to arrive
        live: dict[str, int] = {}
        arrived: dict[int, float] = {}
        pending = list(events)
        step = 0
        deadline = time.monotonic() + PATIENCE_S
        while left or live:
            for index in [i for i, request in left.items() if request.get("arrives", 0) <= step]:
                arrived[index] = time.perf_counter()
                live[self._add(left.pop(index))] = index
            for output in engine.step():
                if output.finished and output.request_id in live:
                    index = live.pop(output.request_id)
                    seconds = time.perf_counter() - arrived[index]
                    answers[index] = {**_answer(output), "seconds": seconds}
            step += 1
            for event in [event for event in pending if self._is_due(event["when"], step)]:
                pending.remove(event)
                if event["do"] == "reset":
                    self.reset(event["connector"])
                    continue
                for name in [name for name, index in live.items() if index == event["request"]]:
                    engine.abort_request([name])
                    del live[name]
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {step} steps {len(live)} requests have not ended")
        return answers

    def settle(self, timeout_s: float = 30.0) -> None:
        """Step until no store is under way, as a serving engine does while idle."""
        deadline = time.monotonic() + timeout_s
        while self.scheduler.has_requests():
            self.llm.llm_engine.step()
            if time.monotonic() > deadline:
                raise TimeoutError("stores did not settle")

    def reset(self, connector: bool) -> bool:
        """Reset vLLM's prefix cache, and ours if `connector`."""
        self.resets += 1
        return bool(self.llm.reset_prefix_cache(reset_connector=connector))

    def sleep(self, level: int) -> None:
        """Put the engine to sleep."""
        self.llm.sleep(level=level)

    def wake_up(self) -> None:
        """Wake the engine up."""
        self.llm.wake_up()

    def change_weights(self) -> None:
        """Change what the model computes, as an update of its weights does."""
        self.llm.apply_model(_change_weights)

    def reload_weights(self) -> None:
        """Load the weights again from the model's files."""
        self.llm.collective_rpc("reload_weights")

    def slow_transfers(self, least: int, most: int, seed: int) -> None:
        """From now on each GPU transfer takes `least` to `most` steps."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        worker = get_kv_transfer_group().connector_worker.worker
        choose = random.Random(seed)
        worker._pipeline = SlowPipeline(worker._pipeline, lambda: choose.randint(least, most))

    def counters(self) -> dict[str, Any]:
        """The manager's and the tiers' totals, the primary tier's slots, and the engine's
        steps that computed something."""
        assert self.offload is not None
        manager = self.offload.manager._manager
        primary = manager.primary
        stats = {link.name: link.tier.stats() for link in manager.links}
        return {
            **manager.counters,
            "preemptions": self.preemptions,
            "resets": self.resets,
            "steps": self.steps,
            "slots": primary.slots,
            "unused": primary.free + primary.idle,
            "failures": {name: dict(each.failures) for name, each in stats.items()},
            "tiers": {name: dict(each.counters) for name, each in stats.items()},
        }

    def distrusted(self) -> list[str]:
        """The tiers from which nothing is loaded, after what audits found."""
        assert self.offload is not None
        found: list[str] = self.offload.manager._manager.audits.findings.distrusted
        return found

    def held(self) -> dict[str, int]:
        """How much is remembered of requests and transfers."""
        assert self.offload is not None
        manager = self.offload.manager._manager
        return {
            "vLLM's requests": len(self.offload._req_status),
            "vLLM's transfers": len(self.offload._jobs),
            "requests": len(manager._requests),
            "promoting": manager.primary.promoting,
        }

    def resources(self) -> dict[str, int]:
        """This process's resident memory in bytes, and its open files."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {
            "rss": pages * os.sysconf("SC_PAGESIZE"),
            "files": len(os.listdir("/proc/self/fd")),
        }

    def _add(self, request: dict[str, Any]) -> str:
        from vllm import SamplingParams

        self.requests += 1
        params = request.get("params")
        sampling = SamplingParams(
            temperature=0,
            max_tokens=request["max_tokens"],
            ignore_eos=True,
            detokenize=False,
            extra_args={"kv_transfer_params": params} if params else None,
        )
        name = f"test-{self.requests}"
        prompt = request["prompt"]
        if not isinstance(prompt, str):
            prompt = {"prompt_token_ids": prompt}
        self.llm.llm_engine.add_request(name, prompt, sampling)
        return name

    def _is_due(self, when: int | str, step: int) -> bool:
        if isinstance(when, int):
            return step >= when
        if self.offload is None:
            return False
        if when == "promotion":
            return bool(self.offload.manager._manager.primary.promoting > 0)
        return any(job.is_store == (when == "store") for job in self.offload._jobs.values())


def _force_namespace(fields: dict[str, Any]) -> None:
    """Whatever the engine's configuration says, its pages are of this namespace."""
    from kvstrata.offload.vllm_plugin import registration

    registration.namespace_fields = lambda *args, **kwargs: fields


def _answer(output: Any) -> dict[str, Any]:
    return {"tokens": list(output.outputs[0].token_ids), "cached": output.num_cached_tokens}


def _change_weights(model: Any) -> None:
    for layer in model.model.layers:
        weight = layer.input_layernorm.weight.data
        weight[: len(weight) // 2] *= -1


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
