"""As much of torch.cuda as the benchmark uses, where every stream is done at once."""

import time
from contextlib import nullcontext
from typing import Any


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        assert self.time, "waited for an event that nobody recorded"

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.time - self.time)


class Stream:
    def __init__(self, device: object = None) -> None:
        self.behind = 0

    def wait_stream(self, other: "Stream") -> None:
        self.behind += 1

    def synchronize(self) -> None:
        pass


def current_stream() -> Stream:
    return Stream()


def stream(stream: Stream) -> Any:
    assert stream.behind, "does not wait for the model"
    return nullcontext()


def synchronize(device: object = None) -> None:
    pass
