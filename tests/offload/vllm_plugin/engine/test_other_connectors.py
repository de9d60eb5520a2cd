"""Beside other KV connectors: what would happen, and what is refused."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

import vllm  # noqa: E402
from vllm.config import KVTransferConfig  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # noqa: E402
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)

from kvstrata.offload.vllm_plugin import registration  # noqa: E402
from kvstrata.offload.vllm_plugin.engine.other_connectors import (  # noqa: E402
    ConnectorError,
    check_other_connectors,
)
from tests.offload.vllm_plugin.modelless_engine import SlowStores  # noqa: E402
from tests.offload.vllm_plugin.test_other_kinds_of_cache import Start, full, text  # noqa: E402

OURS = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
HIDDEN = {"kv_connector": "ExampleHiddenStatesConnector", "kv_role": "kv_producer"}
LAYERS = {"full": (full(), "FLASH_ATTN")}


def multi(*connectors: dict[str, Any], **more: Any) -> KVTransferConfig:
    return KVTransferConfig(
        kv_connector="MultiConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"connectors": list(connectors)},
        **more,
    )


def mooncake(role: str) -> dict[str, Any]:
    return {"kv_connector": "MooncakeConnector", "kv_role": role}


@pytest.mark.parametrize(
    "config",
    [
        KVTransferConfig(**OURS),
        multi(OURS),
        multi(OURS, HIDDEN),
        multi(HIDDEN, OURS),
        multi(mooncake("kv_producer"), OURS, HIDDEN),
    ],
)
def test_connectors_that_never_write_are_supported(config: KVTransferConfig) -> None:
    check_other_connectors(config)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (multi(OURS, {"kv_connector": "NixlConnector", "kv_role": "kv_both"}), "'NixlConnector'"),
        # nothing keeps a request from asking a Nixl producer to load
        (
            multi(OURS, {"kv_connector": "NixlConnector", "kv_role": "kv_producer"}),
            "'NixlConnector'",
        ),
        (multi({"kv_connector": "LMCacheConnectorV1"}, OURS), "'LMCacheConnectorV1'"),
        (multi(OURS, mooncake("kv_both")), "'MooncakeConnector'"),
        (multi(OURS, mooncake("kv_consumer"), HIDDEN), "'MooncakeConnector'"),
        (multi(OURS, OURS), "'OffloadingConnector'"),
        (multi(OURS, {"kv_connector": "MultiConnector"}), "'MultiConnector'"),
        (multi(OURS, {"kv_connector": "New"}, {"kv_connector": "Old"}), "'New', 'Old'"),
        # another class of that name
        (multi(OURS, {**HIDDEN, "kv_connector_module_path": "mine"}), "'ExampleHidden"),
        (multi(OURS, kv_connector_module_path="mine"), "'MultiConnector'"),
        (KVTransferConfig(kv_connector="Wrapper", kv_role="kv_both"), "'Wrapper'"),
    ],
)
def test_others_are_refused_by_name(config: KVTransferConfig, named: str) -> None:
    with pytest.raises(ConnectorError, match=named) as caught:
        check_other_connectors(config)
    assert "OffloadingConnector" in str(caught.value)


# -- what would happen --------------------------------------------------------------


@dataclass
class Loads(KVConnectorMetadata):
    started: list[tuple[str, tuple[list[int], ...], list[int]]] = field(default_factory=list)


class SlowLoader(KVConnectorBase_V1, SupportsHMA):
    """Loads the prompts of `prompts`, all but their last block, some steps later.

    Its transfers write to the blocks as soon as they are started.
    """

    STEPS: ClassVar[int] = 3
    prompts: ClassVar[list[list[int]]] = []
    engine: ClassVar[Any] = None

    def __init__(self, config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(config, role, kv_cache_config)
        self._rank = config.parallel_config.rank
        self._new = Loads()
        self._waiting: dict[str, int] = {}
        self._asked: set[str] = set()

    def get_num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int, bool]:
        tokens = list(request.prompt_token_ids)
        if tokens not in self.prompts or request.request_id in self._asked:
            return 0, False
        return len(tokens) - 32 - computed, True

    def update_state_after_alloc(self, request: Any, blocks: Any, tokens: int) -> None:
        if tokens:
            self._asked.add(request.request_id)
            prompt = list(request.prompt_token_ids)[:tokens]
            self._new.started.append((request.request_id, blocks.get_block_ids(), prompt))

    def build_connector_meta(self, _: Any) -> Loads:
        new, self._new = self._new, Loads()
        return new

    def request_finished_all_groups(self, *_: Any) -> tuple[bool, None]:
        return False, None

    def start_load_kv(self, _: Any, **more: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Loads)
        for name, tables, tokens in metadata.started:
            self.engine.fill(self.engine.ranks[self._rank], tables, tokens)
            self._waiting[name] = self.STEPS

    def get_finished(self, _: set[str]) -> tuple[None, set[str] | None]:
        done = {name for name, steps in self._waiting.items() if not steps}
        self._waiting = {name: n - 1 for name, n in self._waiting.items() if n}
        return None, done or None

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, *_: Any, **more: Any) -> None: ...

    def wait_for_save(self) -> None: ...


BESIDE = {
    "kv_connector": "SlowLoader",
    "kv_connector_module_path": SlowLoader.__module__,
    "kv_role": "kv_both",
}


def test_it_is_refused_at_start(start: Start) -> None:
    with pytest.raises(ConnectorError, match="'SlowLoader' in MultiConnector"):
        start(LAYERS, beside=[BESIDE])


def test_a_load_overwrites_blocks_that_are_being_stored(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why: vLLM before 0.33 does not have such stores flushed first."""
    monkeypatch.setattr(registration, "check_other_connectors", lambda config: None)
    stored, loaded = text(1), text(2)
    monkeypatch.setattr(SlowLoader, "prompts", [loaded])
    engine = start(LAYERS, beside=[BESIDE], blocks=14, max_num_seqs=1, pipeline=SlowStores)
    monkeypatch.setattr(SlowLoader, "engine", engine)
    assert engine.run_all([stored, loaded]) == [0, 288]
    engine.reset()
    if vllm.__version_tuple__ < (0, 33):
        with pytest.raises(AssertionError, match=r"token \d+ is wrong"):
            engine.run(stored)
    else:
        assert engine.run(stored) >= 288
