"""The options of the object tier: a bucket, and never a secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import SplitResult, urlsplit

from kvstrata.tiers.base import TierConfigError
from kvstrata.tiers.fs.config import FsConfig
from kvstrata.tiers.options import (
    UnknownKeyError,
    WrongValue,
    option,
    or_none,
    parse_number,
    parse_options,
    parse_text,
    same_option,
)
from kvstrata.tiers.process.medium import LEAST_TIMEOUT_S
from kvstrata.tiers.process.probe import check_client

# What the schemes of a url mean.
STORES: Mapping[str, str] = {
    "s3": "s3",
    "gs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
}

# A request and its one late retry must end well before an I/O process that makes no progress is
# replaced (tiers/process/supervisor.py: 30 s).
_MOST_TIMEOUT_S = 10.0
_URL = '"s3://bucket/prefix", "gs://bucket/prefix" or "az://container/prefix"'
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9.-]+)?")  # with Azure's account
_SEGMENT = re.compile(r"[A-Za-z0-9._=+-]+")
_SECRET = re.compile(
    "secret|token|password|credential|account_?key|access_?key|sas|profile|sign", re.I
)
_BUDGET = ("max_bytes", "max_files")  # of tiers that delete what they keep too much of
_HOW_TO_LOG_IN = (
    "credentials are taken from where the cloud's own tools look for them (environment, profile, "
    "instance metadata; docs/tiers.md), never from the configuration, which ends up in logs"
)


def _split(key: str, value: object, example: str) -> SplitResult:
    """A url without any secret in it; the error shows nothing of one that has."""
    if not isinstance(value, str):
        raise WrongValue(key, value, example)
    account = re.match("abfss?://[^:/]*@", value)
    if "?" in value or "#" in value or value.count("@") > bool(account):
        raise TierConfigError(
            f"{key}: has a user, a password or a query in it; give {example} alone: "
            f"{_HOW_TO_LOG_IN}"
        )
    try:
        return urlsplit(value)
    except ValueError:
        raise WrongValue(key, value, example) from None


def _url(key: str, value: object) -> str:
    parts = _split(key, value, _URL)
    segments = parts.path.strip("/").split("/") if parts.path.strip("/") else []
    if parts.scheme == "file":
        raise TierConfigError(f'{key}: {value!r} is a directory: give it to a tier of type "fs"')
    if parts.scheme in ("http", "https"):
        raise WrongValue(key, value, f"{_URL}; the server's address belongs in endpoint")
    if parts.scheme not in STORES or not _PLAIN.fullmatch(parts.netloc):
        raise WrongValue(key, value, _URL)
    if not all(_SEGMENT.fullmatch(each) and each.strip(".") for each in segments):
        raise WrongValue(key, value, "a prefix of letters, digits and ._=+- between single slashes")
    return "/".join((f"{parts.scheme}://{parts.netloc}", *segments))


def _endpoint(key: str, value: object) -> str:
    example = 'the server\'s address, for example "https://minio.example:9000"'
    parts = _split(key, value, example)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise WrongValue(key, value, example)
    return str(value).rstrip("/")


@dataclass(frozen=True, slots=True)
class ObjectConfig:
    """Options of the object tier, checked. None of them is secret."""

    url: str = option(
        _url,
        f"the bucket for the objects, and a prefix in it: {_URL}; several servers may share it",
        other_names="bucket uri container",
    )
    endpoint: str | None = option(
        or_none(_endpoint),
        "the address of a server that speaks S3 (MinIO, Ceph, SeaweedFS, R2), or another than the "
        'cloud\'s own; `"http://..."` is not encrypted',
        None,
        shown="the cloud's own",
        other_names="endpoint_url endpoint_override host server",
    )
    region: str | None = option(
        or_none(parse_text),
        "the region of an S3 bucket",
        None,
        shown="`AWS_REGION`, or that of the profile, or `us-east-1`",
        other_names="region_name aws_region location",
    )
    timeout_s: float = option(
        partial(parse_number, least=LEAST_TIMEOUT_S, most=_MOST_TIMEOUT_S),
        "a request, with its data, that takes longer has failed; one that was refused is tried "
        "again within that time",
        5.0,
        other_names="timeout request_timeout connect_timeout deadline_s",
    )
    n_read_threads: int = same_option(FsConfig, "n_read_threads")
    n_write_threads: int = same_option(FsConfig, "n_write_threads")

    @property
    def store(self) -> str:
        """`s3`, `gcs` or `azure`."""
        return STORES[self.url.partition(":")[0]]

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> ObjectConfig:
        """Check the options without touching the bucket.

        Raises:
            TierConfigError: naming the key, the remedy, and the value where it is no secret.
        """
        for key in map(str, options):
            if key in _BUDGET:
                instead = "a lifecycle rule of the bucket is the budget (docs/tiers.md); remove it"
                raise UnknownKeyError("object tier", key, (), instead)
            if key not in cls.__dataclass_fields__ and _SECRET.search(key):
                raise TierConfigError(
                    f"object tier: {key!r} is no option: remove it; {_HOW_TO_LOG_IN}"
                )
        config = parse_options(cls, options, "object tier")
        if config.region is not None and config.store != "s3":
            raise TierConfigError(
                f"region: is for s3:// only, and url is {config.url!r}; remove it"
            )
        check_client("object", "obstore", "obstore")
        return config
