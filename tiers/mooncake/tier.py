"""The mooncake tier: pages in memory that machines lend each other, kept by a `mooncake_master`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvstrata.tiers.base import PageRegion, TierConfigError, TierContext
from kvstrata.tiers.machine.memory import available_memory, untaken_memory
from kvstrata.tiers.mooncake.config import MooncakeOptions
from kvstrata.tiers.mooncake.rdma import DEVICES, NODES, has_device
from kvstrata.tiers.options import format_bytes, parse_options
from kvstrata.tiers.process.medium import MediumSpec
from kvstrata.tiers.process.probe import ask, check_client
from kvstrata.tiers.process.tier import ProcessTier

_THREADS = 4  # the client moves all bytes in one thread of its own: more would only wait


class MooncakeTier(ProcessTier):
    """Pages as values of a pool; for the options see `MooncakeOptions`."""

    medium = "STORAGE"
    locality = "REMOTE"
    Options = MooncakeOptions
    name = "mooncake"
    rejects = True

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """See `SecondaryTier.check_options`; the client must be there."""
        _parse(options)

    def __init__(self, options: Mapping[str, Any], context: TierContext) -> None:
        """See `SecondaryTier.__init__`."""
        parsed = _parse(options)
        _check_protocol(parsed.protocol)
        _check_memory(parsed.segment, context.region)
        _check_pool(parsed)
        medium = MediumSpec("kvstrata.tiers.mooncake.medium:MooncakeMedium", parsed, noisy=True)
        super().__init__(context, [medium], _THREADS, _THREADS)


def _parse(options: Mapping[str, Any]) -> MooncakeOptions:
    parsed = parse_options(MooncakeOptions, options, "mooncake tier")
    check_client("mooncake", "mooncake", "mooncake-transfer-engine-non-cuda")
    return parsed


def _check_protocol(protocol: str) -> None:
    """Whether the library will use what it is told to.

    Raises:
        TierConfigError: it would take another.
    """
    if protocol == "rdma" and not has_device():
        raise TierConfigError(
            f"protocol: 'rdma' needs a device below {DEVICES} with an active port, and the right "
            f'to open it below {NODES}; there is none: give "tcp"'
        )


def _check_memory(segment: int, region: PageRegion | None) -> None:
    """Whether there is memory for what is to be lent beside the CPU tier.

    Raises:
        TierConfigError: there is not.
    """
    rest = 0
    if region is not None:
        rest = untaken_memory(region.fd, region.offset + region.slots * region.slot_bytes)
    free = max(0, available_memory() - rest)
    if segment > free:
        raise TierConfigError(
            f"segment: {format_bytes(segment)} do not fit into memory, of which "
            f'{format_bytes(free)} can be had beside the CPU tier; give at most "{free >> 20}MiB", '
            "lower cpu_bytes_to_use, or give the machine more"
        )


def _check_pool(options: MooncakeOptions) -> None:
    """Whether the pool can be used.

    Raises:
        TierConfigError: it cannot.
    """
    try:
        error = ask("kvstrata.tiers.mooncake.probe", options, 6 * options.timeout_s).get("error")
    except OSError as failure:
        raise TierConfigError(f"mooncake tier: the pool cannot be asked ({failure})") from failure
    if error and "cannot open shared object file" in error:
        raise TierConfigError(
            f"mooncake tier: its client cannot be loaded ({error}); install that library, for "
            "example with `apt-get install libibverbs1`, which it needs also over TCP"
        )
    if error:
        raise TierConfigError(
            f"master: {options.master!r} cannot be used ({error}); start mooncake_master, or "
            "correct master, protocol and timeout_s"
        )
