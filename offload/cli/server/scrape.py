"""A server's metrics, as its `/metrics` shows them at one time."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from kvstrata.offload.metering.names import BREAKER_OPEN, INFO, PRIMARY

_PATH = "/metrics"
PATIENCE_S = 10.0  # a server answers in milliseconds, a busy one in seconds
_MOST_BYTES = 64 << 20  # a server with many engines shows 1 MiB
_OF_VLLM, _OURS = "vllm:", "kvstrata_"


class ScrapeError(Exception):
    """The metrics cannot be read; the text says of which server, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observations in buckets.

    Attributes:
        buckets: upper bounds in rising order, the last one infinite, and how many observations are
            at most that.
        sum: of all observations.
    """

    buckets: tuple[tuple[float, float], ...] = ()
    sum: float = 0.0

    @property
    def count(self) -> float:
        """How many observations."""
        return self.buckets[-1][1] if self.buckets else 0.0

    @property
    def mean(self) -> float:
        """Of all observations, 0 of none."""
        return self.sum / self.count if self.count else 0.0

    def quantile(self, share: float) -> float | None:
        """The value that `share` of the observations do not exceed, as Prometheus estimates it:
        evenly spread within a bucket; beyond the last bound that bound. None of none."""
        wanted, lower, below = share * self.count, 0.0, 0.0
        for bound, count in self.buckets:
            if count >= wanted and count > below:
                if bound == float("inf"):
                    return lower
                return lower + (bound - lower) * (wanted - below) / (count - below)
            lower, below = bound, count
        return None


@dataclass(frozen=True, slots=True)
class Scrape:
    """The samples of one server, or of one of its engines.

    Attributes:
        url: the server, as it is named to the operator.
        when: seconds, monotonic.
        samples: by name, as Prometheus names them (`_total`, `_bucket`); also under the name of the
            metric, none of them if it has none yet.
    """

    url: str
    when: float
    samples: Mapping[str, tuple[Sample, ...]]

    def matching(self, name: str, **labels: str) -> Iterator[Sample]:
        """The samples of a metric that have these labels; a counter's name is without `_total`."""
        for each in self.samples.get(f"{name}_total") or self.samples.get(name, ()):
            if all(each.labels.get(label) == value for label, value in labels.items()):
                yield each

    def total(self, name: str, **labels: str) -> float:
        """The sum of the values: 0 where there are none, as of what never happened."""
        return sum(each.value for each in self.matching(name, **labels))

    def largest(self, name: str, **labels: str) -> float | None:
        """The largest of the values, None where there are none."""
        return max((each.value for each in self.matching(name, **labels)), default=None)

    def by(self, label: str, name: str, **labels: str) -> dict[str, float]:
        """The sums by the values of a label, the largest first."""
        sums: defaultdict[str, float] = defaultdict(float)
        for each in self.matching(name, **labels):
            sums[each.labels.get(label, "")] += each.value
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def histogram(self, name: str, **labels: str) -> Histogram:
        """The sum of the histograms of this name."""
        counts: defaultdict[float, float] = defaultdict(float)
        for each in self.matching(f"{name}_bucket", **labels):
            counts[float(each.labels["le"])] += each.value
        return Histogram(tuple(sorted(counts.items())), self.total(f"{name}_sum", **labels))

    def label(self, name: str, label: str) -> str:
        """A label of the metric's first series; empty where there is none."""
        return next((each.labels.get(label, "") for each in self.matching(name)), "")

    def tiers(self) -> list[str]:
        """The secondary tiers, by name."""
        found = {
            each.labels["tier"]: None
            for name, samples in self.samples.items()
            if name.startswith(_OURS)
            for each in samples
            if "tier" in each.labels
        }
        return sorted(found.keys() - {PRIMARY})

    def by_engine(self) -> dict[str, Scrape]:
        """Each engine's samples: with data parallelism a server has several."""
        engines = {
            each.labels["engine"]
            for name, samples in self.samples.items()
            if name.startswith(_OURS)
            for each in samples
            if "engine" in each.labels
        }
        found = {}
        for engine in sorted(engines, key=lambda name: (len(name), name)):
            theirs = {
                name: tuple(s for s in samples if s.labels.get("engine", engine) == engine)
                for name, samples in self.samples.items()
            }
            found[engine] = Scrape(self.url, self.when, theirs)
        return found


def read(url: str, patience_s: float = PATIENCE_S) -> Scrape:
    """The metrics of the server at `url`, given with or without `http://` and `/metrics`.

    Args:
        patience_s: seconds for it to begin to answer, and between parts of the answer.

    Raises:
        ScrapeError: no answer, no Prometheus text, no vLLM, or one without this kvstrata.
    """
    server = url.removesuffix("/").removesuffix(_PATH).removesuffix("/")
    if "://" not in server:
        server = f"http://{server}"
    if not server.startswith(("http://", "https://")):
        raise ScrapeError(f"{url} is no URL of a server: give one such as http://localhost:8000")
    return parse(server, _fetch(server, patience_s), time.monotonic())


def parse(url: str, text: str, when: float) -> Scrape:
    """The samples of `text`.

    Raises:
        ScrapeError: no Prometheus text, no vLLM, or one without this kvstrata.
    """
    samples: defaultdict[str, list[Sample]] = defaultdict(list)
    try:
        for family in text_string_to_metric_families(text):
            samples[family.name]  # also one of which nothing was told yet
            for sample in family.samples:
                samples[sample.name].append(sample)
    except (ValueError, KeyError, IndexError):  # the parser raises what its steps raise
        raise ScrapeError(
            f"{url}{_PATH} is no Prometheus text: give the URL of a vLLM server"
        ) from None
    if not any(name.startswith(_OF_VLLM) for name in samples):
        raise ScrapeError(
            f"{url}{_PATH} has no metrics of vLLM: give the URL of a vLLM server, which must run "
            "without --disable-log-stats"
        )
    if not any(name.startswith(_OURS) for name in samples):
        raise ScrapeError(
            f"{url} is a vLLM without kvstrata: give it a --kv-transfer-config with "
            '"spec_name": "KVStrataSpec"'
        )
    if INFO not in samples and BREAKER_OPEN not in samples:
        raise ScrapeError(
            f"{url} has a kvstrata that is older than this command: use the command that is "
            "installed with the server, or update the server"
        )
    return Scrape(url, when, {name: tuple(found) for name, found in samples.items()})


def _fetch(server: str, patience_s: float) -> str:
    try:
        with urllib.request.urlopen(f"{server}{_PATH}", timeout=patience_s) as answer:
            body: bytes = answer.read(_MOST_BYTES + 1)
    except urllib.error.HTTPError as error:
        error.close()
        raise ScrapeError(
            f"{server}{_PATH} answers {error.code} {error.reason}: give the server's own URL, such "
            "as http://localhost:8000"
        ) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise ScrapeError(
            f"{server} does not answer ({reason}): is the server up, and is this its host and port?"
        ) from None
    if len(body) > _MOST_BYTES:
        raise ScrapeError(f"{server}{_PATH} does not end: give the URL of a vLLM server")
    return body.decode("utf-8", "replace")
