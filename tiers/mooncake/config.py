"""The options of the mooncake tier."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

from kvstrata.tiers.base import TierConfigError
from kvstrata.tiers.options import (
    WrongValue,
    option,
    parse_bytes,
    parse_choice,
    parse_number,
)
from kvstrata.tiers.process.medium import LEAST_TIMEOUT_S

DEFAULT_PORT = 50051
LEAST_SEGMENT = 16 * 2**20  # what the client lends at least
_EXAMPLE = '"mooncake-master:50051"'
_ADDRESS = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?::([0-9]{1,5}))?")
# A store asks the master three times and moves the page once, and no call may come near the 30 s
# after which its process is replaced.
_MOST_TIMEOUT_S = 5.0


def _master(key: str, value: object) -> str:
    match = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    port = int((match and match[2]) or DEFAULT_PORT)
    if match is None or not 0 < port < 2**16:
        raise WrongValue(key, value, f"{_EXAMPLE}, without anything before or behind it")
    return f"{match[1]}:{port}"


def _segment(key: str, value: object) -> int:
    nbytes = parse_bytes(key, value, zero=True)
    if 0 < nbytes < LEAST_SEGMENT:
        raise TierConfigError(f'{key}: {value!r} is too little; give 0, or "16MiB" and more')
    return nbytes


@dataclass(frozen=True, slots=True)
class MooncakeOptions:
    """Options of the mooncake tier, checked. `segment` is in bytes."""

    master: str = option(
        _master,
        f"the address of `mooncake_master`, for example {_EXAMPLE}",
        other_names="url host port address server endpoint mooncake_master master_address "
        "master_server_address master_server_addr",
    )
    segment: int = option(
        _segment,
        "memory that this engine lends to the pool, for the pages of all, beside its CPU tier: "
        '`"64GiB"`; 0: none, and others must',
        0,
        other_names="segment_size global_segment_size global_segment max_bytes size capacity",
    )
    protocol: str = option(
        partial(parse_choice, choices=("tcp", "rdma")),
        "`tcp`, or `rdma` with all of the machine's devices for it",
        "tcp",
        other_names="transport transfer_protocol",
    )
    timeout_s: float = option(
        partial(parse_number, least=LEAST_TIMEOUT_S, most=_MOST_TIMEOUT_S),
        "seconds until the master must have answered, and until a process that lends memory must "
        "go on with a page, in whole seconds; then it counts as failed, and what was asked for as "
        "a miss",
        3.0,
        other_names="timeout request_timeout connect_timeout rpc_timeout timeout_ms",
    )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the master."""
        host, _, port = self.master.rpartition(":")
        return host, int(port)
