"""Tenants that vLLM's `cache_salt` separates are separated on the disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.utils.hashing import get_hash_fn_by_name  # noqa: E402
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash  # noqa: E402
from vllm.v1.kv_offload.base import make_offload_key  # noqa: E402
from vllm.v1.request import Request  # noqa: E402

from kvstrata.tiers.base import Lookup  # noqa: E402
from kvstrata.tiers.fs.tier import FsTier  # noqa: E402
from kvstrata.tiers.testing import CONTEXT, load, make_data, settle, store  # noqa: E402

BLOCK, BLOCKS = 16, 4
SIZE = CONTEXT.layouts[0].nbytes
ALGORITHMS = ["sha256", "sha256_cbor"]


def keys_of(salt: str | None, algorithm: str) -> list[bytes]:
    """The offload keys of one and the same prompt."""
    hash_function: Any = get_hash_fn_by_name(algorithm)
    init_none_hash(hash_function)
    request = Request(
        request_id="request",
        prompt_token_ids=list(range(BLOCK * BLOCKS)),
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        cache_salt=salt,
        block_hasher=get_request_block_hasher(BLOCK, hash_function),
    )
    keys = [make_offload_key(found, 0) for found in request.block_hashes]
    assert len(keys) == BLOCKS
    return [bytes(key) for key in keys]


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[FsTier]:
    tier = FsTier({"root_dir": str(tmp_path / "root")}, CONTEXT)
    yield tier
    assert tier.shutdown(60.0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_block_of_another_salt_has_another_key(algorithm: str) -> None:
    salts = [None, "tenant a", "tenant b"]
    found = [keys_of(salt, algorithm) for salt in salts]
    assert found == [keys_of(salt, algorithm) for salt in salts]  # the same in every engine
    assert len({key for keys in found for key in keys}) == len(salts) * BLOCKS


def test_a_tenant_finds_only_its_own_files(tier: FsTier) -> None:
    ours, theirs = (keys_of(salt, "sha256") for salt in ("tenant a", "tenant b"))
    paths = tier.paths[0]
    assert not {paths.page(key) for key in ours} & {paths.page(key) for key in theirs}
    data = {key: make_data(n, SIZE) for n, key in enumerate(ours)}
    assert not store(tier, data).failed
    for key in theirs:
        assert settle(tier, key) is Lookup.MISS
    result, arrived = load(tier, theirs)
    assert result.failed == dict.fromkeys(theirs, "missing") and not arrived
    assert load(tier, ours)[1] == data


def test_a_page_is_found_by_the_whole_key_alone(tier: FsTier) -> None:
    """Hashes that differ in one bit, also in the part that no directory is named after."""
    key = keys_of("tenant a", "sha256")[0]
    assert not store(tier, {key: make_data(1, SIZE)}).failed
    for position in range(len(key) - 4):
        near = bytearray(key)
        near[position] ^= 1
        assert settle(tier, bytes(near)) is Lookup.MISS
        assert bytes(near) in load(tier, [bytes(near)])[0].failed
    assert settle(tier, key) is Lookup.HIT
