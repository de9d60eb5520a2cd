"""The main job: `vllm serve` with one JSON line, a hit from memory, a hit from files.

Servers and engines of one model follow each other over one directory: a server at TP 1
writes and is killed, an engine at TP 2 reads and writes, a server at TP 1 reads. The tests
build on each other in this order, since every engine start takes half a minute.
"""

import time
from pathlib import Path

import pytest

from kvstrata.tiers.fs.tools.scan import check_root
from tests.engine.absent_tier import CAUSE
from tests.engine.driver import (
    START_TIMEOUT_S,
    Engine,
    Server,
    connector,
    prompt,
    region_files,
    serving,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.vllm

FROM_TP1, FROM_TP2, DAMAGED, NEW = (prompt(seed) for seed in range(4))
OTHERS = [prompt(seed) for seed in range(100, 103)]
PAGES = 10  # per prompt: 320 tokens in blocks of 32
HIT = 288  # cached tokens of a full hit: vLLM computes at least the last block again


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that all engines of this module share."""
    return tmp_path_factory.mktemp("kv")


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the engines' output goes."""
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def reference(llama: Path, logs: Path) -> dict[str, list[int]]:
    """Each prompt's tokens from an engine that runs without any offload."""
    texts = [FROM_TP1, FROM_TP2, DAMAGED, NEW]
    with Engine(llama, logs / "reference.log", kv_transfer_config=None) as engine:
        answers = engine.generate(texts)
    tokens = [answer["tokens"] for answer in answers]
    assert len({tuple(t) for t in tokens}) == len(texts), "the prompts must differ in output"
    return dict(zip(texts, tokens, strict=True))


def as_text(tokens: list[int]) -> str:
    """One token is one ASCII character in the tiny models."""
    return "".join(map(chr, tokens))


def tier(root: Path) -> dict[str, object]:
    """The configuration of the shared directory."""
    return {"secondary_tiers": [{"type": "fs", "root_dir": str(root)}]}


def pages(root: Path) -> list[Path]:
    """All page files below the root."""
    return sorted(root.glob("*_r0/*/*/*.safetensors"))


def wait_for_pages(root: Path, count: int) -> None:
    """Wait until the tier has written `count` pages."""
    wait_until(lambda: len(pages(root)) >= count)


def test_a_server_hits_in_memory_and_survives_a_kill(
    llama: Path, root: Path, logs: Path, reference: dict[str, list[int]]
) -> None:
    config = connector(**tier(root))
    with serving(llama, logs / "server-1.log", kv_transfer_config=config) as server:
        assert region_files() == []
        cold = server.ask(FROM_TP1)
        assert cold == {"text": as_text(reference[FROM_TP1]), "cached": 0}
        for text in (DAMAGED, *OTHERS):  # 40 blocks: more than the GPU cache has
            server.ask(text)
        hit = server.ask(FROM_TP1)
        assert hit["text"] == cold["text"]
        assert hit["cached"] >= HIT
        wait_for_pages(root, PAGES * (2 + len(OTHERS)))
        metrics = server.metrics()
        assert 'kvstrata_events_total{engine="0",event="stored_pages"' in metrics
        assert 'tier="fs"' in metrics
        server.kill()
    assert region_files() == []
    checked = check_root(root)
    assert (checked.files, checked.bad) == (PAGES * (2 + len(OTHERS)), [])


def test_tp2_reads_what_tp1_wrote(
    llama: Path, root: Path, logs: Path, reference: dict[str, list[int]]
) -> None:
    log = logs / "tp2.log"
    before = len(pages(root))
    with Engine(llama, log, kv_transfer_config=connector(**tier(root)), tp=2) as engine:
        hit = engine.ask(FROM_TP1)
        assert hit["cached"] >= HIT
        assert hit["tokens"] == reference[FROM_TP1]
        cold = engine.ask(FROM_TP2)
        assert (cold["tokens"], cold["cached"]) == (reference[FROM_TP2], 0)
        wait_for_pages(root, before + PAGES)


def test_tp1_reads_what_tp2_wrote_and_damage_never_shows(
    llama: Path, root: Path, logs: Path, reference: dict[str, list[int]]
) -> None:
    with serving(
        llama, logs / "server-2.log", kv_transfer_config=connector(**tier(root))
    ) as server:
        hit = server.ask(FROM_TP2)
        assert hit["cached"] >= HIT
        assert hit["text"] == as_text(reference[FROM_TP2])
        _damaged_page_is_recomputed(server, root, as_text(reference[DAMAGED]))
        root.rename(root.with_name("gone"))  # the disk goes away under a serving engine
        for text in (NEW, FROM_TP1):
            assert server.ask(text)["text"] == as_text(reference[text])


def _damaged_page_is_recomputed(server: Server, root: Path, right: str) -> None:
    """Flip one byte in every page: whatever belongs to the prompt is recomputed."""
    for path in pages(root):
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
    bad = check_root(root).bad
    assert len(bad) == len(pages(root))
    answer = server.ask(DAMAGED)
    assert answer["text"] == right
    assert answer["cached"] == 0
    # The statistics of an engine's last step come after the answer.
    wait_until(lambda: 'cause="checksum"' in server.metrics())
    assert list(root.glob("*_r0/quarantine/*")), "the bad page was not set aside"


def test_a_start_that_fails_says_why_and_cleans_up_after_a_killed_one(
    llama: Path, logs: Path
) -> None:
    log = logs / "killed.log"
    killed = Server(llama, log, kv_transfer_config=connector(), site="halting")
    deadline = time.monotonic() + START_TIMEOUT_S
    while not region_files():
        assert killed.process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, "the region never appeared"
        time.sleep(0.1)
    killed.kill()  # nobody has removed the region's name yet
    assert len(region_files()) == 1

    tiers = [{"type": "AbsentTier", "module_path": "tests.engine.absent_tier"}]
    refused = Server(
        llama, logs / "refused.log", kv_transfer_config=connector(secondary_tiers=tiers)
    )
    with pytest.raises(RuntimeError, match="the server ended"):
        refused.wait_ready()
    refused.kill()
    assert CAUSE in refused.log.read_text()
    assert region_files() == []
