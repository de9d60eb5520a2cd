"""What a request wishes: `kv_transfer_params.kvstrata`."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from kvstrata.tiers.options import nearest

logger = logging.getLogger("kvstrata.manager")

LONGEST_PIN_S = 86_400.0
KEYS = ("persist", "tiers", "pin_seconds")


@dataclass(frozen=True, slots=True)
class Wishes:
    """A request's wishes, checked.

    Attributes:
        tiers: the secondary tiers that the request's pages are given to; None: all.
        pin_seconds: how long its pages are kept from eviction in the primary tier.
    """

    tiers: frozenset[str] | None = None
    pin_seconds: float = 0.0

    def allow(self, tier: str) -> bool:
        """Whether the request's pages may be given to the tier of this name."""
        return self.tiers is None or tier in self.tiers


NO_WISHES = Wishes()


class WishReader:
    """Reads wishes. A wrong one is ignored, counted, and logged once per key.

    Args:
        tiers: names of the secondary tiers.
    """

    def __init__(self, tiers: Collection[str]) -> None:
        self._tiers = tuple(tiers)
        self._logged: set[str] = set()
        self.ignored = 0

    def read(self, params: Mapping[str, Any]) -> Wishes:
        """The wishes in a request's `kv_transfer_params`; it never raises."""
        wishes = params.get("kvstrata")
        if wishes is None:
            return NO_WISHES
        if not isinstance(wishes, Mapping):
            self._ignore("kvstrata", wishes, 'use an object such as {"persist": false}')
            return NO_WISHES
        tiers = self._read_tiers(wishes["tiers"]) if "tiers" in wishes else None
        if "persist" in wishes:
            persist = wishes["persist"]
            if persist is False:
                tiers = frozenset()
            elif persist is not True:
                self._ignore("persist", persist, "use true or false")
        seconds = self._read_seconds(wishes["pin_seconds"]) if "pin_seconds" in wishes else 0.0
        for key, value in wishes.items():
            if key == "store_fraction":
                # vLLM tells an offloading manager no prompt's length.
                remedy = "send kv_transfer_params.max_offload_tokens, beside kvstrata, instead"
                self._ignore(key, value, remedy)
            elif key not in KEYS:
                remedy = f"the wishes are {', '.join(KEYS)}{nearest(str(key), KEYS)}"
                self._ignore(str(key)[:100], value, remedy)
        return Wishes(tiers, seconds)

    def _read_tiers(self, value: object) -> frozenset[str] | None:
        if isinstance(value, list | tuple) and all(name in self._tiers for name in value):
            return frozenset(value)
        names = ", ".join(self._tiers) or "there are none"
        self._ignore("tiers", value, f"use a list of names of secondary tiers ({names})")
        return None

    def _read_seconds(self, value: object) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and 0.0 <= value <= LONGEST_PIN_S:  # type: ignore[operator]
            return float(value)  # type: ignore[arg-type]
        self._ignore("pin_seconds", value, f"use a number from 0 to {LONGEST_PIN_S:g}")
        return 0.0

    def _ignore(self, key: str, value: object, remedy: str) -> None:
        self.ignored += 1
        if key in self._logged or len(self._logged) >= 100:  # clients choose the keys
            return
        self._logged.add(key)
        logger.warning(
            "kv_transfer_params.kvstrata: %s=%.200r is ignored: %s (logged once; counted "
            "from now on as ignored_wishes)",
            key,
            value,
            remedy,
        )
