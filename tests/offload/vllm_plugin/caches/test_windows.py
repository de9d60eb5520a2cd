"""How much of a prefix each group needs, as the scheduler's side learns it from the workers."""

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

import torch  # noqa: E402
from vllm.v1.kv_cache_interface import MambaSpec  # noqa: E402

from tests.offload.vllm_plugin.test_other_kinds_of_cache import Start, full, window  # noqa: E402

STATE = MambaSpec(
    block_size=32, shapes=((256,), (256,)), dtypes=(torch.float32,) * 2, mamba_cache_mode="align"
)


@pytest.mark.parametrize(
    ("layer", "tokens"), [((window(), "FLASH_ATTN"), 64 + 32), ((STATE, "MAMBA2_ATTN"), 32)]
)
def test_what_a_group_needs(start: Start, layer: tuple, tokens: int) -> None:
    engine = start({"full": (full(), "FLASH_ATTN"), "other": layer}, blocks=64)
    windows = engine.manager.windows
    assert list(windows.values()) == [tokens] and len(engine.pages) == 2


def test_full_attention_needs_everything(start: Start) -> None:
    assert start({"full": (full(), "FLASH_ATTN")}, blocks=64).manager.windows == {}
