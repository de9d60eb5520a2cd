"""The line of the log that says whether it pays."""

import logging

import pytest

from kvstrata.offload.metering.found import Takings
from kvstrata.offload.metering.minute import MinuteLog, Told
from tests.waiting import wait_until

GIB = 2.0**30
HELD = {"primary": (GIB, 8 * GIB), "fs": (3 * GIB, 0.0)}


def test_a_line_while_there_is_traffic(caplog: pytest.LogCaptureFixture) -> None:
    now, saved = [0.0], [None, 12.5]
    takings: dict[str | None, Takings] = {None: Takings(), "fs": Takings()}
    log = MinuteLog(0.0, lambda: Told(takings, saved[0], HELD), lambda: now[0])
    lines = []
    with caplog.at_level(logging.INFO, "kvstrata"):
        for minute in range(1, 6):
            now[0] = 60.0 * minute
            if minute == 2:
                takings[None].query_chunks, takings[None].hit_chunks = 2000, 1500
                takings["fs"].hit_chunks = 7
            if minute == 4:
                takings[None].query_chunks += 1
                saved.pop(0)
            log.look()
            lines += [(minute, record.getMessage()) for record in caplog.records]
            caplog.clear()
    held = "held: primary 1.0 GiB of 8.0 GiB, fs 3.0 GiB"
    assert lines == [
        (
            2,
            "kvstrata: in 60 s 1,507 of 2,000 chunks were found (primary 1,500, fs 7); prefill "
            f"saved, less waits: not known yet; {held}",
        ),
        (
            4,
            "kvstrata: in 60 s 0 of 1 chunks were found (primary 0, fs 0); prefill saved, less "
            f"waits: 12.5 s; {held}",
        ),
    ]


@pytest.mark.parametrize("every_s", [0.0, 0.01])
def test_a_thread_logs_unless_none_is_wanted(
    every_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Also when nothing happens any more; and not after its end."""
    asked = [0]

    def ask() -> Told:
        asked[0] += 1
        return Told({None: Takings(query_chunks=5)}, 0.0, HELD)

    with caplog.at_level(logging.INFO, "kvstrata"):
        log = MinuteLog(every_s, ask)
        if every_s:
            wait_until(lambda: asked[0] > 2)
        log.close()
    assert len(caplog.records) == bool(every_s)
