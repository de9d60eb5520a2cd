"""Which tiers are opened, under whose namespace, and what is made of their entries."""

import time
from collections.abc import Mapping
from typing import Any

import pytest

from kvstrata.offload.config.offload_config import OffloadConfig, TierEntry
from kvstrata.offload.secondary.guard import GuardedTier
from kvstrata.offload.secondary.opening import TierOpener, usable_entries
from kvstrata.tiers.base import EPOCH, TierConfigError, TierContext
from kvstrata.tiers.memory import MemoryTier
from kvstrata.tiers.testing import CONTEXT

ENTRY = TierEntry("memory", {"type": "memory"})
CONTEXTS: list[TierContext] = []


class Noted(MemoryTier):
    """Keeps what it was told."""

    def __init__(self, options: Mapping[str, Any], context: TierContext) -> None:
        super().__init__(options, context)
        CONTEXTS.append(context)


def namespaces(*, private: bool) -> list[Mapping[str, Any]]:
    """Those of a tier that is opened three times."""
    CONTEXTS.clear()
    entry = TierEntry("noted", {"type": "Noted", "module_path": __name__})
    opener = TierOpener([entry], CONTEXT, private=private)
    for _ in range(3):
        opener(10.0, time.monotonic)
    return [context.namespace for context in CONTEXTS]


def test_tiers_that_are_opened_again_know_nothing_of_earlier_pages() -> None:
    first, *others = namespaces(private=False)
    assert first == CONTEXT.namespace
    epochs = [namespace[EPOCH] for namespace in others]
    assert [{**first, EPOCH: epoch} for epoch in epochs] == others
    assert len(set(epochs)) == 2


def test_without_fixed_weights_no_opening_shares_pages() -> None:
    epochs = [namespace[EPOCH] for namespace in namespaces(private=True)]
    assert len(set(epochs)) == 3


@pytest.mark.parametrize(
    ("lora", "immutable", "used"),
    [(False, False, True), (True, False, False), (True, True, True)],
)
def test_with_lora_tiers_are_off_unless_the_user_gives_his_word(
    lora: bool, immutable: bool, used: bool, caplog: pytest.LogCaptureFixture
) -> None:
    settings = OffloadConfig(2**20, tiers=(ENTRY,), lora_paths_immutable=immutable)
    assert usable_entries(settings, lora=lora) == ((ENTRY,) if used else ())
    assert ("lora_paths_immutable" in caplog.text) != used


def test_with_lora_nothing_is_said_where_there_are_no_tiers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert usable_entries(OffloadConfig(2**20), lora=True) == ()
    assert not caplog.records


def test_each_tier_is_as_its_entry_says_and_guarded() -> None:
    entry = TierEntry(
        "far",
        {"type": "memory"},
        store_threshold=2,
        max_tracker_size=9,
        kv_events=False,
        locality="REMOTE",
        lookup_deadline_s=2.0,
        promotion_deadline_s=30.0,
    )
    near, far = TierOpener([ENTRY, entry], CONTEXT, private=False)(10.0, time.monotonic)
    assert [type(link.tier) for link in (near, far)] == [GuardedTier] * 2
    assert (near.tier.locality, far.tier.locality) == ("LOCAL", "REMOTE")
    assert (far.name, far.asked._threshold, far.asked._capacity, far.kv_events) == (
        *("far", 2, 9),
        False,
    )
    assert (near.deadline_s, far.deadline_s) == (10.0, 30.0)
    assert (near.lookup_deadline_s, far.lookup_deadline_s) == (None, 2.0)


class OddMedium(MemoryTier):
    medium = "Disk"


class OddLocality(MemoryTier):
    def __init__(self, options: Mapping[str, Any], context: TierContext) -> None:
        super().__init__(options, context)
        self.locality = "Disk"


@pytest.mark.parametrize(("cls", "word"), [(OddMedium, "medium"), (OddLocality, "locality")])
def test_a_tier_with_words_that_vllm_does_not_have_is_refused(
    cls: type[MemoryTier], word: str
) -> None:
    """Else the first request with `kv_load_tiers` would end the engine."""
    entry = TierEntry("odd", {"type": cls.__name__, "module_path": __name__})
    with pytest.raises(TierConfigError, match=f"tier odd: .*{word} = 'Disk'; use "):
        TierOpener([entry], CONTEXT, private=False)(10.0, time.monotonic)
