"""How the tables say which fields of a configuration class decide, and why the others do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Reasons that many fields share.
ROUNDING = "which kernel computes, or how it is compiled: rounding alone"
TOPOLOGY = "who computes which part; opaque pages have it under `topology`"
MEMORY = "how much room there is, or how it is cut up; not what lies in it"
SCHEDULING = "when something is computed, not what"
OUTPUT = "what becomes of the model's output"
DRAFTED = "which tokens are drafted and accepted; draft layers' K and V are not made by it"
PLACE = "where something lies or comes from; what it is counts"
WATCHING = "logs, metrics and traces"
DERIVED = "made from other fields, which count"
FRONTEND = "before the engine: keys are of the tokens and media that come out of it"
FORM = "the form of pages is in `pages`, `tokens_per_block` and the content order"


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of one class.

    deciding: names whose values are in the namespace.
    inner: names of configurations of their own, and their class.
    left_out: the other names, and the reason of each.
    """

    deciding: frozenset[str]
    inner: Mapping[str, str]
    left_out: Mapping[str, str]


def fields(
    deciding: str = "", left_out: Mapping[str, str] | None = None, inner: str = ""
) -> Fields:
    """Names are written as text with spaces; `left_out` has them by reason, `inner` with classes:
    "field=Class"."""
    reasons = (left_out or {}).items()
    return Fields(
        deciding=frozenset(deciding.split()),
        inner=dict(pair.split("=") for pair in inner.split()),
        left_out={name: reason for reason, names in reasons for name in names.split()},
    )
