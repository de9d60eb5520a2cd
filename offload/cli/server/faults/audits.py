"""Stored pages that are not what the model computes."""

from __future__ import annotations

from collections.abc import Iterator

from kvstrata.offload.cli.server.look import Finding, Look
from kvstrata.offload.cli.server.words import count
from kvstrata.offload.metering.names import AUDIT_ERROR, AUDIT_PAGES, DISTRUSTED

_WHAT_TO_DO = (
    "find out which pages they are (kvstrata inspect on the quarantine, docs/audit.md): files of "
    "another model, other weights, or a defect; then remove the namespace"
)


def audits(look: Look) -> Iterator[Finding]:
    """Pages that audits found different, and tiers that they took out of service."""
    different = look.total(AUDIT_PAGES, result="different")
    if different:
        compared = look.total(AUDIT_PAGES)
        yield Finding(
            "audits differ",
            "audits",
            f"of {count(compared)} pages that were computed again {count(different)} were not what "
            f"had been stored; the largest error of a row is {look.total(AUDIT_ERROR):.2g}",
            _WHAT_TO_DO,
        )
    for tier in look.tiers():
        if look.gauge(DISTRUSTED, tier=tier):
            yield Finding(
                "distrusted",
                tier,
                "nothing is loaded from the tier or stored there, since audits found wrong pages",
                f"{_WHAT_TO_DO}, or declare its pages right with kvstrata trust",
            )
