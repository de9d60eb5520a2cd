"""What a real server tells Prometheus, and its log, of what it did."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.driver import Server, connector, prompt, serving

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def server(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("metrics")
    files = {"type": "fs", "root_dir": str(folder / "kv"), "max_files": 120}
    config = connector(cpu_bytes_to_use="2MiB", secondary_tiers=[files], log_interval_s=2)
    with serving(llama, folder / "server.log", kv_transfer_config=config) as server:
        yield server


def test_try(server: Server) -> None:
    for round in range(3):
        for seed in range(8):
            print(server.ask(prompt(seed)))
    Path("/tmp/mtry/metrics.txt").write_text(server.metrics())
    Path("/tmp/mtry/log.txt").write_text(Path(server.log).read_text())
