"""What the options of `kvstrata simulate` say."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from kvstrata.offload.primary.eviction.policies import BUILT_IN
from kvstrata.offload.simulate.s3_fifo import NAME
from kvstrata.offload.simulate.setup import Engine, Setup, Speeds, parse_size, sized
from kvstrata.offload.simulate.sweep import grid, pairs
from kvstrata.offload.simulate.traces import Trace
from kvstrata.tiers.options import ConfigError, WrongValue, nearest, parse_bytes, parse_number

OPTIMUM, S3_FIFO = "optimum", "s3-fifo"  # policies that no engine has


def configs(
    texts: list[str], sweep: str | None, policies: str | None
) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """The configurations that are asked for, and whether their optimum is.

    Raises:
        ConfigError: an option is wrong.
    """
    configs = [_object(text) for text in texts]
    if sweep is not None:
        if len(configs) > 1:
            raise ConfigError("--sweep: give one --config at most, whose tiers get other sizes")
        base = configs[0] if configs else {}
        configs = [sized(base, point.get("cpu"), point.get("fs")) for point in grid(sweep)]
    if not configs:
        raise ConfigError("nothing is to be simulated; give --config or --sweep")
    for each in configs:
        if policies is None:
            yield each, False
            continue
        for name in policies.split(","):
            yield _with_policy(each, name.strip()), name.strip() == OPTIMUM


def _object(text: str) -> Mapping[str, Any]:
    remedy = 'a JSON object such as {"cpu_bytes_to_use": "64GiB"}'
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise WrongValue("--config", text, remedy) from None
    if not isinstance(found, dict):
        raise WrongValue("--config", text, remedy)
    return found


def _with_policy(extra: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    known = (*BUILT_IN, S3_FIFO, OPTIMUM)
    if name not in known and ":" not in name and "cache_policy_module_path" not in extra:
        names = f"some of {', '.join(known)}{nearest(name, known)}"
        raise WrongValue("--policies", name, f'{names}, or "package.module:Class" for your own')
    if name == OPTIMUM:
        return extra
    return {**extra, "eviction_policy": NAME if name == S3_FIFO else name}


def engine(
    trace: Trace, bytes_per_token: str | None, gpu: str | None, servers: int, speeds: Speeds
) -> Engine:
    """What is simulated but for the configurations.

    Raises:
        ConfigError: a size is wrong, or nobody says how large pages are.
    """
    nbytes = trace.bytes_per_chunk
    if bytes_per_token is not None:
        nbytes = parse_bytes("--bytes-per-token", bytes_per_token) * trace.tokens_per_chunk
    if nbytes is None:
        raise ConfigError(
            "--bytes-per-token is missing: give what the model's KV cache takes for a token, for "
            'example "128KiB" (2 x layers x KV heads x head size x bytes of a number)'
        )
    gpu_bytes = 0 if gpu is None else parse_size("--gpu", gpu, zero=True)
    return Engine(trace.tokens_per_chunk, nbytes, gpu_bytes, servers, speeds)


def check_sizes(setups: Iterable[Setup], engine: Engine, sweep: str | None) -> None:
    """That a page fits into each CPU tier.

    Raises:
        ConfigError: none does; names the sweep, where there is one.
    """
    for setup in setups:
        try:
            setup.slots(engine)
        except ConfigError as error:
            if sweep is None:
                raise
            raise ConfigError(f"--sweep {sweep!r}: {error}") from None


def speeds(text: str | None) -> Speeds:
    """Those that are given, and the defaults of the others.

    Raises:
        ConfigError: the text is wrong.
    """
    speeds = Speeds()
    if text is None:
        return speeds
    for name, value in pairs("--speed", text, [each.name for each in fields(Speeds)]).items():
        if name in ("gpu", "read", "write"):
            number = float(parse_size(name, value))
        else:
            number = parse_number(name, _number(value), most=1e9, zero=name == "latency")
        speeds = replace(speeds, **{name: number})
    return speeds


def _number(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text
