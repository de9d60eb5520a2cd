"""The manager's world, with its pages in shared memory, and foreign tiers as an engine has them."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvstrata.offload.finding.lookup import Answer
from kvstrata.offload.secondary.guard import GuardedTier
from kvstrata.offload.vllm_plugin.foreign_tiers.rows import Rows
from kvstrata.tiers.base import RequestView, TierContext
from kvstrata.tiers.registry import tier_class, tier_options
from tests.offload.manager_world import CONTEXT, PAGE, World
from tests.offload.vllm_plugin.foreign_tiers.rows_of_pages import make_region
from tests.waiting import wait_until

HERE = "tests.offload.vllm_plugin.foreign_tiers.made_for_vllm"
FS = {"type": "FileSystemTierManager", "module_path": "vllm.v1.kv_offload.tiering.fs.manager"}
EXAMPLE = {"type": "example"}


def made(name: str, **options: Any) -> dict[str, Any]:
    """An entry for one of the tiers in made_for_vllm.py."""
    return {"type": name, "module_path": HERE, **options}


class RegionWorld(World):
    """A world with a tier for each entry of `secondary_tiers`.

    Attributes:
        foreign: the tiers themselves, as they were made for vLLM.
    """

    def __init__(
        self,
        *entries: Mapping[str, Any],
        slots: int = 8,
        namespace: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        region = make_region(slots)
        self.rows = Rows(region)
        self.context: TierContext = replace(CONTEXT, region=region, namespace=namespace or {})
        opened = [tier_class(each)(tier_options(each), self.context) for each in entries]
        os.close(region.fd)
        self.foreign: list[Any] = [tier._tier for tier in opened]  # type: ignore[attr-defined]
        guarded = [
            GuardedTier(str(each["type"]), t) for each, t in zip(entries, opened, strict=True)
        ]
        super().__init__(guarded, slots, **more)
        self.memory = [self.rows.page(slot, PAGE) for slot in range(slots)]  # type: ignore[misc]

    def settle(self, item: tuple[bytes, int], request: RequestView) -> Answer:
        """Look a page up, step by step, until it is here or will not come."""
        answer = Answer.RETRY

        def is_settled() -> bool:
            nonlocal answer
            answer = self.lookup(item, request)
            self.step()
            return answer in (Answer.HIT, Answer.MISS)

        wait_until(is_settled)
        return answer

    def finish(self) -> None:
        """Let all jobs end."""

        def is_idle() -> bool:
            self.step()
            return not len(self.manager._jobs)

        wait_until(is_idle)

    def forget(self) -> None:
        """Have the primary tier lose all its pages, and its slots their bytes."""
        self.manager.reset()
        for page in self.memory:
            page[:] = b"\xee" * PAGE

    def loaded(self, item: tuple[bytes, int], request: RequestView) -> bytes:
        """The bytes of a page that was a hit."""
        (slot,) = self.manager.prepare_load([item[0]], request)
        found = bytes(self.memory[slot])
        self.manager.complete_load([item[0]], request)
        return found
