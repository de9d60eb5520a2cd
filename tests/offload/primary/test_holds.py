"""Pages that requests asked to keep; what they are told of is in test_manager.py."""

from kvstrata.offload.primary.eviction.order import Use
from kvstrata.offload.primary.eviction.policy import LRU
from kvstrata.offload.primary.holds import Holds
from kvstrata.offload.primary.slots import Entry, Hold, PrimaryTier, Writer


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make(slots: int, share: float) -> tuple[PrimaryTier, Holds, Clock, list[Entry]]:
    primary = PrimaryTier(slots, LRU(slots, {}))
    clock = Clock()
    pages = [(bytes([n]) * 8, n) for n in range(slots)]
    entries, _ = primary.allocate(pages, Writer.GPU, Use(), must=False)
    primary.finish_writes(entries, good=True)
    return primary, Holds(primary, share, clock), clock, entries


def test_pinned_pages_stay_until_their_time() -> None:
    primary, holds, clock, entries = make(4, 1.0)
    assert holds.pin(entries[:2], 10.0) == 0
    assert primary.idle == 2
    clock.now = 9.9
    holds.end_step()
    assert primary.idle == 2
    clock.now = 10.0
    holds.end_step()
    assert (primary.idle, primary.held[Hold.PIN]) == (4, 0)


def test_the_longer_pin_stays() -> None:
    primary, holds, clock, entries = make(2, 1.0)
    holds.pin(entries[:1], 10.0)
    holds.pin(entries[:1], 5.0)
    clock.now = 7.0
    holds.pin(entries[:1], 20.0)
    for clock.now, idle in ((10.0, 1), (26.9, 1), (27.0, 2)):
        holds.end_step()
        assert primary.idle == idle


def test_what_exceeds_the_share_is_not_pinned() -> None:
    primary, holds, clock, entries = make(4, 0.5)
    assert holds.pin(entries, 10.0) == 2
    assert primary.idle == 2
    assert holds.pin(entries[:3], 20.0) == 1, "those that are pinned may be pinned longer"
    clock.now = 10.0
    holds.end_step()
    assert primary.held[Hold.PIN] == 2


def test_holds_use_no_more_memory_than_pages() -> None:
    _, holds, clock, entries = make(2, 1.0)
    for clock.now in range(1000):
        holds.pin(entries, 100.0)
        holds.end_step()
    assert len(holds._ends) == 2


def test_a_reset_ends_pins() -> None:
    primary, holds, clock, entries = make(2, 1.0)
    holds.pin(entries, 10.0)
    holds.reset()
    assert primary.idle == 2
    clock.now = 11.0
    holds.end_step()
    assert primary.idle == 2
