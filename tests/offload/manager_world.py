"""A manager without an engine: pages in plain memory, a clock that stands still."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from kvstrata.offload.audit.comparer import Compared, Comparer
from kvstrata.offload.audit.comparison import Elements, compare
from kvstrata.offload.config.offload_config import OffloadConfig
from kvstrata.offload.finding.lookup import Answer
from kvstrata.offload.manager import TieringManager
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.tiers.base import PageLayout, RequestView, SecondaryTier, TensorSpec, TierContext

PAGE = 64  # bytes
TOKENS = 32
LAYOUTS = {group: PageLayout((TensorSpec("kv", "U8", (PAGE,)),), TOKENS) for group in (0, 1)}
CONTEXT = TierContext("model", {}, LAYOUTS)
ELEMENTS = {group: [Elements(PAGE, "U8", PAGE, 1)] for group in LAYOUTS}


class InlineComparer(Comparer):
    """Compares when it is told to."""

    def submit(self, group: int, computed: memoryview, served: memoryview) -> Future[Compared]:
        found: Future[Compared] = Future()
        found.set_result(Compared(compare(computed, served, self._elements[group]), 0.0))
        return found


def chunk(prefix: int, index: int, group: int = 0) -> tuple[bytes, int]:
    """Key and end token of a prefix's chunk."""
    return bytes([0xAA, prefix, index]) + group.to_bytes(4, "big"), (index + 1) * TOKENS


def content(key: bytes, epoch: int = 0) -> bytes:
    """The bytes that a key stands for; `epoch` counts changes of the weights."""
    return key + bytes(byte ^ (0x5B * epoch & 0xFF) for byte in key * PAGE)[: PAGE - len(key)]


@dataclass
class World:
    """A `TieringManager`, its slots and its clock."""

    tiers: Sequence[SecondaryTier]
    slots: int = 8
    config: OffloadConfig = field(default_factory=lambda: OffloadConfig(cpu_bytes=1))
    weights_fixed: bool = True
    reopen: Callable[[], Sequence[SecondaryTier]] | None = None
    thresholds: Sequence[int] = ()  # of the tiers; 0 where there is none
    weights_changed: Callable[[], bool] | None = None
    audited: bool = False
    ready: int | None = None  # slots that can be used by now; None: all
    epoch: int = 0  # of what the GPU computes
    layouts: Mapping[int, PageLayout] = field(default_factory=lambda: LAYOUTS)
    ways: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)  # see `TierLink`, by index

    def __post_init__(self) -> None:
        self.memory = [bytearray(b"\xee" * PAGE) for _ in range(self.slots)]
        self.incomplete: set[int] = set()
        self.now = 0.0
        self.opened = 0
        self.manager = TieringManager(
            self.config,
            self.slots,
            self.layouts,
            lambda slot, nbytes: memoryview(self.memory[slot])[:nbytes],
            lambda slot: slot not in self.incomplete,
            self._open,
            InlineComparer(ELEMENTS) if self.audited else None,
            weights_fixed=self.weights_fixed,
            weights_changed=self.weights_changed,
            ready=lambda: self.slots if self.ready is None else self.ready,
            clock=lambda: self.now,
        )

    def _open(self, deadline_s: float, clock: Callable[[], float]) -> list[TierLink]:
        tiers = self.reopen() if self.opened and self.reopen else self.tiers
        self.opened += 1
        thresholds = [*self.thresholds, *[0] * len(tiers)]
        return [
            TierLink(
                f"tier{index}",
                tier,
                index,
                **{
                    "deadline_s": deadline_s,
                    "clock": clock,
                    "medium": "STORAGE",
                    "store_threshold": thresholds[index],
                    **self.ways.get(index, {}),
                },
            )
            for index, tier in enumerate(tiers)
        ]

    def request(
        self,
        req_id: str = "r",
        tiers: frozenset[str] | None = None,
        wishes: object = None,
        **params: object,
    ) -> RequestView:
        view = RequestView(req_id, {"kvstrata": wishes, **params}, tiers)
        self.manager.on_new_request(view)
        return view

    def lookup(self, item: tuple[bytes, int], request: RequestView) -> Answer:
        return self.manager.lookup(*item, request)

    def store(self, items: Sequence[tuple[bytes, int]], request: RequestView) -> None:
        """Store the pages for good, GPU transfer included."""
        plan = self.manager.prepare_store(items, request)
        assert plan is not None
        for key, slot in zip(plan.keys, plan.slots, strict=True):
            self.memory[slot][:] = content(key, self.epoch)
        if plan.keys:
            self.manager.complete_store(set(plan.keys), request)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.manager.on_step_end()
