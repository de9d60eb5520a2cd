"""The options of the valkey tier."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

from kvstrata.tiers.base import TierConfigError
from kvstrata.tiers.options import (
    WrongValue,
    option,
    or_none,
    parse_count,
    parse_flag,
    parse_number,
)
from kvstrata.tiers.process.medium import LEAST_TIMEOUT_S

DEFAULT_PORT = 6379
_EXAMPLE = '"valkey://host:6379"'
_OTHER_SCHEMES = {"redis": "", "rediss": ', and "tls": true', "valkeys": ', and "tls": true'}
_MOST_TIMEOUT_S = 10.0  # a call that first connects takes two; after 30 s a process is replaced


def _url(key: str, value: object) -> str:
    if isinstance(value, str) and "@" in value:  # not shown: it may hold a password
        raise TierConfigError(
            f"{key}: it names a user or a password; give {_EXAMPLE}, and both in a file that "
            "password_file names"
        )
    try:
        parts = urlsplit(value if isinstance(value, str) else "")
        host, port = parts.hostname, parts.port or DEFAULT_PORT
    except ValueError:  # no port, or half an IPv6 address
        raise WrongValue(key, value, _EXAMPLE) from None
    if (tls := _OTHER_SCHEMES.get(parts.scheme)) is not None:
        raise WrongValue(key, value, f"{_EXAMPLE}{tls}; a Redis server is named so too")
    if parts.scheme != "valkey" or not host:
        raise WrongValue(key, value, _EXAMPLE)
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise WrongValue(key, value, f"{_EXAMPLE} with nothing behind the port")
    return f"valkey://[{host}]:{port}" if ":" in host else f"valkey://{host}:{port}"


def _password_file(key: str, value: object) -> str:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        # not shown: it may be the password itself
        raise TierConfigError(
            f"{key}: what is given is no absolute path; give that of a file with the password, for "
            'example "/run/secrets/valkey"'
        )
    return value


@dataclass(frozen=True, slots=True)
class ValkeyOptions:
    """Options of the valkey tier, checked. `ttl_s` is 0 for none."""

    url: str = option(
        _url,
        'the server, for example "valkey://host:6379", or any one of a cluster; a Redis server is '
        "named so too",
        other_names="host port address addresses endpoint server uri redis_url valkey_url remote",
    )
    cluster: bool = option(
        parse_flag,
        "the server is one of a cluster, whose others the client finds",
        False,
        other_names="cluster_mode cluster_enabled is_cluster",
    )
    tls: bool = option(
        parse_flag,
        "encrypt, and check the server's certificate against those of the system, or of the file "
        "that the environment variable `SSL_CERT_FILE` names",
        False,
        other_names="ssl use_tls use_ssl secure",
    )
    password_file: str | None = option(
        or_none(_password_file),
        "a file, absolute, that holds the password in a line of its own, and before that, if it is "
        "not `default`, the user's name in another",
        None,
        other_names="password username user auth credentials requirepass acl",
    )
    ttl_s: int = option(
        partial(parse_count, most=10**9, least=0),
        "the server drops a page so many seconds after it was stored last; 0: never",
        0,
        other_names="ttl expire expiry expire_s ttl_seconds",
    )
    timeout_s: float = option(
        partial(parse_number, least=LEAST_TIMEOUT_S, most=_MOST_TIMEOUT_S),
        "seconds until the server must have answered; then it counts as failed, and what was asked "
        "for as a miss",
        5.0,
        other_names="timeout request_timeout socket_timeout connect_timeout timeout_ms",
    )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or DEFAULT_PORT
