"""The ring for block ids: what the stream reads is what was put, and the host seldom waits."""

from random import Random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from simulated_device import SimulatedDevice

from kvstrata.kernels.gpu.staging import MetadataRing

CAPACITY = 24
STEPS = st.integers(0, 8)  # of the device, between two uploads


@given(
    puts=st.lists(st.tuples(st.integers(1, CAPACITY), STEPS), max_size=40),
    seed=st.integers(0, 2**32),
)
def test_every_number_arrives_and_only_a_full_ring_waits(
    puts: list[tuple[int, int]], seed: int
) -> None:
    device = SimulatedDevice(Random(seed))
    stream = device.stream(urgent=False)
    ring = MetadataRing(device, stream, CAPACITY)
    assert ring.capacity == CAPACITY
    device.sealed = True
    under_way: dict[int, range] = {}
    read: list[int] = []
    for number, (size, steps) in enumerate(puts):
        sent = np.arange(size) + 1000 * number
        before, busy = device.clock, list(under_way.values())
        there = ring.put(sent)
        start = there.storage_offset()
        place = range(start, start + size)
        if device.clock > before:
            assert any(set(place) & set(other) for other in busy), "waited with room left"
        wanted = torch.from_numpy(sent.copy())
        sent[:] = -1  # the caller's array is its own again

        def look(there=there, wanted=wanted, number=number) -> None:
            assert torch.equal(there, wanted)
            read.append(number)
            del under_way[number]

        under_way[number] = place
        stream.queue.append(look)
        for _ in range(steps):
            device.step()
    while device.step():
        pass
    assert read == list(range(len(puts)))


def test_what_is_left_of_the_last_round_is_not_written_over() -> None:
    """Uploads of 8, 1, 3 and 8 numbers into a ring of 10, none of which was read in between."""
    device = SimulatedDevice(Random(0))
    stream = device.stream(urgent=False)
    ring = MetadataRing(device, stream, 10)
    seen = []
    for number, size in enumerate((8, 1, 3, 8)):
        there = ring.put(np.full(size, number))
        stream.queue.append(lambda there=there: seen.append(there.tolist()))
    while device.step():
        pass
    assert seen == [[0] * 8, [1], [2] * 3, [3] * 8]


def test_events_are_used_again() -> None:
    """Uploads that are done give theirs back, long before the ring comes round."""
    device = SimulatedDevice(Random(0))
    made = []
    new = device.event
    device.event = lambda **_: made.append(new()) or made[-1]  # type: ignore[method-assign]
    ring = MetadataRing(device, device.stream(urgent=False), 10_000)
    for _ in range(100):
        ring.put(np.arange(2))
        while device.step():
            pass
    assert len(made) <= 2
