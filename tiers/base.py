"""The contract between the manager and a secondary tier.

A secondary tier keeps KV pages by key on some medium other than GPU memory. The manager
calls it from vLLM's scheduler thread only, so every method returns at once and never
blocks on the medium; the work happens on threads or processes that the tier owns.

A tier never raises into the engine once it is constructed. What goes wrong ends as a
result (`JobResult.failed`), a `Lookup.MISS`, and a count in `stats()`.

Third-party tiers subclass `SecondaryTier` and register under the entry-point group
`kvstrata.tiers`, or are named in the configuration by `module_path`. Their tests
subclass `kvstrata.tiers.testing.TierContract`.
"""

from __future__ import annotations

import enum
import math
import secrets
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

from kvstrata.tiers.options import TierConfigError as TierConfigError
from kvstrata.tiers.options import parse_options

# What `bytes` means in signatures; the content of pages is a `memoryview`, or plain `bytes`.
ChunkHash: TypeAlias = bytes  # vLLM's block hash of a chunk's end
PageKey: TypeAlias = bytes  # vLLM's offload key: a `ChunkHash` and a 4-byte big-endian group index

# Bytes per element of the safetensors dtypes a page may have
# (https://github.com/huggingface/safetensors, safetensors/src/tensor.rs). The kernels have a table
# of their own, made of torch's dtypes: tiers read files without torch and without kernels.
DTYPE_BYTES: Mapping[str, int] = {
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F16": 2,
    "BF16": 2,
    "F32": 4,
    "F64": 8,
}

# The namespace's field that is another one after each reset, where weights may change.
EPOCH = "epoch"

_UNSEEN = "unseen: "


def unseen(reason: str) -> str:
    """The value of a field of the namespace that nobody can know, another one at each call."""
    return f"{_UNSEEN}{reason} [{secrets.token_hex(8)}]"


def unseen_reason(value: object) -> str | None:
    """Why nobody can know this value of a field of the namespace; None if it can be known."""
    if not isinstance(value, str) or not value.startswith(_UNSEEN):
        return None
    return value.removeprefix(_UNSEEN).rpartition(" [")[0]


# What a tier may say of itself, in vLLM's words.
MEDIA = ("CPU", "STORAGE")
LOCALITIES = ("LOCAL", "REMOTE")


class Lookup(enum.Enum):
    """What a tier knows of a key."""

    HIT = enum.auto()
    MISS = enum.auto()
    RETRY = enum.auto()  # not known yet; ask again in a later step


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a page: its name in the file, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes; KeyError for a dtype outside `DTYPE_BYTES`."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class PageLayout:
    """What the pages of one KV cache group look like.

    `tensors` lie one after the other without gaps; `tokens` is the tokens per chunk.
    """

    tensors: tuple[TensorSpec, ...]
    tokens: int

    @property
    def nbytes(self) -> int:
        """Size of a page in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)


def layouts_to_json(layouts: Mapping[int, PageLayout]) -> dict[str, Any]:
    """JSON-serialisable form, read back by `layouts_from_json`; the namespace's field `pages`."""
    return {
        str(group): {
            "tokens": layout.tokens,
            "tensors": [[t.name, t.dtype, list(t.shape)] for t in layout.tensors],
        }
        for group, layout in layouts.items()
    }


def layouts_from_json(fields: Mapping[str, Any]) -> dict[int, PageLayout]:
    """The inverse of `layouts_to_json`.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: the fields describe no layouts.
    """
    return {
        int(group): PageLayout(
            tuple(TensorSpec(n, dtype, tuple(shape)) for n, dtype, shape in layout["tensors"]),
            layout["tokens"],
        )
        for group, layout in fields.items()
    }


@dataclass(frozen=True, slots=True)
class PageRegion:
    """The shared memory in which the pages of all jobs lie.

    With it a tier can let other processes move the pages: they map the file themselves.

    Attributes:
        fd: the file, open for reading and writing while the tier is being made; a tier that
            wants it longer duplicates it.
        offset: where slot 0 begins, in bytes; a multiple of 4096.
        slot_bytes: size of a slot in bytes, a multiple of 4096. Slot s begins at
            `offset + s * slot_bytes`, and a page at the start of its slot.
        slots: number of slots.
    """

    fd: int
    offset: int
    slot_bytes: int
    slots: int


@dataclass(frozen=True, slots=True)
class TierContext:
    """What a tier must know of the model whose pages it keeps.

    Attributes:
        model: the model's name, for display only.
        namespace: JSON-serialisable fields; pages are interchangeable between two
            engines exactly when these fields are equal. The field `pages` is
            `layouts_to_json(layouts)`, so that a tool can tell what a page must be. A field
            `EPOCH`, or a value with an `unseen_reason`, says that nobody will read the pages once
            this tier was shut down.
        layouts: page layout by KV cache group index.
        region: where the pages lie; None if in memory that cannot be shared, which a tier
            may refuse.
        engine: vLLM's configuration of the offloading, for tiers that were made for vLLM; None
            where there is no engine.
    """

    model: str
    namespace: Mapping[str, Any]
    layouts: Mapping[int, PageLayout]
    region: PageRegion | None = None
    engine: object = None


@dataclass(frozen=True, slots=True)
class RequestView:
    """The request on whose behalf a call is made.

    `params` is the request's `kv_transfer_params`. `tiers` names the tiers that may
    serve it; None allows all. `engine` is what vLLM itself says of the request, for tiers that
    were made for vLLM; None where there is no engine. `pin_s` is for how many seconds it wishes its
    pages to stay; a tier need not heed it.
    """

    req_id: str
    params: Mapping[str, Any] = field(default_factory=dict)
    tiers: frozenset[str] | None = None
    engine: object = field(default=None, repr=False, compare=False)
    pin_s: float = 0.0


class Page(NamedTuple):
    """One page of a job; see there. `group` is its KV cache group index."""

    key: PageKey
    group: int
    end_token: int
    slot: int
    view: memoryview


@dataclass(frozen=True)
class Job:
    """Pages to store or to load together, in prefix order: a column each for what is said of them.

    A tier whose pages are moved elsewhere, by processes that map `TierContext.region`, needs the
    columns only; `pages` is for those that touch bytes here, and costs a `memoryview` each.

    Attributes:
        keys: the offload keys.
        slots: index of each page's slot in the primary tier (in `TierContext.region`).
        end_tokens: position in the request of each chunk's end, in tokens; 0 if unknown.
        view: key and slot -> exactly the page's bytes (uint8, contiguous, 4096-aligned), readable
            for stores and writable for loads. Valid until the job's result is taken.
    """

    job_id: int
    keys: Sequence[PageKey]
    slots: Sequence[int]
    end_tokens: Sequence[int]
    request: RequestView
    view: Callable[[PageKey, int], memoryview]

    @cached_property
    def pages(self) -> tuple[Page, ...]:
        """The columns as one tuple for each page, with its bytes."""
        return tuple(
            Page(key, key_group(key), end_token, slot, self.view(key, slot))
            for key, slot, end_token in zip(self.keys, self.slots, self.end_tokens, strict=True)
        )


@dataclass(frozen=True, slots=True)
class JobResult:
    """The end of a job.

    `failed` maps the keys that were not stored, or did not arrive, to a short cause
    such as "missing" or "checksum"; all other keys of the job succeeded. Jobs of which every
    page fails for a cause outside `SecondaryTier.page_causes` are failures of the tier: after
    three in a row the manager leaves it alone for a while. The content of a failed page's view is
    undefined. `nbytes` counts the bytes moved, `seconds` the time from the start of the work
    to its end.
    """

    job_id: int
    failed: Mapping[PageKey, str] = field(default_factory=dict)
    nbytes: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class TierStats:
    """What a tier tells of itself: totals since it was made, and present values.

    What a tier has of the following is shown as every tier's, under the same name; all other counts
    and values as its own.

    Attributes:
        counters: totals. `evicted_pages` and `evicted_bytes`: what left to make room. Of look-ups
            the answers count (`lookups`, and of these `hits`): a RETRY is none.
        failures: totals by cause.
        quarantined: totals of pages that were put aside, by cause.
        gauges: present values. `pages` and `bytes`: what is in the tier as far as it knows.
            `capacity_bytes`: what it may hold, if there is a limit. `disk_used_bytes`,
            `disk_free_bytes`, `disk_files`: of the places where it keeps files.
        samples: values observed since the last call. `eviction_age_s`: seconds since a page was
            used last, when it was evicted.
    """

    counters: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    quarantined: dict[str, int] = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)


def key_group(key: PageKey) -> int:
    """The KV cache group index at the end of an offload key."""
    return int.from_bytes(key[-4:], "big")


def key_hash(key: PageKey) -> ChunkHash:
    """The chunk hash at the start of an offload key."""
    return key[:-4]


class PrimaryPages(Protocol):
    """The pages of the primary tier, for a tier that serves others, while `serve` runs.

    What others ask is asked on behalf of requests that the tier makes up, with ids of its own.
    """

    def lookup(self, key: PageKey, request: RequestView) -> Lookup:
        """HIT: the page is here. RETRY: it is on its way, from the GPU or from another tier."""

    def lend(self, keys: Sequence[PageKey], request: RequestView) -> Job:
        """Keep pages, HITs of this `serve`, where they are, for the tier to read.

        The job is the tier's from now on, and ends with a result as its stores do.

        Raises:
            KeyError: a page is not here.
        """

    def over(self, request: RequestView) -> None:
        """Nothing more will be asked for the request; jobs may still be under way."""


class Changes:
    """What a tier has yet to tell of pages that came and left: see `SecondaryTier.take_changes`.

    At most one change of a key, since opposite ones cancel out. Nothing is noted before the first
    `take`: where nobody asks, it costs nothing. One thread only.
    """

    def __init__(self) -> None:
        self._asked = False
        self._urgent: dict[PageKey, bool] = {}
        self._patient: OrderedDict[PageKey, bool] = OrderedDict()

    def note(self, key: PageKey, here: bool, *, can_wait: bool = False) -> None:
        """The page came, or it left; not twice the same of a key.

        What `can_wait` is told a little at a time, the rest at once.
        """
        if not self._asked:
            return
        if self._urgent.pop(key, None) is None and self._patient.pop(key, None) is None:
            (self._patient if can_wait else self._urgent)[key] = here

    def hasten(self, key: PageKey) -> None:
        """What there is to tell of the page can wait no longer."""
        if key in self._patient:
            self._urgent[key] = self._patient.pop(key)

    def take(
        self, most: int, here: Iterable[PageKey], *, anew: bool = False
    ) -> list[tuple[PageKey, bool]]:
        """The changes to tell, first what left: all that cannot wait, and at most `most` others.

        The first call, and one with `anew`, begin with the pages that are `here`.
        """
        if anew or not self._asked:
            self._asked = True
            self._urgent.clear()
            self._patient = OrderedDict.fromkeys(here, True)
        urgent, self._urgent = self._urgent, {}
        count = min(most, len(self._patient))
        patient = [self._patient.popitem(last=False) for _ in range(count)]
        return sorted([*urgent.items(), *patient], key=itemgetter(1))


class SecondaryTier(ABC):
    """Pages by key on some medium. See the module's text for the rules of all methods."""

    # vLLM's words for `kv_load_tiers`; None: unknown. Any other word is refused at start.
    medium: ClassVar[str | None] = None  # one of MEDIA
    locality: str | None = None  # one of LOCALITIES; not changed after `__init__`
    # Causes in `JobResult.failed` that speak of a page, or of room for it, and not of the medium:
    # a tier that reports them is well. Any other cause counts towards taking the tier out. A tier
    # adds its own to these; not changed after `__init__`.
    page_causes: frozenset[str] = frozenset(
        (
            *("missing", "truncated", "size", "header", "version", "namespace", "key", "shape"),
            *("checksum", "no-space", "budget", "too-large", "read-only", "shutdown"),
        )
    )
    # The pages that a request is found to need in one step must be asked for in one job.
    whole_loads: bool = False
    # Others ask it for pages: `serve` is called.
    serves: bool = False
    # It tells which pages come and go: `take_changes` is called after each step. Of other tiers
    # what they stored is known, and nothing else.
    tells_changes: bool = False
    # The last bytes of each slot, behind the page, are its own: so many, at most 4096.
    tail_bytes: ClassVar[int] = 0
    # Whether its pages may be loaded. False once audits found too many that the model does not
    # compute, until the operator confirms that they may be.
    trusted: bool = True

    # What it may be told: a dataclass of `option`s (kvstrata.tiers.options).
    Options: ClassVar[type[Any]] = object

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Check the tier's part of the configuration without touching the medium.

        Raises:
            TierConfigError: naming the key, the value and the remedy.
        """
        parse_options(cls.Options, options, cls.__name__)

    @classmethod
    def directories(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The directories, as absolute paths, below which a tier with these options keeps files.

        No two tiers of an engine may share one, and the engine's user must be able to write there;
        both are checked before the model is loaded. `options` are right (`check_options`).
        """
        return ()

    @abstractmethod
    def __init__(self, options: Mapping[str, Any], context: TierContext) -> None:
        """Open the medium.

        Raises:
            TierConfigError: the options are wrong or the medium cannot be used.
        """

    @abstractmethod
    def lookup(self, key: PageKey, request: RequestView) -> Lookup:
        """Whether the page is here. RETRY must become HIT or MISS in bounded time."""

    @abstractmethod
    def submit_store(self, job: Job) -> None:
        """Start to store the job's pages; those already here count as stored.

        What it cannot store it reports in the job's result. Should it raise all the same, it
        must not have kept the job: the job's slots are given to others at once.
        """

    @abstractmethod
    def submit_load(self, job: Job) -> None:
        """Start to load the job's pages into their views, verified before the result.

        What it cannot load it reports in the job's result. Should it raise all the same, it
        must not have kept the job: the job's slots are given to others at once, and a late
        write would change their pages.
        """

    @abstractmethod
    def get_finished(self) -> Sequence[JobResult]:
        """Results of the jobs that ended since the last call, each job exactly once.

        After a job's result was returned, the tier touches its views no more.
        """

    def get_arrived(self) -> Mapping[int, Collection[PageKey]]:
        """Pages of loads still under way that arrived since the last call: keys by job id.

        Asked after each `get_finished`. The pages are verified, the tier touches their views no
        more, and the job's result says nothing else of them; they are used at once, before the
        job ends. A tier that cannot tell says nothing, which is the default: then its pages are
        used when their job ends, and the manager sees to it that jobs are short.
        """
        return {}

    def submit_reject(self, job: Job, *, distrust: bool) -> bool:
        """Never serve the job's page again: an audit found that it is not what the model computes.

        The view holds what the model computed. A tier that can keeps both for the operator. The
        job ends with a result as others do.

        Args:
            job: has one page.
            distrust: so many were found that nothing here is to be believed: set `trusted` to
                False, and keep that across restarts where possible.

        Returns:
            False from a tier that cannot do this, which is the default: then no result follows,
            and the manager alone refuses the key.
        """
        self.trusted = self.trusted and not distrust
        return False

    def how_to_trust(self) -> str:
        """What the operator must do before the tier is `trusted` again; a sentence for the log."""
        return "Restart the engine to use it again."

    def touch(self, keys: Collection[PageKey], request: RequestView) -> None:
        """A request that ended used these pages, in prefix order, perhaps in the primary tier.

        Without its beginning the end of a prefix is worth nothing: it is to be evicted first.
        """

    def on_new_request(self, request: RequestView) -> bool:
        """A request arrived.

        Returns:
            Whether the tier is to be given all pages of the request, those that it was given for
            others too.
        """
        return False

    def on_request_finished(self, request: RequestView) -> None:
        """No further call will be made for this request; jobs may still be under way."""

    def on_step_end(self) -> None:
        """A scheduler step ended; the place to send off work batched during the step."""

    def serve(self, pages: PrimaryPages) -> None:
        """A scheduler step ends: answer what others, on other machines say, asked of the tier.

        Only where it says that it `serves`.
        """

    def wants_steps(self) -> bool:
        """Whether steps are needed although no request runs and no job is under way."""
        return False

    def take_changes(self, most: int, *, anew: bool = False) -> Iterable[tuple[PageKey, bool]]:
        """The pages that came (True) and left (False) since the last call, as `lookup` sees it.

        Whoever caused it: its own stores, what it dropped, found gone or learnt from others. Each
        change once, those of a key in their order; of what came and left in between nothing need
        be said. The first call, and one with `anew`, begin with all pages that are here. `Changes`
        keeps the account. Only where it says that it `tells_changes`.

        Args:
            most: of what others did, and of what was here at the beginning, at most so many are
                told now, and the rest by the next calls. Its own stores are told at once.
        """
        return ()

    @abstractmethod
    def drain(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` seconds until no job is under way; True if so."""

    @abstractmethod
    def shutdown(self, timeout_s: float) -> bool:
        """Stop; True if, within `timeout_s` seconds, nothing touches any view any more.

        May be called twice. Jobs not yet started end as failed with cause "shutdown".
        """

    @abstractmethod
    def stats(self) -> TierStats:
        """Totals so far; cheap."""
