"""Opening a namespace of a bucket: what cannot work is said at start, with the remedy."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvstrata.tiers.base import EPOCH, TierConfigError, TierContext, unseen_reason
from kvstrata.tiers.fs.files.layout import NAMESPACE_DIR, NamespacePaths
from kvstrata.tiers.fs.files.namespace import first_difference, parse_config
from kvstrata.tiers.object.bucket import NOBODY, SILENT, Bucket, BucketError, plain_text
from kvstrata.tiers.object.config import ObjectConfig
from kvstrata.tiers.page.identity import (
    MAX_CONFIG_BYTES,
    config_text,
    directory_name,
    namespace_digest,
)

_REMEDY = "see that the bucket exists, and that endpoint and region are its own"
_ENVIRONMENT = "set what is missing in the environment (docs/tiers.md)"
_REMEDIES = {
    "denied": "see that the credentials are those of somebody who may list, read and write there",
    NOBODY: f"no credentials were found: {_ENVIRONMENT}",
    SILENT: "see that the server runs and can be reached, or give another endpoint",
}

logger = logging.getLogger("kvstrata.tiers.object")


@dataclass(frozen=True, slots=True)
class Opened:
    """A bucket that can be used: what the I/O processes must know of it.

    Attributes:
        config: the tier's options.
        paths: where the namespace lies below the url's prefix.
        trusted: whether its pages are to be believed.
    """

    config: ObjectConfig
    paths: NamespacePaths
    trusted: bool


def open_bucket(config: ObjectConfig, context: TierContext) -> Opened:
    """Find the namespace in the bucket, compare its config.json, and prove that one can write.

    Raises:
        TierConfigError: the options are wrong, or the bucket cannot be used.
    """
    try:
        bucket = Bucket(config)
    except Exception as error:  # obstore's and boto3's have no base in common
        raise TierConfigError(unusable(config, error)) from None
    try:
        paths, found = _find(bucket, context.model, context.namespace)
        if found is not None:
            _compare(config, paths, found, context.namespace)
        # Also where it is there already: so a lifecycle rule by age spares it.
        bucket.write(paths.config, config_text(context.namespace).encode(), replace=True)
        trusted = bucket.size(paths.distrust) is None
    except BucketError as error:
        raise TierConfigError(unusable(config, error)) from None
    if not trusted:
        logger.error(
            "kvstrata object tier: audits found pages in %s/%s that are not what the model "
            "computes: nothing is loaded from there or stored there until you remove %s there and "
            "restart",
            *(config.url, paths.pages, paths.distrust),
        )
    if EPOCH in context.namespace or any(map(unseen_reason, context.namespace.values())):
        logger.warning(
            "kvstrata object tier: nobody reads this engine's objects after its end, or after a "
            "reset of its cache: a lifecycle rule of the bucket must delete them"
        )
    return Opened(config, paths, trusted)


def unusable(config: ObjectConfig, error: Exception) -> str:
    """Why a bucket cannot be used, and the remedy.

    `error` is the bucket's own; or it says why there is none with these options.
    """
    why, remedy = plain_text(error), _ENVIRONMENT
    if isinstance(error, BucketError):
        why, remedy = str(error), _REMEDIES.get(error.cause, _REMEDY)
    return f"url: {config.url!r} cannot be used ({why}); {remedy}"


def _find(
    bucket: Bucket, model: str, fields: Mapping[str, Any]
) -> tuple[NamespacePaths, tuple[memoryview, int] | None]:
    """Where the namespace lies or is to lie, and its config.json, as `namespace_paths` does it."""
    digest = namespace_digest(fields)
    ours = directory_name(model, digest)
    matches = filter(None, map(NAMESPACE_DIR.fullmatch, sorted(bucket.folders())))
    names = [match.string for match in matches if match["digest"] == digest]
    for name in sorted(names, key=lambda name: name != ours):
        paths = NamespacePaths("", name)
        found = bucket.read(paths.config, size=0, most=MAX_CONFIG_BYTES)
        if found is not None:
            return paths, found
    return NamespacePaths("", ours), None


def _compare(
    config: ObjectConfig,
    paths: NamespacePaths,
    found: tuple[memoryview, int],
    fields: Mapping[str, Any],
) -> None:
    where = f"{config.url}/{paths.config}"
    remedy = "move that folder away or choose another prefix"
    raw, size = found
    try:
        if size > MAX_CONFIG_BYTES:
            raise ValueError(f"{size} bytes")
        theirs = parse_config(bytes(raw))
    except ValueError as error:
        raise TierConfigError(f"url: {where!r} is unreadable ({error!s:.200}); {remedy}") from None
    if difference := first_difference(fields, theirs, where):
        raise TierConfigError(f"url: {difference}; {remedy}")
