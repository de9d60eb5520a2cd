"""What a replay found, in figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstrata.offload.simulate.optimum import most_found
from kvstrata.offload.simulate.scheduler import Scheduler
from kvstrata.offload.simulate.setup import FS, Engine, Setup, build
from kvstrata.offload.simulate.traces import Trace

DAY_S = 86_400.0
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Result:
    """The figures of one configuration. Tiers are `gpu` (vLLM's prefix cache), `cpu` and `fs`.

    Attributes:
        name: of the configuration.
        setup: itself.
        tokens: of all prompts.
        served: tokens that each tier served, of those of all prompts.
        moved: bytes by way: `gpu-cpu`, `cpu-gpu`, `cpu-fs`, `fs-cpu`.
        evicted: pages by tier.
        ttft: seconds by percentile.
        seconds: from the first request's arrival to the last one's end.
    """

    name: str
    setup: Setup
    tokens: int
    served: Mapping[str, int]
    moved: Mapping[str, int] = field(default_factory=dict)
    evicted: Mapping[str, int] = field(default_factory=dict)
    ttft: Mapping[int, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of all prompts' tokens that some tier served."""
        return sum(self.served.values()) / self.tokens

    def rate(self, tier: str) -> float:
        """Share of all prompts' tokens that this tier served."""
        return self.served.get(tier, 0) / self.tokens

    @property
    def written_per_day(self) -> float | None:
        """Bytes written to the fs tier in 24 hours of such requests; None without one."""
        if f"cpu-{FS}" not in self.moved or not self.seconds:
            return None
        return self.moved[f"cpu-{FS}"] / self.seconds * DAY_S

    def to_json(self) -> dict[str, Any]:
        """All of it, with the rates."""
        return {
            "name": self.name,
            "cpu_bytes": self.setup.config.cpu_bytes,
            "fs_bytes": self.setup.disk_bytes,
            "tokens": self.tokens,
            "hit_rate": self.hit_rate,
            "hit_rates": {tier: self.rate(tier) for tier in self.served},
            "tokens_served": dict(self.served),
            "bytes_moved": dict(self.moved),
            "pages_evicted": dict(self.evicted),
            "ttft_s": {f"p{percent}": value for percent, value in self.ttft.items()},
            "seconds": self.seconds,
            "fs_bytes_written_per_day": self.written_per_day,
        }


def simulate(trace: Trace, setup: Setup, engine: Engine) -> Result:
    """Replay a trace.

    Raises:
        ConfigError: not one page fits into the CPU tier.
    """
    world = build(setup, engine)
    scheduler = Scheduler(world, engine)
    scheduler.run(trace.requests)
    counts, counters, disk = scheduler.counts, world.manager.counters, world.disk
    tokens, page = engine.tokens_per_chunk, engine.bytes_per_chunk
    served = {"cpu": counters["primary_hits"] * tokens}
    moved = {
        "gpu-cpu": counters["stored_pages"] * page,
        "cpu-gpu": counters["loaded_pages"] * page,
    }
    evicted = {"cpu": counters["evicted_pages"]}
    if engine.gpu_bytes:
        served = {"gpu": counts.gpu_tokens, **served}
    if disk is not None:
        served[FS] = counters[f"promoted_hits:{FS}"] * tokens
        moved |= {f"cpu-{FS}": disk.written, f"{FS}-cpu": disk.read_bytes}
        evicted[FS] = disk.evicted
    ttft = {percent: _percentile(counts.ttft, percent) for percent in PERCENTILES}
    return Result(setup.name, setup, trace.tokens, served, moved, evicted, ttft, counts.end)


def optimum(trace: Trace, setup: Setup, engine: Engine) -> Result:
    """What could be found at most in as many bytes as all tiers have together."""
    pages = setup.slots(engine) + engine.gpu_bytes // engine.bytes_per_chunk
    if setup.disk_bytes == 0:
        pages = trace.chunks
    elif setup.disk_bytes is not None:
        pages += setup.disk_bytes // engine.bytes_per_chunk
    found = most_found(trace.requests, pages) * engine.tokens_per_chunk
    return Result(f"{setup.sizes}, optimum", setup, trace.tokens, {"all": found})


def _percentile(values: Sequence[float], percent: int) -> float:
    """The least value that so many per cent do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]
