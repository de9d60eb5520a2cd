"""vLLM's scheduler, KV cache manager, connector and cache allocation, without a model.

For kinds of KV cache that vLLM's CPU build has no kernels for. In place of a model, bytes are
written into the KV caches that depend on the layer, the rank and all tokens up to their own.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.utils import allocate_kv_cache

from kvstrata.kernels.cpu import CpuPipeline
from kvstrata.kernels.opening import open_pipeline
from kvstrata.kernels.pipeline import Finished, Pipeline
from kvstrata.offload.manager import TieringManager
from kvstrata.offload.vllm_plugin import registration
from kvstrata.offload.vllm_plugin.caches import layers, windows
from kvstrata.offload.vllm_plugin.engine import model_runner
from kvstrata.offload.vllm_plugin.entry_point import register
from kvstrata.tiers.base import layouts_from_json
from tests.engine.driver import connector

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

MOST_STEPS = 10_000
BARRIER_SECONDS = 60.0  # only a rank that leaves out a collective meets it


def backend_class(path: str, name: str | None = None) -> type[AttentionBackend]:
    """An attention backend with the class path of one that is not installed or does not load here.

    path: `module.Class`, or a name in vLLM's registry; any other word for an unknown one.
    name: what it calls itself; the word, unless given.
    """
    word = path
    if path in AttentionBackendEnum.__members__:
        path = AttentionBackendEnum[path].value
    module, _, qualname = path.rpartition(".")
    members = {
        "__module__": module or "unknown",
        "get_name": staticmethod(lambda: name or word),
    }
    return type(qualname, (AttentionBackend,), members)


def _transfer(extra: Mapping[str, Any], beside: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`--kv-transfer-config` with KVStrataSpec, and other connectors beside it."""
    ours = connector(**{"cpu_bytes_to_use": "16MiB", **extra})  # fits any /dev/shm
    if not beside:
        return ours
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "engine_id": ours.pop("engine_id"),
        "kv_connector_extra_config": {"connectors": [ours, *beside]},
    }


class Layer:
    """Stands for vLLM's attention layer."""

    def __init__(self, spec: Any, backend: str) -> None:
        self.spec = spec
        self.backend = backend
        self.kv_cache: Any = None

    def get_kv_cache_spec(self, _: Any) -> Any:
        return self.spec

    def get_attn_backend(self) -> Any:
        return backend_class(self.backend)


class Rank:
    """One worker: its caches and its half of the connector."""

    def __init__(self, number: int, config: VllmConfig, kv: KVCacheConfig, layout: Any) -> None:
        self.number = number
        self.config = copy.copy(config)
        self.config.parallel_config = copy.copy(config.parallel_config)
        self.config.parallel_config.rank = number
        self.kv = kv
        self.views = allocate_kv_cache(kv, torch.device("cpu"), layout)
        transfer = config.kv_transfer_config
        assert transfer is not None
        cls = KVConnectorFactory.get_connector_class(transfer)
        self.connector: Any = cls(self.config, KVConnectorRole.WORKER, kv)

    def cells(self, name: str) -> torch.Tensor:
        """A layer's bytes [B, H, N, C]."""
        view = self.views[name]
        return view.view(torch.uint8) if view.dtype is not torch.uint8 else view


class SlowStores(CpuPipeline):
    """Stores read their blocks at the end of the step after the one that submits them, as they may
    on a device; before that only if somebody wants the blocks."""

    def __init__(self, groups: Any, region: torch.Tensor, *_: Any) -> None:
        super().__init__(groups, region)
        self._late: dict[int, tuple[int, Any]] = {}
        self._steps = 0

    def submit_store(self, job_id: int, work: Any) -> None:
        self._late[job_id] = (self._steps, work)

    def fence(self, job_ids: Collection[int]) -> None:
        for job_id in job_ids & self._late.keys():
            super().submit_store(job_id, self._late.pop(job_id)[1])

    def finished(self) -> list[Finished]:
        self._steps += 1
        self.fence({job for job, (step, _) in self._late.items() if step + 1 < self._steps})
        return super().finished()


class ModellessEngine:
    """An engine that computes no tokens but keeps their KV cache.

    Args:
        model: any checkpoint; only its configuration's general part matters.
        layers: spec and attention backend of each layer.
        monkeypatch: makes this process look like the ranks' processes.
        pipeline: opens what moves the pages.
        tp: ranks, all in this process.
        runner_v2: prepare blocks when vLLM's second model runner does, which is too early.
        change: applied to vLLM's KV cache groups before anything sees them.
        arguments: of vLLM's EngineArgs.
        extra: keys of kv_connector_extra_config.
        beside: other connectors, for vLLM's MultiConnector.
    """

    def __init__(
        self,
        model: Path,
        layers: Mapping[str, tuple[KVCacheSpec, str]],
        monkeypatch: pytest.MonkeyPatch,
        *,
        layout: str = "LBHNC",
        pipeline: Callable[..., Pipeline] = open_pipeline,
        tp: int = 1,
        blocks: int = 40,
        runner_v2: bool = False,
        change: Callable[[KVCacheConfig], None] = lambda config: None,
        extra: Mapping[str, Any] = {},
        beside: Sequence[Mapping[str, Any]] = (),
        **arguments: Any,
    ) -> None:
        register()
        init_none_hash(sha256)
        config = EngineArgs(
            model=str(model),
            dtype="float32",
            block_size=32,
            max_model_len=704,
            enforce_eager=True,
            num_gpu_blocks_override=blocks,
            tensor_parallel_size=tp,
            kv_transfer_config=KVTransferConfig(**_transfer(extra, beside)),
            **arguments,
        ).create_engine_config()
        # not before: vLLM's CPU build brings no Triton, without which it refuses V2
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(runner_v2)))
        config.cache_config.kv_cache_layout = layout
        self.layers = layers
        self._runner_v2 = runner_v2
        self._dcp = config.parallel_config.decode_context_parallel_size
        specs = {name: spec for name, (spec, _) in layers.items()}
        kv = get_kv_cache_config_from_groups(config, get_kv_cache_groups(config, specs), 1 << 30)
        change(kv)
        self.kv = kv
        resolved = config.cache_config.get_resolved_kv_cache_layout()
        self.ranks = [Rank(number, config, copy.deepcopy(kv), resolved) for number in range(tp)]
        monkeypatch.setattr(registration, "open_pipeline", pipeline)
        self._register(monkeypatch)
        # as vLLM does for its scheduler
        for group in kv.kv_cache_groups:
            if isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs):
                group.kv_cache_spec = next(iter(group.kv_cache_spec.kv_cache_specs.values()))
        config.cache_config.num_gpu_blocks = kv.num_blocks
        block, unit = resolve_kv_cache_block_sizes(kv, config)
        self.scheduler = Scheduler(config, kv, StructuredOutputManager(config), block, unit)
        self._hasher = get_request_block_hasher(unit, sha256)
        self._requests = 0
        self._received: dict[str, int] = {}

    def _register(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """All ranks register their caches, each in a thread, with a collective between threads."""
        barrier = threading.Barrier(len(self.ranks), timeout=BARRIER_SECONDS)
        board: list[Any] = [None] * len(self.ranks)
        mine = threading.local()

        def gather(values: list[Any], value: Any, group: Any) -> None:
            board[mine.rank.number] = value
            barrier.wait()
            values[:] = board
            barrier.wait()

        def modules(*_: Any) -> dict[str, Layer]:
            made = {}
            for name, (spec, backend) in self.layers.items():
                made[name] = Layer(spec, backend)
                made[name].kv_cache = mine.rank.views[name]
            return made

        world = SimpleNamespace(cpu_group=None, world_size=len(self.ranks))
        monkeypatch.setattr(registration, "get_world_group", lambda: world)
        monkeypatch.setattr(registration.dist, "all_gather_object", gather)
        monkeypatch.setattr(registration, "get_current_vllm_config", lambda: mine.rank.config)
        for reader in (layers, model_runner, windows):
            monkeypatch.setattr(reader, "get_layers_from_vllm_config", modules)
        errors: list[Exception] = []

        def one(rank: Rank) -> None:
            mine.rank = rank
            try:
                rank.connector.register_kv_caches(rank.views)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in self.ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def run(self, tokens: list[int], generate: int = 1) -> int:
        """Serve one request to its end, and let its stores end.

        Returns:
            The tokens that were there before, whose bytes have been compared.
        """
        [found] = self.run_all([tokens], generate)
        return found

    def run_all(self, prompts: Sequence[list[int]], generate: int = 1) -> list[int]:
        """The same of several requests, which compete for the blocks."""
        requests = []
        for tokens in prompts:
            self._requests += 1
            request = Request(
                f"r{self._requests}",
                tokens,
                SamplingParams(max_tokens=generate, ignore_eos=True),
                None,
                block_hasher=self._hasher,
            )
            self.scheduler.add_request(request)
            requests.append(request)
        found: dict[str, int] = {}
        for _ in range(MOST_STEPS):
            found = self._step({request.request_id: request for request in requests}) | found
            if not self.scheduler.has_requests() and not self._storing():
                return [found[request.request_id] for request in requests]
        raise AssertionError("the requests or their stores do not end")

    def reset(self) -> None:
        """Forget the GPU's prefix cache, and overwrite all its bytes."""
        assert self.scheduler.reset_prefix_cache()
        for rank in self.ranks:
            for name in rank.views:
                rank.cells(name).fill_(0xEE)

    def close(self) -> None:
        """End the connectors."""
        self.scheduler.shutdown()
        for rank in self.ranks:
            rank.connector.shutdown()

    @property
    def pages(self) -> list[tuple[tuple[str, tuple[int, ...]], ...]]:
        """The tensors of each group's page: dtype and shape."""
        fields = self._scheduler_half().manager._region.fields
        return [
            tuple((tensor.dtype, tensor.shape) for tensor in layout.tensors)
            for layout in layouts_from_json(fields["layouts"]).values()
        ]

    @property
    def manager(self) -> TieringManager:
        """What decides; its counters say what happened."""
        manager: TieringManager = self._scheduler_half().manager._manager
        return manager

    def _scheduler_half(self) -> Any:
        made: Any = self.scheduler.connector
        if isinstance(made, MultiConnector):
            made = made.sub_connectors[0]
        return made.connector_scheduler

    def _storing(self) -> bool:
        return bool(self._scheduler_half().has_pending_push_work())

    def _step(self, requests: Mapping[str, Request]) -> dict[str, int]:
        """One step; the first token that it computed of each request."""
        output = self.scheduler.schedule()
        starts = {
            name: requests[name].num_computed_tokens - count
            for name, count in output.num_scheduled_tokens.items()
        }
        ends = {name: start + output.num_scheduled_tokens[name] for name, start in starts.items()}
        metas, received = [], set()
        for rank in self.ranks:
            half: Any = rank.connector
            if self._runner_v2:  # as in vllm/v1/worker/gpu/model_runner.py
                self._prepare_blocks(rank, output)
            half.handle_preemptions(output.kv_connector_metadata)
            if not self._runner_v2:
                self._prepare_blocks(rank, output)
            half.bind_connector_metadata(output.kv_connector_metadata)
            half.start_load_kv(None)
            for name, start in starts.items():
                self._compute(rank, requests[name], start, ends[name])
            half.wait_for_save()
            _, done = half.get_finished(output.finished_req_ids)
            for name in done or ():
                self._received[name] = self._received.get(name, 0) + 1
                if self._received[name] == len(self.ranks):
                    received.add(name)
            metas.append(half.build_connector_worker_meta())
            half.clear_connector_metadata()
        found = [meta for meta in metas if meta is not None]
        meta = functools.reduce(lambda one, other: one.aggregate(other), found) if found else None
        names = list(output.num_scheduled_tokens)
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=[
                    [7] if ends[name] >= requests[name].num_tokens else [] for name in names
                ],
                kv_connector_output=KVConnectorOutput(
                    finished_recving=received or None,
                    kv_connector_worker_meta=meta,
                ),
            ),
        )
        return starts

    def _prepare_blocks(self, rank: Rank, output: SchedulerOutput) -> None:
        """What model runners do to new blocks before the model runs."""
        for name in rank.views:
            cells = rank.cells(name)
            for block in output.new_block_ids_to_zero or ():
                cells[block] = 0
            for copied in output.kv_cache_block_copies or ():
                cells[copied.dst_block_id] = cells[copied.src_block_id]

    def _compute(self, rank: Rank, request: Request, start: int, end: int) -> None:
        """Read what attention would read before `start`, and write the tokens `start` to `end`."""
        tokens = list(request.all_token_ids)
        tables = self.scheduler.kv_cache_manager.get_block_ids(request.request_id)
        for group, table in zip(self.kv.kv_cache_groups, tables, strict=True):
            for name in group.layer_names:
                first = _first_read(self.layers[name][0], start)
                cells = self._cells(rank, name, group.kv_cache_spec.block_size, table, first, end)
                for position, cell in cells:
                    wanted = self._content(rank, name, tokens[: position + 1], cell)
                    if position >= start:
                        cell.copy_(wanted)
                    else:
                        assert torch.equal(cell, wanted), f"{name}: token {position} is wrong"

    def fill(self, rank: Rank, tables: Sequence[list[int]], tokens: list[int]) -> None:
        """Write all tokens into the blocks of each group, as another connector's load does."""
        for group, table in zip(self.kv.kv_cache_groups, tables, strict=True):
            for name in group.layer_names:
                size = group.kv_cache_spec.block_size
                for position, cell in self._cells(rank, name, size, table, 0, len(tokens)):
                    cell.copy_(self._content(rank, name, tokens[: position + 1], cell))

    def _cells(
        self, rank: Rank, name: str, size: int, table: list[int], first: int, end: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(position, bytes) of the tokens that a rank holds."""
        for position in range(first, end):
            # context parallelism deals the tokens to the ranks in turn
            place, turn = divmod(position, self._dcp)
            if turn == rank.number % self._dcp:
                block = table[place // size]
                assert block, f"{name}: no block for token {position}"
                yield position, rank.cells(name)[block, :, place % size]

    def _content(
        self, rank: Rank, name: str, prefix: list[int], like: torch.Tensor
    ) -> torch.Tensor:
        latent = isinstance(self.layers[name][0], MLAAttentionSpec)  # all ranks alike
        return _bytes(name, 0 if latent else rank.number, prefix, like)


def _first_read(spec: KVCacheSpec, start: int) -> int:
    """The first token whose KV the token `start` attends to."""
    if isinstance(spec, SlidingWindowSpec):
        return max(0, start - spec.sliding_window + 1)
    if isinstance(spec, ChunkedLocalAttentionSpec):
        return start // spec.attention_chunk_size * spec.attention_chunk_size
    return 0


def _bytes(name: str, rank: int, prefix: list[int], like: torch.Tensor) -> torch.Tensor:
    seed = hashlib.sha256(repr((name, rank, prefix)).encode()).digest()
    data = (seed * (like.numel() // len(seed) + 1))[: like.numel()]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(like.shape)
