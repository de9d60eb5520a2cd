"""vLLM's scheduler and both halves of its OffloadingConnector, over blocks that are one row each.

As `modelless_engine.py`, but with any OffloadingManager, and light enough for thousands of steps:
a block's content is one number per token, the hash of all tokens up to it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_offload.base import GPULoadStoreSpec, OffloadingManager, TransferResult
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvstrata.offload.vllm_plugin.transfer import PageSlots
from tests.engine.conftest import CHECKPOINTS
from tests.models import tiny_llama

try:
    from vllm.v1.core.kv_cache_planning import (  # vLLM 0.33
        get_kv_cache_config_from_groups,
        get_kv_cache_groups,
    )
except ImportError:
    from vllm.v1.core.kv_cache_utils import (
        get_kv_cache_config_from_groups,
        get_kv_cache_groups,
    )

BLOCK = 16  # tokens
LONGEST = 60 * BLOCK  # request
TOKEN = 7  # what is generated, always
MOST_STEPS = 2_000

Rows = npt.NDArray[np.int64]

_FULL = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=8, dtype=torch.float16)
KINDS: Mapping[str, Mapping[str, KVCacheSpec]] = {
    "full": {"full": _FULL},
    "window": {
        "full": _FULL,
        "window": SlidingWindowSpec(
            block_size=BLOCK,
            num_kv_heads=2,
            head_size=8,
            dtype=torch.float16,
            sliding_window=2 * BLOCK,
        ),
    },
    "state": {
        "full": _FULL,
        "state": MambaSpec(
            block_size=BLOCK,
            shapes=((_FULL.page_size_bytes // 4,),),
            dtypes=(torch.float32,),
            mamba_cache_mode="align",
        ),
    },
}


class Model:
    """Configuration of an engine with layers of one kind; made once, for many engines.

    Attributes:
        specs: of the KV cache groups.
        windows: by group, how many tokens before the end of a hit it needs, where not all.
    """

    def __init__(self, kind: str, blocks: int) -> None:
        init_none_hash(sha256)
        self.config: VllmConfig = EngineArgs(
            model=str(tiny_llama(CHECKPOINTS)),
            dtype="float32",
            block_size=BLOCK,
            max_model_len=LONGEST,
            max_num_batched_tokens=4 * BLOCK,
            max_num_seqs=4,
            enforce_eager=True,
            async_scheduling=False,
            num_gpu_blocks_override=blocks,
            kv_transfer_config=KVTransferConfig(
                kv_connector="OffloadingConnector",
                kv_role="kv_both",
                kv_connector_extra_config={
                    "spec_name": "CPUOffloadingSpec",
                    "cpu_bytes_to_use": 1 << 20,
                },
            ),
        ).create_engine_config()
        self.config.cache_config.kv_cache_layout = "LBHNC"
        if kind == "state":
            self.config.cache_config.mamba_cache_mode = "align"
        groups = get_kv_cache_groups(self.config, dict(KINDS[kind]))
        self.kv: KVCacheConfig = get_kv_cache_config_from_groups(self.config, groups, 1 << 30)
        self.config.cache_config.num_gpu_blocks = self.kv.num_blocks
        self.specs = [group.kv_cache_spec for group in self.kv.kv_cache_groups]
        assert all(spec.block_size == BLOCK for spec in self.specs)

        self.windows: dict[int, int] = {}
        for group, spec in enumerate(self.specs):
            if isinstance(spec, SlidingWindowSpec):
                self.windows[group] = spec.sliding_window
            elif isinstance(spec, MambaSpec):
                self.windows[group] = BLOCK


class Copies:
    """The worker's side: copies rows between blocks and slots.

    A transfer is done at the end of the step that submits it, or when it is waited for, and is
    reported one step later.
    """

    def __init__(self, blocks: Rows, slots: Rows) -> None:
        self.loads: list[Any] = []  # of each load how many blocks each group has
        self._blocks = blocks
        self._slots = slots
        self._waiting: list[tuple[int, bool, GPULoadStoreSpec, Any]] = []
        self._done: list[int] = []

    def submit_store(self, job_id: int, blocks: GPULoadStoreSpec, slots: Any) -> bool:
        self._waiting.append((job_id, True, blocks, slots))
        return True

    def submit_load(self, job_id: int, slots: Any, blocks: GPULoadStoreSpec) -> bool:
        self.loads.append(blocks.group_sizes)
        self._waiting.append((job_id, False, blocks, slots))
        return True

    def wait(self, job_ids: set[int]) -> None:
        self._copy()

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        self._copy()
        return [TransferResult(job_id=job_id, success=True) for job_id in done]

    def shutdown(self) -> None:
        pass

    def _copy(self) -> None:
        for job_id, store, blocks, where in self._waiting:
            # ours names its slots otherwise than vLLM's CPULoadStoreSpec
            slots = where.slots if isinstance(where, PageSlots) else where.block_ids
            assert len(slots) == len(blocks.block_ids)
            if store:
                self._slots[slots] = self._blocks[blocks.block_ids]
            else:
                self._blocks[blocks.block_ids] = self._slots[slots]
            self._done.append(job_id)
        self._waiting.clear()


@dataclass(frozen=True)
class Prompt:
    """A request: its tokens, how many it generates, after how many steps it is aborted."""

    tokens: list[int]
    generate: int
    abort_after: int | None = None


class BlockEngine:
    """An engine whose model reads and writes rows.

    Args:
        model: what it computes with.
        manager: decides what is stored, and where.
        slots: the manager's.
        memory: where their rows lie, if anybody else moves them; int64 [slots, BLOCK].

    Attributes:
        found: blocks of full attention that requests did not compute: of the GPU or loaded.
        preempted: how often requests were.
    """

    def __init__(
        self, model: Model, manager: OffloadingManager, slots: int, memory: Rows | None = None
    ) -> None:
        kv = copy.deepcopy(model.kv)
        block, unit = resolve_kv_cache_block_sizes(kv, model.config)
        structured = StructuredOutputManager(model.config)
        self.scheduler = Scheduler(model.config, kv, structured, block, unit)
        connector: Any = self.scheduler.connector
        self._half = connector.connector_scheduler
        self._half.manager = manager
        self._rows: Rows = np.zeros((kv.num_blocks, BLOCK), np.int64)
        self._copies = Copies(
            self._rows, np.zeros((slots, BLOCK), np.int64) if memory is None else memory
        )
        self._worker = type(connector)(model.config, KVConnectorRole.WORKER, kv)
        self._worker.connector_worker.worker = self._copies
        self._specs = model.specs
        self._hasher = get_request_block_hasher(unit, sha256)
        self._count = 0
        self._begun: set[str] = set()
        self.found = 0
        self.preempted = 0

    @property
    def loaded(self) -> int:
        """Blocks of full attention that were loaded: each is part of a prefix that was used."""
        full = next(i for i, spec in enumerate(self._specs) if isinstance(spec, FullAttentionSpec))
        return int(sum(sizes[full] for sizes in self._copies.loads))

    def run(self, prompts: Sequence[Prompt]) -> None:
        """Serve prompts that come together to their end, and let their stores end."""
        requests: dict[str, Request] = {}
        ends: dict[str, int] = {}
        for prompt in prompts:
            self._count += 1
            request = Request(
                f"r{self._count}",
                prompt.tokens,
                SamplingParams(max_tokens=prompt.generate, ignore_eos=True),
                None,
                block_hasher=self._hasher,
            )
            requests[request.request_id] = request
            if prompt.abort_after is not None:
                ends[request.request_id] = prompt.abort_after
            self.scheduler.add_request(request)
        for step in range(MOST_STEPS):
            for name in [name for name, end in ends.items() if end == step]:
                if not requests[name].is_finished():
                    self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
            self._step(requests)
            if not self.scheduler.has_requests() and not self._half.has_pending_push_work():
                return
        raise AssertionError("the requests or their stores do not end")

    def reset(self) -> None:
        """Forget the GPU's prefix cache."""
        assert self.scheduler.reset_prefix_cache()

    def close(self) -> None:
        """End the connector."""
        self.scheduler.shutdown()

    def _step(self, requests: Mapping[str, Request]) -> None:
        output = self.scheduler.schedule()
        self.preempted += len(output.preempted_req_ids or ())
        worker = self._worker
        worker.handle_preemptions(output.kv_connector_metadata)
        for block in output.new_block_ids_to_zero or ():
            self._rows[block] = 0
        for copied in output.kv_cache_block_copies or ():
            self._rows[copied.dst_block_id] = self._rows[copied.src_block_id]
        worker.bind_connector_metadata(output.kv_connector_metadata)
        worker.start_load_kv(None)
        names = list(output.num_scheduled_tokens)
        sampled = []
        for name, count in output.num_scheduled_tokens.items():
            request = requests[name]
            end = request.num_computed_tokens
            self._compute(request, end - count, end)
            if name not in self._begun:
                self._begun.add(name)
                self.found += (end - count) // BLOCK
            sampled.append([TOKEN] if end >= request.num_tokens else [])
        worker.wait_for_save()
        _, received = worker.get_finished(output.finished_req_ids)
        meta = worker.build_connector_worker_meta()
        worker.clear_connector_metadata()
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=sampled,
                kv_connector_output=KVConnectorOutput(
                    finished_recving=received or None, kv_connector_worker_meta=meta
                ),
            ),
        )

    def _compute(self, request: Request, start: int, end: int) -> None:
        """Read what a model would read before `start`, and write the tokens `start` to `end`."""
        wanted = prefix_hashes(request.all_token_ids[:end])
        tables = self.scheduler.kv_cache_manager.get_block_ids(request.request_id)
        for group, (spec, ids) in enumerate(zip(self._specs, tables, strict=True)):
            hashes, table = wanted + group, np.array(ids)
            if isinstance(spec, MambaSpec):  # a block holds one state
                if start:
                    found = self._rows[table[(start - 1) // BLOCK]]
                    assert (found == hashes[start - 1]).all(), f"{request.request_id}: {start}"
                self._rows[table[(end - 1) // BLOCK]] = hashes[end - 1]
                continue
            first = 0
            if isinstance(spec, SlidingWindowSpec):
                first = max(0, start - spec.sliding_window + 1)
            places = np.arange(first, end)
            blocks, offsets = table[places // BLOCK], places % BLOCK
            assert blocks.all()
            found = self._rows[blocks[: start - first], offsets[: start - first]]
            assert np.array_equal(found, hashes[first:start]), f"{request.request_id}: {start}"
            self._rows[blocks[start - first :], offsets[start - first :]] = hashes[start:end]


def prefix_hashes(tokens: Sequence[int]) -> Rows:
    """int64 [n]: of each token a number that differs if any token up to it does; 64 apart."""
    return np.cumsum(np.array(tokens, np.int64) * _WEIGHTS[: len(tokens)]) * 64


_WEIGHTS = np.random.default_rng(0).integers(1, 1 << 40, LONGEST, dtype=np.int64)
