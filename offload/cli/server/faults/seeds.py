"""Servers of one model that give the same prompt different keys."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from kvstrata.offload.cli.server.look import Finding, Look
from kvstrata.offload.metering.names import INFO


def seeds(looks: Sequence[Look]) -> Iterator[Finding]:
    """Compares the hashing of all engines of a model, and then what else decides on sharing."""
    by_model: defaultdict[str, list[Look]] = defaultdict(list)
    for look in looks:
        by_model[look.model].append(look)
    for model, theirs in by_model.items():
        hashing = _by_label(theirs, "hashing")
        namespaces = _by_label([look for look in theirs if look.tiers()], "kv_namespace")
        if len(hashing) > 1:
            yield Finding(
                "hash seeds differ",
                model,
                f"these servers cannot use each other's pages, as they hash prefixes differently: "
                f"{_listed(hashing)}",
                "give all servers the same PYTHONHASHSEED and the same --prefix-caching-hash-algo",
            )
        elif len(namespaces) > 1:
            yield Finding(
                "namespaces differ",
                model,
                f"these servers do not use each other's pages, as their configurations differ: "
                f"{_listed(namespaces)}",
                "kvstrata ls ROOT --why NAMESPACE NAMESPACE names the settings that differ; make "
                "them equal if the servers are to share",
            )


def _by_label(looks: Sequence[Look], label: str) -> dict[str, list[str]]:
    """The engines by a label of `INFO`, as far as they told it."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for look in looks:
        if value := look.after.label(INFO, label):
            found[value].append(look.name)
    return found


def _listed(names: dict[str, list[str]]) -> str:
    return "; ".join(f"{value} at {', '.join(who)}" for value, who in names.items())
