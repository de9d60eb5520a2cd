"""Many sizes of the tiers, and the cheapest of them that is good enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from kvstrata.offload.simulate.costs import TIERS, Prices
from kvstrata.offload.simulate.results import Result
from kvstrata.offload.simulate.setup import parse_size
from kvstrata.tiers.options import ConfigError, WrongValue, nearest

# A range that begins at nothing goes on with so many halvings of its end: powers of two have no
# beginning of their own.
_HALVINGS = 3


def pairs(option: str, text: str, known: Sequence[str]) -> dict[str, str]:
    """The values of "name=value,name=value".

    Raises:
        ConfigError: it is none, or has a name twice, or one that is not known.
    """
    found: dict[str, str] = {}
    for each in text.split(","):
        name, equals, value = (part.strip() for part in each.partition("="))
        if name not in known:
            names = f"{', '.join(known)}{nearest(name, known)}"
            raise ConfigError(f"{option}: {each.strip()!r} is wrong; give name=value of {names}")
        if not equals or not value:
            raise ConfigError(f"{option}: {each.strip()!r} has no value; give {name}=VALUE")
        if name in found:
            raise ConfigError(f"{option}: {name} is given twice; give it once")
        found[name] = value
    return found


def sizes(tier: str, text: str) -> list[int]:
    """Sizes in bytes: one, or the powers of two times the first from "8GiB..512GiB".

    Raises:
        TierConfigError: it is neither.
    """
    first, dots, last = text.partition("..")
    key = f"--sweep {tier}"
    begin = parse_size(key, first, zero=tier != "cpu")
    if not dots:
        return [begin]
    end = parse_size(key, last)
    if end < begin:
        raise WrongValue(key, text, "the smaller size first")
    found = [begin] if begin else [0]
    size = 2 * begin if begin else max(1, end >> _HALVINGS)
    while size < end:
        found.append(size)
        size *= 2
    return found + [end] * (found[-1] != end)


def grid(text: str) -> Iterator[Mapping[str, int]]:
    """The sizes of the tiers, each with each, of "cpu=8GiB..512GiB,fs=0..8TiB".

    Raises:
        ConfigError: it is no such text.
    """
    ranges = {tier: sizes(tier, value) for tier, value in pairs("--sweep", text, TIERS).items()}
    for point in product(*ranges.values()):
        yield dict(zip(ranges, point, strict=True))


@dataclass(frozen=True)
class Target:
    """What is good enough: the least share of tokens found, the longest p90 of TTFT, or both."""

    hit_rate: float | None = None
    ttft_s: float | None = None

    def __str__(self) -> str:
        words = []
        if self.hit_rate is not None:
            words.append(f"a hit rate of {self.hit_rate:g}")
        if self.ttft_s is not None:
            words.append(f"a p90 TTFT of {self.ttft_s:g} s")
        return " and ".join(words)

    def is_met(self, result: Result) -> bool:
        """Whether a configuration, not an optimum, is good enough."""
        if not result.ttft:
            return False
        return (self.hit_rate is None or result.hit_rate >= self.hit_rate) and (
            self.ttft_s is None or result.ttft[90] <= self.ttft_s
        )


def cheapest(results: Sequence[Result], prices: Prices, target: Target) -> Result | None:
    """The configuration that costs least of those that are good enough; None if none is."""
    return min(filter(target.is_met, results), key=prices.of, default=None)
