"""Look: one engine's metrics at two times, and what is found wrong in them."""

from __future__ import annotations

from dataclasses import dataclass

from kvstrata.offload.cli.server.scrape import Scrape
from kvstrata.offload.metering.names import CAPACITY, CAPACITY_TOKENS, INFO, PRIMARY, SLOTS

_CACHE = "vllm:cache_config_info"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong, or could not be judged.

    Attributes:
        fault: what it is, in a word or two; the same for each find of its kind.
        about: the tier, or what else it is about.
        found: what is wrong, with the figures, in a sentence.
        remedy: what to change, with the configuration's key, in a sentence.
        wrong: False if the operator should know it, and nothing need be changed.
    """

    fault: str
    about: str
    found: str
    remedy: str
    wrong: bool = True


@dataclass(frozen=True, slots=True)
class Look:
    """One engine, read twice.

    Attributes:
        engine: its number in the server.
        engines: how many the server has.
    """

    before: Scrape
    after: Scrape
    engine: str = "0"
    engines: int = 1

    @property
    def name(self) -> str:
        """The server, and which engine of it if there are several."""
        return self.after.url + (f" engine {self.engine}" if self.engines > 1 else "")

    @property
    def model(self) -> str:
        """The served model's name."""
        return self.after.label(INFO, "model_name")

    @property
    def seconds(self) -> float:
        """Between the two reads."""
        return self.after.when - self.before.when

    def tiers(self) -> list[str]:
        """The secondary tiers, by name."""
        return self.after.tiers()

    def total(self, name: str, **labels: str) -> float:
        """A counter since the engine's start, or the sum of gauges."""
        return self.after.total(name, **labels)

    def gauge(self, name: str, **labels: str) -> float | None:
        """A present value, None where there is none."""
        return self.after.largest(name, **labels)

    def grew(self, name: str, **labels: str) -> float:
        """How much a counter grew between the reads; after a restart, from zero."""
        before, after = self.before.total(name, **labels), self.after.total(name, **labels)
        return after - before if after >= before else after

    @property
    def ours(self) -> bool:
        """Whether kvstrata's manager runs, and not only its tiers behind vLLM's own."""
        return INFO in self.after.samples

    def bytes_per_token(self) -> float | None:
        """What a token's pages take in the tiers; None where it is not known."""
        tokens, capacity = self.gauge(CAPACITY_TOKENS), self.gauge(CAPACITY, tier=PRIMARY)
        slots = sum(self.total(SLOTS, state=state) for state in ("free", "idle", "busy"))
        missing = self.total(SLOTS, state="not_ready")
        if not (tokens and capacity and slots):
            return None
        # room is counted where there is memory already, bytes are of the whole
        return capacity * slots / (slots + missing) / tokens

    def gpu_tokens(self) -> float | None:
        """Tokens for which the GPU's cache has room; None where vLLM does not tell it."""
        tokens = self.after.label(_CACHE, "kv_cache_size_tokens")
        if tokens.isdecimal():
            return float(tokens)
        blocks = self.after.label(_CACHE, "num_gpu_blocks")
        size = self.after.label(_CACHE, "block_size")
        if blocks.isdecimal() and size.isdecimal():
            return int(blocks) * int(size) / self.engines  # vLLM adds up its engines' blocks
        return None
