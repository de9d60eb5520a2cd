"""What docs/usage.md says is what the code and the other documents have: figures, defaults, lines.

Its commands run on a real server in tests/engine/test_usage.py.
"""

import logging
import re

import pytest

from kvstrata.kernels.bench.models import MODELS
from kvstrata.offload.metering.found import Takings
from kvstrata.offload.metering.minute import MinuteLog, Told
from tests.docs.blocks import ROOT, blocks
from tests.docs.test_deploy import DEPLOY, kubernetes

GUIDE = ROOT / "docs" / "usage.md"
TEXT = GUIDE.read_text()
PLAIN = " ".join(TEXT.split())
KIB, MIB, GIB, TIB = (2 ** (10 * n) for n in range(1, 5))


def token_bytes() -> int:
    """Of Llama-3.1-8B, whose cache is Llama 3's."""
    (model,) = [model for model in MODELS if model.config.endswith("/Meta-Llama-3-8B")]
    return sum(group.token_bytes for group in model.groups)


def test_the_trial_has_less_on_the_gpu_than_it_asks_for() -> None:
    block, blocks_, prompts, numbers = 32, 80, 6, range(1100, 1300)
    tokens = len(" ".join(map(str, numbers)))  # a token each, of most tokenizers a digit is one
    assert f"--block-size {block} --max-model-len 2048 --num-gpu-blocks-override {blocks_}" in TEXT
    assert f"as that of a busy server, {block * blocks_:,} tokens" in PLAIN
    assert f"six prompts of {tokens} tokens" in PLAIN
    cached = (tokens - 1) // block * block  # the last token is always computed
    assert TEXT.count(f'{prompts} "cached_tokens":{cached}\n') == 2
    assert TEXT.count(f"}} {prompts * cached}.0\n") == 2
    assert 2 * block * blocks_ < prompts * tokens


def test_sizes() -> None:
    token = token_bytes()
    per_worker, workers, replicas, gpu, speed = 8, 8, 4, 40, 5000
    for sentence in (
        f"Llama-3.1-8B in bfloat16: {token // KIB} KiB, so {GIB // token:,} tokens in a GiB.",
        f'With `"cpu_bytes_to_use": "{workers * per_worker}GiB"` and tensor parallelism {workers} '
        f"each worker fills {per_worker} GiB of it: {workers * per_worker * GIB // token:,} tokens",
        f"With `--data-parallel-size {replicas}` each replica has a CPU tier of its own: "
        f"{replicas * workers * per_worker} GiB of memory",
        f"With {gpu} GiB for the GPU's cache, {gpu * GIB // token:,} tokens of Llama-3.1-8B, "
        f"give {gpu * 3 // 2} GiB or more.",  # half again as large
        f"{speed:,} tokens a second of Llama-3.1-8B write {speed * token // MIB} MiB/s, "
        f"which is {speed * token * 3600 / TIB:.1f} TiB in an hour.",
    ):
        assert sentence in PLAIN


def test_the_ten_keys_and_their_defaults() -> None:
    """As in the tables of docs/configuration.md, which are made of the code."""
    table = TEXT.split("<!-- ten keys -->")[1].split("<!-- end -->")[0]
    keys = re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.M)
    assert len(keys) == len(dict(keys)) == 10
    known = re.findall(
        r"^\| `(\w+)` \| (.*?) \|", (ROOT / "docs/configuration.md").read_text(), re.M
    )
    assert set(keys) <= set(known)


def test_faults_are_the_doctors() -> None:
    listed = (ROOT / "docs/operations.md").read_text()
    sizing, symptoms = TEXT.split("## What is wrong?")
    named = [
        *re.findall(r"says the same in sentences\s+\(([^)]*)\)", sizing),
        *re.findall(r"doctor(?: says|[^:|]*:) ((?:`[^`]+`(?:, )?)+)", symptoms),
    ]
    faults = [fault for each in named for fault in re.findall(r"`([^`]+)`", each)]
    assert len(faults) >= 20
    assert [fault for fault in faults if f"`{fault}`" not in listed] == []


@pytest.mark.parametrize("words", re.findall(r"the log: ((?:`[^`]+`(?:, then )?)+)", TEXT))
def test_the_log_has_these_words(words: str) -> None:
    source = "".join(
        re.sub(r'"\s+f?"', "", path.read_text())
        for folder in ("offload", "tiers")
        for path in (ROOT / folder).rglob("*.py")
    )
    for line in re.findall(r"`([^`]+)`", words):
        for part in line.split(" ... "):
            assert part in source


def test_the_line_of_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    page, pages, slots = 720 * KIB, 186, 1454
    with caplog.at_level(logging.INFO, "kvstrata"):
        found: dict[str | None, Takings] = {None: Takings(2 * pages, pages), "fs": Takings(pages)}
        held = {"primary": (pages * page, slots * page), "fs": (pages * page, 4 * GIB)}
        log = MinuteLog(0.0, lambda: Told(found, 44.1, held), lambda: now[0])
        now[0] = 60.0
        log.look()
    assert caplog.messages[0] in TEXT


def test_the_lines_for_kubernetes_are_those_of_the_example() -> None:
    (shown,) = [b.text for b in blocks(GUIDE) if b.text.startswith("terminationGracePeriodSeconds")]
    there = (DEPLOY / "kubernetes.yaml").read_text()
    assert len(lines := shown.splitlines()) == 4
    assert [line for line in lines if line not in there] == []
    shm = kubernetes().shm
    assert shm is not None
    assert f"`--shm-size {shm // GIB}g` for a tier of {shm // GIB - 1} GiB" in PLAIN
