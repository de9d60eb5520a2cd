"""What is simulated: a configuration, the model's pages, and how fast everything is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvstrata.offload.config.offload_config import OffloadConfig, parse_config
from kvstrata.offload.manager import TieringManager
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.offload.simulate.clock import Clock
from kvstrata.offload.simulate.disk import ModelledDisk
from kvstrata.offload.simulate.s3_fifo import NAME as S3_FIFO
from kvstrata.tiers.base import PageLayout, TensorSpec
from kvstrata.tiers.options import ConfigError, WrongValue, format_bytes, parse_bytes

FS = "fs"  # the one secondary tier that is simulated
POLICIES = {S3_FIFO: "s3-fifo"}  # names of policies that are not the engine's
# Keys that the name of a setup says, or need not
_NAMED = ("spec_name", "cpu_bytes_to_use", "secondary_tiers", "eviction_policy")
_ALIGNED = 4096  # slots are multiples of it
_NO_ROOT = "/simulated"  # where nobody says; no file is touched


@dataclass(frozen=True)
class Speeds:
    """How fast the engine and its tiers are.

    Attributes:
        prefill: tokens/s that one server computes.
        decode: tokens/s that a request generates.
        gpu: bytes/s between GPU and CPU memory, each way.
        read, write: bytes/s of the disk.
        latency: of one of its jobs, in seconds.
    """

    prefill: float = 10_000.0
    decode: float = 50.0
    gpu: float = 25e9
    read: float = 3e9
    write: float = 2e9
    latency: float = 0.0005


@dataclass(frozen=True)
class Engine:
    """What the configurations that are compared have in common.

    Attributes:
        tokens_per_chunk, bytes_per_chunk: of each page.
        gpu_bytes: of vLLM's prefix cache in GPU memory; 0: none.
        servers: how many compute prefills at once, over the same tiers.
        speeds: of all.
    """

    tokens_per_chunk: int
    bytes_per_chunk: int
    gpu_bytes: int = 0
    servers: int = 1
    speeds: Speeds = Speeds()


@dataclass(frozen=True)
class Setup:
    """One configuration to be simulated.

    Attributes:
        config: as the engine would have it.
        disk_bytes: the budget of the fs tier, 0 for none; None without such a tier.
        more: what else was given, as words.
    """

    config: OffloadConfig
    disk_bytes: int | None
    more: Sequence[str] = ()

    @property
    def sizes(self) -> str:
        """Those of its tiers, in words."""
        cpu, disk = f"cpu {format_bytes(self.config.cpu_bytes)}", self.disk_bytes
        if disk is None:
            return cpu
        return f"{cpu}, {FS} {format_bytes(disk) if disk else 'without limit'}"

    @property
    def name(self) -> str:
        """What tells it from others, in a few words."""
        policy = self.config.eviction_policy
        words = [self.sizes, POLICIES.get(policy, policy)]
        return ", ".join([*words, *self.more])

    def slots(self, engine: Engine) -> int:
        """Pages of the CPU tier.

        Raises:
            ConfigError: not one fits.
        """
        page = -(-engine.bytes_per_chunk // _ALIGNED) * _ALIGNED
        if self.config.cpu_bytes < page:
            raise ConfigError(
                f"cpu_bytes_to_use: {format_bytes(self.config.cpu_bytes)} is less than one page "
                f"takes, which is {format_bytes(page)}; give more"
            )
        return self.config.cpu_bytes // page


def parse_size(key: str, text: str, *, zero: bool = False) -> int:
    """As `parse_bytes`, but a number without a unit, which nobody means as bytes, is refused.

    Raises:
        TierConfigError: it is no size, or has no unit.
    """
    nbytes = parse_bytes(key, text, zero=zero)
    if nbytes and not text.strip()[-1].isalpha():
        raise WrongValue(key, text, f'a unit too, such as "{text.strip()}GB"')
    return nbytes


def parse_setup(extra: Mapping[str, Any]) -> Setup:
    """A setup from a `kv_connector_extra_config`.

    The root_dir of its fs tier may be left out; nothing is read or written there.

    Raises:
        ConfigError: for the first thing that is wrong, or cannot be simulated.
    """
    entries = extra.get("secondary_tiers", ())
    if isinstance(entries, Sequence) and all(isinstance(each, Mapping) for each in entries):
        types = [each.get("type") for each in entries]
        if types not in ([], [FS]):
            raise WrongValue(
                "secondary_tiers", types, "one tier of type fs, or none: others are not simulated"
            )
        entries = [{"root_dir": _NO_ROOT, **each} for each in entries]
        extra = {**extra, "secondary_tiers": entries}
    config = parse_config(extra)
    more = [f"{key} {value}" for key, value in extra.items() if key not in _NAMED]
    if not config.tiers:
        return Setup(config, None, more)
    most = config.tiers[0].entry.get("max_bytes", 0)
    return Setup(config, most and parse_bytes("max_bytes", most), more)


def sized(extra: Mapping[str, Any], cpu: int | None, disk: int | None) -> dict[str, Any]:
    """The configuration with tiers of these sizes in bytes; None: as it is. A disk of 0 bytes is
    none."""
    more: dict[str, Any] = dict(extra)
    if cpu is not None:
        more["cpu_bytes_to_use"] = cpu
    if disk is not None:
        (entry,) = more.get("secondary_tiers") or [{"type": FS}]
        more["secondary_tiers"] = [{**entry, "max_bytes": disk}] if disk else []
    return more


@dataclass(frozen=True)
class World:
    """The real manager over a modelled disk, on a clock of their own."""

    manager: TieringManager
    disk: ModelledDisk | None
    clock: Clock


def build(setup: Setup, engine: Engine) -> World:
    """The manager as an engine has it, but that no byte is moved.

    Raises:
        ConfigError: not one page fits.
    """
    clock, speeds, disk = Clock(), engine.speeds, None
    if setup.disk_bytes is not None:
        disk = ModelledDisk(
            setup.disk_bytes,
            engine.bytes_per_chunk,
            read=speeds.read,
            write=speeds.write,
            latency_s=speeds.latency,
            clock=clock,
        )

    def open_tiers(deadline_s: float, clock: Callable[[], float]) -> list[TierLink]:
        if disk is None:
            return []
        (entry,) = setup.config.tiers
        link = TierLink(
            entry.name,
            disk,
            0,
            entry.promotion_deadline_s or deadline_s,
            clock,
            lookup_deadline_s=entry.lookup_deadline_s,
            medium=disk.medium,
            may_load=not entry.store_only,
            may_store=not entry.load_only,
            fills=entry.fill,
            store_threshold=entry.store_threshold,
            max_tracker_size=entry.max_tracker_size,
        )
        return [link]

    page = PageLayout((TensorSpec("kv", "U8", (engine.bytes_per_chunk,)),), engine.tokens_per_chunk)
    manager = TieringManager(
        setup.config,
        setup.slots(engine),
        {0: page},
        lambda slot, nbytes: memoryview(b""),
        lambda slot: True,
        open_tiers,
        weights_fixed=True,
        clock=clock,
    )
    return World(manager, disk, clock)
