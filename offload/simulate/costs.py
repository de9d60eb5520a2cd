"""What tiers cost: money by their size, and what writing takes from an SSD's life."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvstrata.offload.simulate.results import Result
from kvstrata.offload.simulate.setup import FS, Setup, parse_size
from kvstrata.tiers.options import ConfigError, WrongValue, parse_bytes

TIERS = ("cpu", FS)
WARRANTY_DAYS = 5 * 365  # for which the makers of SSDs promise the terabytes written
_DWPD = re.compile(r"([0-9]{1,4}(?:\.[0-9]{1,4})?) ?x ?(.+)")
_PRICE = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?) ?/ ?([A-Za-z]+)")


@dataclass(frozen=True)
class Prices:
    """What a byte of each tier costs, in any currency."""

    per_byte: Mapping[str, float]

    def check(self, setups: Iterable[Setup]) -> None:
        """That each of these has a price.

        Raises:
            ConfigError: one has a tier without a price or without a size.
        """
        for setup in setups:
            for tier in _sizes(setup).keys() - self.per_byte.keys():
                raise ConfigError(
                    f"--price: that of {tier} is missing, which {setup.name!r} has; give "
                    f"{tier}=PRICE too"
                )
            if setup.disk_bytes == 0:
                raise ConfigError(
                    f"--price: {FS} of {setup.name!r} has no size; give it max_bytes, or leave "
                    "--price out"
                )

    def of(self, result: Result) -> float:
        """What the tiers of a configuration cost."""
        return sum(size * self.per_byte[tier] for tier, size in _sizes(result.setup).items())


def _sizes(setup: Setup) -> Mapping[str, int]:
    """Bytes of each tier that there is."""
    cpu, disk = setup.config.cpu_bytes, setup.disk_bytes
    return {"cpu": cpu} if disk is None else {"cpu": cpu, FS: disk}


def parse_price(tier: str, text: str) -> float:
    """What a byte costs, from a text such as "4/GiB".

    Raises:
        TierConfigError: it is no price.
    """
    match = _PRICE.fullmatch(text.strip())
    if match is None:
        raise WrongValue(f"price of {tier}", text, 'an amount and a unit, such as "4/GiB"')
    return float(match[1]) / parse_bytes(f"price of {tier}", f"1{match[2]}")


def parse_endurance(text: str) -> float:
    """Bytes that an SSD may be written each day: of "7PB", over the five years of a warranty, or of
    "1x3.84TB", drive writes a day and capacity.

    Raises:
        TierConfigError: it is neither.
    """
    match = _DWPD.fullmatch(text.strip())
    if match is not None:
        if not float(match[1]):
            raise WrongValue("endurance", text, "drive writes a day that are more than 0")
        return float(match[1]) * parse_size("endurance", match[2])
    return parse_size("endurance", text) / WARRANTY_DAYS
