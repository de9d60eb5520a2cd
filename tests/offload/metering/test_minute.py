"""The line of the log that says whether it pays."""

import logging

import pytest

from kvstrata.offload.metering.found import Takings
from kvstrata.offload.metering.minute import MinuteLog

GIB = 2.0**30
HELD = {"primary": (GIB, 8 * GIB), "fs": (3 * GIB, 0.0)}


def test_a_line_while_there_is_traffic(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    log = MinuteLog(60.0, lambda: now[0])
    takings: dict[str | None, Takings] = {None: Takings(), "fs": Takings()}
    lines = []
    with caplog.at_level(logging.INFO, "kvstrata"):
        for second in range(0, 400, 10):
            now[0] = float(second)
            if second == 70:
                takings[None].query_chunks, takings[None].hit_chunks = 2000, 1500
                takings["fs"].hit_chunks = 7
            log.look(takings, None if second < 200 else 12.5, HELD)
            lines += [(second, record.getMessage()) for record in caplog.records]
            caplog.clear()
    assert lines == [
        (
            120,
            "kvstrata: in 60 s 1,507 of 2,000 chunks were found (primary 1,500, fs 7); prefill "
            "saved, less waits: not known yet; held: primary 1.0 GiB of 8.0 GiB, fs 3.0 GiB",
        )
    ]


def test_none_where_none_is_wanted(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    log = MinuteLog(0.0, lambda: now[0])
    with caplog.at_level(logging.INFO, "kvstrata"):
        for second in range(200):
            now[0] = float(second)
            log.look({None: Takings(query_chunks=second)}, 0.0, HELD)
    assert not caplog.records
