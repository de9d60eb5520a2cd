"""The namespaces that are to be copied: what is in them, and the copying of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from kvstrata.offload.cli.copy.pages import Advance, Copied, Copying
from kvstrata.offload.cli.copy.place import Place, Refused, context_of
from kvstrata.tiers.base import EPOCH, PageKey, TierContext, key_group, unseen_reason
from kvstrata.tiers.page.page import PageForm


@dataclass(frozen=True, slots=True)
class Found:
    """A namespace of the source.

    Attributes:
        name: `<model>_<digest>`.
        context: what a tier is told of it.
        keys: of its pages that are to be copied; nbytes: of all of them, with their headers.
    """

    name: str
    context: TierContext
    keys: Sequence[PageKey]
    nbytes: int


def look(
    source: Place, names: Sequence[str], since: float | None, done: Copied, advance: Advance
) -> list[Found]:
    """What there is to be copied of the namespaces; what cannot be is noted as bad.

    Raises:
        PlaceError: the source cannot be used.
    """
    found = []
    for name in names:
        try:
            context = context_of(f"{source.shown}: {name}", name, source.fields(name))
        except Refused as refused:
            done.bad.append((refused.where, refused.reason))
            continue
        if EPOCH in context.namespace or any(map(unseen_reason, context.namespace.values())):
            done.private.append(name)
        else:
            found.append(_look_into(source, name, context, since, done, advance))
    return found


def _look_into(
    source: Place,
    name: str,
    context: TierContext,
    since: float | None,
    done: Copied,
    advance: Advance,
) -> Found:
    form, keys, total = PageForm(context), list[PageKey](), 0
    for key in source.keys(name, since, lambda *wrong: done.bad.append(wrong)):
        if key_group(key) not in context.layouts:
            done.bad.append((source.where(name, key), "shape: its namespace has no such group"))
            continue
        keys.append(key)
        total += form.size(key)
        if advance is not None:
            advance(form.size(key))
    return Found(name, context, keys, total)


def copy_namespaces(
    source: Place, target: Place, found: Sequence[Found], done: Copied, advance: Advance
) -> None:
    """Copy what was found, until the source or the target fails.

    Raises:
        PlaceError: the target cannot be used.
    """
    for each in found:
        if not each.keys or done.stopped is not None:
            continue
        try:
            kept = target.target(each.context)
        except Refused as refused:
            done.bad.append((refused.where, refused.reason))
            continue
        read = source.source(each.name, each.context)
        try:
            form, where = PageForm(each.context), partial(source.where, each.name)
            copying = Copying(read, kept, form, source.page_causes, where, done, advance)
            copying.run(each.keys)
        finally:
            read.close()
            kept.close()
