"""The real Prometheus, which scrapes servers of this machine and answers queries."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.waiting import wait_until

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="no prometheus and promtool here (apt-get install prometheus)",
)


@dataclass(frozen=True)
class Series:
    """One series of an answer, with its present value."""

    labels: dict[str, str] = field(hash=False)
    value: float


class Prometheus:
    """A Prometheus that serves at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expression: str) -> list[Series]:
        """What it answers now.

        Raises:
            ValueError: it does not take the expression; with its reason.
        """
        found = self.get("query", query=expression)
        assert found["resultType"] == "vector", f"{expression} is no vector"
        return [Series(each["metric"], float(each["value"][1])) for each in found["result"]]

    def get(self, path: str, **parameters: str) -> Any:
        """The data of one of its API's answers. ValueError: a refusal."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"{parameters}: {json.load(error)['error']}") from None

    def is_ready(self) -> bool:
        """Whether it answers queries."""
        with suppress(OSError):
            urllib.request.urlopen(f"{self.url}/-/ready", timeout=30).close()
            return True
        return False


@contextmanager
def prometheus(
    folder: Path, targets: Sequence[str], rules: Path | None = None, interval: str = "500ms"
) -> Iterator[Prometheus]:
    """A Prometheus that runs in `folder`, on a free port of 127.0.0.1.

    Args:
        targets: URLs of the servers that it scrapes.
        rules: alert rules that it evaluates.
        interval: between scrapes, and between evaluations.
    """
    config = {
        "global": {"scrape_interval": interval, "evaluation_interval": interval},
        "rule_files": [str(rules)] if rules else [],
        "scrape_configs": [
            {
                "job_name": "vllm",
                "static_configs": [{"targets": [url.removeprefix("http://") for url in targets]}],
            }
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        "--log.level=warn",
    ]
    log = folder / "prometheus.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        running = Prometheus(f"http://{address}")

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            return running.is_ready()

        wait_until(answers)
        yield running
    finally:
        process.kill()  # its data is nobody's
        process.wait()
