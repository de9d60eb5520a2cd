"""Tiers for vLLM's own manager do in ours what every tier must do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from kvstrata.tiers.base import Lookup, SecondaryTier, TierContext  # noqa: E402
from kvstrata.tiers.registry import tier_class, tier_options  # noqa: E402
from kvstrata.tiers.testing import (  # noqa: E402
    CONTEXT,
    REQUEST,
    MakeTier,
    TierContract,
    make_data,
    make_key,
    settle,
    store,
)
from tests.offload.vllm_plugin.foreign_tiers.region_world import FS, made  # noqa: E402
from tests.offload.vllm_plugin.foreign_tiers.rows_of_pages import row_of  # noqa: E402


def foreign(tier: SecondaryTier) -> Any:
    return tier._tier  # type: ignore[attr-defined]


class Tiers(TierContract):
    entry: ClassVar[dict[str, Any]]

    @pytest.fixture
    def make_tier(self, tmp_path: Path) -> Iterator[MakeTier]:
        made: list[SecondaryTier] = []

        def make(context: TierContext) -> SecondaryTier:
            entry = self.entry
            if "Dict" not in entry["type"]:
                entry = {**entry, "root_dir": str(tmp_path / str(len(made)))}
            made.append(tier_class(entry)(tier_options(entry), context))
            return made[-1]

        yield make
        assert all([tier.shutdown(60.0) for tier in made])


class TestDictTier(Tiers):
    """A class of a third party."""

    entry = made("DictTier")

    @pytest.fixture
    def medium(self) -> "Dicts":
        return Dicts()


class TestFs(Tiers):
    """vLLM's own filesystem tier."""

    entry = FS

    @pytest.fixture
    def medium(self) -> "Files":
        return Files()

    def test_lookup(self, make_tier: MakeTier) -> None:
        """Its answer holds until the requests that were given it have ended."""
        tier = make_tier(CONTEXT)
        key = make_key(1)
        assert settle(tier, key) is Lookup.MISS
        store(tier, {key: make_data(1, CONTEXT.layouts[0].nbytes)})
        assert settle(tier, key) is Lookup.MISS
        tier.on_request_finished(REQUEST)
        assert settle(tier, key) is Lookup.HIT
        assert settle(tier, make_key(1, group=1)) is Lookup.MISS


class Dicts:
    def put(self, tier: SecondaryTier, context: TierContext, key: bytes, data: bytes) -> None:
        foreign(tier).rows[key] = row_of(context, key, data)

    def get(self, tier: SecondaryTier, context: TierContext, key: bytes) -> bytes | None:
        row: bytes | None = foreign(tier).rows.get(key)
        return _page(context, key, row)


class Files:
    def put(self, tier: SecondaryTier, context: TierContext, key: bytes, data: bytes) -> None:
        path = Path(foreign(tier).file_mapper.get_file_name(key))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row_of(context, key, data))

    def get(self, tier: SecondaryTier, context: TierContext, key: bytes) -> bytes | None:
        path = Path(foreign(tier).file_mapper.get_file_name(key))
        return _page(context, key, path.read_bytes() if path.exists() else None)


def _page(context: TierContext, key: bytes, row: bytes | None) -> bytes | None:
    layout = context.layouts[int.from_bytes(key[-4:], "big")]
    return row[: layout.nbytes] if row is not None else None
