"""Asks what a medium's client finds, at a tier's start, in a process that can be killed.

The engine's process is to load no client, and to wait for none without an end. What is asked is a
module of the medium's room whose `main` is `answer(...)`.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from kvstrata.tiers.base import TierConfigError
from kvstrata.tiers.process.medium import words

_STARTS_WITHIN_S = 30.0  # a process, on a loaded machine


def check_client(tier: str, module: str, package: str) -> None:
    """Whether the client of a type of tiers is installed; it is not loaded.

    Raises:
        TierConfigError: it is not.
    """
    if find_spec(module) is None:
        raise TierConfigError(
            f"{tier} tier: the package {package} is missing; pip install 'kvstrata[{tier}]'"
        )


def ask(module: str, options: object, timeout_s: float) -> dict[str, Any]:
    """What the module's process answers.

    Args:
        module: by its whole name.
        options: what it is asked with; pickled.
        timeout_s: seconds for the answer once the process has started.

    Raises:
        OSError: there is none, in time or at all.
    """
    try:
        done = subprocess.run(
            (sys.executable, "-P", "-m", module),
            input=pickle.dumps(options),
            capture_output=True,
            timeout=_STARTS_WITHIN_S + timeout_s,
        )
    except subprocess.TimeoutExpired as late:
        raise OSError(f"no answer within {late.timeout:g} s") from None
    said = done.stdout.splitlines() or [b""]
    try:
        found = json.loads(said[-1])
    except ValueError:
        why = (done.stderr.splitlines() or [b""])[-1].decode(errors="replace")
        raise OSError(f"its process ended with {done.returncode}: {why}") from None
    return dict(found)


def answer(find: Callable[[Any], Mapping[str, object]]) -> None:
    """Read the options from standard input; the last line of output says as JSON what is found."""
    options = pickle.load(sys.stdin.buffer)
    try:
        found = find(options)
    except (OSError, ImportError) as error:
        found = {"error": words(error)}
    print(json.dumps(found), flush=True)
