"""The names of an engine's weights: equal exactly when what vLLM reads is."""

import hashlib
import logging
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

import vllm  # noqa: E402

from kvstrata.offload.vllm_plugin.weights import fingerprint as fingerprint_module  # noqa: E402
from kvstrata.offload.vllm_plugin.weights.content import Gather  # noqa: E402
from kvstrata.offload.vllm_plugin.weights.fingerprint import WeightNames  # noqa: E402
from kvstrata.offload.vllm_plugin.weights.memory import DigestMemory  # noqa: E402
from kvstrata.offload.vllm_plugin.weights.watch import WeightWatch  # noqa: E402
from kvstrata.tiers.base import unseen_reason  # noqa: E402
from tests.spoiling import flip  # noqa: E402

MIB = 2**20


def name_weights(engine: Any, gather: Gather = lambda value: [value], rank: int = 0) -> WeightNames:
    return fingerprint_module.name_weights(engine, gather, rank)


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DigestMemory:
    """Of this test alone."""
    made = DigestMemory(str(tmp_path / "memory"))
    monkeypatch.setattr(fingerprint_module, "default_memory", lambda: made)
    return made


def model_of(model: Path | str, **more: Any) -> Any:
    fields = {"model": str(model), "revision": None, "quantization": None, "dtype": "bf16"}
    return SimpleNamespace(**{**fields, "seed": 0, **more})


def engine_of(model: Any, load_format: str = "auto", **more: Any) -> Any:
    load = SimpleNamespace(load_format=load_format, download_dir=more.pop("download_dir", None))
    load.model_loader_extra_config = more.pop("extra", {})
    fields = {"model_config": model, "load_config": load, "speculative_config": None}
    return SimpleNamespace(**{**fields, **more})


def fingerprint(model: Path | str, load_format: str = "auto", **more: Any) -> str:
    where = {key: more.pop(key) for key in ("download_dir", "extra") if key in more}
    name = name_weights(engine_of(model_of(model, **more), load_format, **where)).fields["weights"]
    assert name is not None
    return name


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Two weight files, one of them of three MiB, and files that are no weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model-00001.safetensors").write_bytes(os.urandom(3 * MIB))
    (folder / "model-00002.safetensors").write_bytes(os.urandom(100))
    (folder / "config.json").write_text("{}")
    return folder


# -- the content --------------------------------------------------------------------


def test_equal_on_every_host(weights: Path, tmp_path: Path) -> None:
    """Neither the directory nor times nor other files count."""
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(weights, copy)
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    (copy / "README.md").write_text("more")
    assert fingerprint(copy) == fingerprint(weights) == fingerprint(weights)


CHANGES: dict[str, Callable[[Path], object]] = {
    "first byte": lambda folder: flip(folder / "model-00001.safetensors", 0),
    "a row in the middle": lambda folder: flip(folder / "model-00001.safetensors", 1_234_567),
    "last byte": lambda folder: flip(folder / "model-00001.safetensors", 3 * MIB - 1),
    "small file": lambda folder: flip(folder / "model-00002.safetensors", 50),
    "name": lambda folder: (folder / "model-00002.safetensors").rename(folder / "b.safetensors"),
    "size": lambda folder: os.truncate(folder / "model-00001.safetensors", 3 * MIB + 1),
    "one more": lambda folder: (folder / "x.safetensors").write_bytes(b""),
    "one less": lambda folder: (folder / "model-00002.safetensors").unlink(),
    "an adapter": lambda folder: (folder / "adapter_model.bin").write_bytes(b"1"),
    "how it is quantised": lambda folder: (folder / "hf_quant_config.json").write_text("{}"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_weights_have_another_name(change: str, weights: Path) -> None:
    before = fingerprint(weights)
    CHANGES[change](weights)
    assert fingerprint(weights) != before


@pytest.mark.parametrize(
    "more",
    [{"quantization": "fp8"}, {"dtype": "fp16"}, {"load_format": "safetensors"}],
    ids=str,
)
def test_how_weights_are_read_counts(more: dict[str, Any], weights: Path) -> None:
    assert fingerprint(weights, **more) != fingerprint(weights)


def test_seed_of_real_weights_does_not_count(weights: Path) -> None:
    assert fingerprint(weights, seed=1) == fingerprint(weights)


def test_a_single_file_model(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    before = fingerprint(file)
    assert fingerprint(file) == before
    flip(file, 3)
    assert fingerprint(file) != before


def in_the_hub(weights: Path, cache: Path, etag: Callable[[bytes], str]) -> Path:
    """The model as a download leaves it; its blobs' names, and its content nowhere else."""
    repository = cache / "models--some--model"
    snapshot = repository / "snapshots" / ("0123456789abcdef" * 2 + "01234567")
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    for path in weights.iterdir():
        name = etag(path.read_bytes())
        (repository / "blobs" / name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    return snapshot


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.mark.parametrize("etag", [sha256, sha1])
def test_equal_in_the_hubs_cache(
    etag: Callable[[bytes], str],
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy that was downloaded otherwise; where SHA-256 is known, nothing is read."""
    snapshot = in_the_hub(weights, tmp_path / "hub", etag)
    expected = fingerprint(weights)
    if etag is sha256:
        monkeypatch.setattr("kvstrata.offload.vllm_plugin.weights.content.read_digest", None)
    assert fingerprint(snapshot) == expected
    assert fingerprint("some/model", download_dir=str(tmp_path / "hub")) == expected


def test_an_edited_blob_in_the_hubs_cache(weights: Path, tmp_path: Path) -> None:
    snapshot = in_the_hub(weights, tmp_path / "hub", sha256)
    before = fingerprint(snapshot)
    link = snapshot / "model-00001.safetensors"
    while link.stat().st_ctime_ns <= link.lstat().st_ctime_ns:
        flip(link, MIB)
    if link.read_bytes() == (weights / link.name).read_bytes():
        flip(link, MIB)
    assert fingerprint(snapshot) != before


def test_a_later_start_reads_nothing(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstrata.offload.vllm_plugin.weights.memory.SETTLED_NS", 0)
    before = fingerprint(weights)
    monkeypatch.setattr("kvstrata.offload.vllm_plugin.weights.content.read_digest", None)
    assert fingerprint(weights) == before


def test_the_draft_models_weights(weights: Path, tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "d.safetensors").write_bytes(b"1")
    model = model_of(weights)
    assert name_weights(engine_of(model)).fields["draft_weights"] is None
    speculative = SimpleNamespace(draft_model_config=model_of(draft), draft_load_config=None)
    engine = engine_of(model, speculative_config=speculative)
    before = name_weights(engine)
    assert before.fields["weights"] == name_weights(engine_of(model)).fields["weights"]
    assert before.fields["draft_weights"] == fingerprint(draft)
    watch = WeightWatch(before.watch)
    assert not watch.changed()
    (draft / "d.safetensors").write_bytes(b"22")
    assert name_weights(engine).fields["draft_weights"] != before.fields["draft_weights"]
    assert watch.changed()
    speculative.draft_load_config = SimpleNamespace(load_format="tensorizer", download_dir=None)
    assert unseen_reason(name_weights(engine).fields["draft_weights"])


def test_models_that_a_model_names(weights: Path, tmp_path: Path) -> None:
    """Ultravox's towers."""
    tower = tmp_path / "tower"
    tower.mkdir()
    (tower / "t.safetensors").write_bytes(b"1")
    with_tower = {"hf_config": SimpleNamespace(audio_model_id=str(tower), text_model_id=None)}
    before = fingerprint(weights, **with_tower)
    assert before != fingerprint(weights)
    (tower / "t.safetensors").write_bytes(b"2")
    assert fingerprint(weights, **with_tower) != before
    missing = {"hf_config": SimpleNamespace(text_model_id="no-such/model")}
    assert unseen_reason(fingerprint(weights, download_dir=str(tmp_path), **missing))


def test_no_other_model_of_vllm_names_models() -> None:
    """A new one shows here: where `_OTHER_MODELS` is read from."""
    found = set()
    for path in (Path(vllm.__file__).parent / "model_executor" / "models").glob("*.py"):
        for line in path.read_text().splitlines():
            if line.strip().startswith("model_or_path="):
                found.add(line.strip().removeprefix("model_or_path=").rstrip(","))
    others = found - {"model_config.model", "vllm_config.model_config.model"}
    assert others == {f"config.{field}" for field in fingerprint_module._OTHER_MODELS}


def test_every_load_format_of_vllm_is_known() -> None:
    """A new one counts as one that may read from anywhere."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as loaders

    elsewhere = {"dummy", "ipc_cache", "modelexpress", "npcache", "tensorizer"}
    assert {name for name in loaders if name not in fingerprint_module._FROM_FILES} == elsewhere


# -- weights that cannot be seen ----------------------------------------------------

UNSEEN: dict[str, tuple[dict[str, Any], str]] = {
    "dummy": ({"load_format": "dummy"}, "load_format=dummy makes weights of its own"),
    "tensorizer": ({"load_format": "tensorizer"}, "load_format=tensorizer"),
    "a plugin's": ({"load_format": "my_loader"}, "load_format=my_loader"),
    "object storage": ({"model_weights": "s3://bucket/model"}, "s3://bucket/model"),
    "files by pattern": (
        {"load_format": "sharded_state", "extra": {"pattern": "x-{rank}-{part}.y"}},
        "x-{rank}-{part}.y",
    ),
}


@pytest.mark.parametrize("kind", UNSEEN)
def test_weights_from_elsewhere(kind: str, weights: Path) -> None:
    more, reason = UNSEEN[kind]
    found = fingerprint(weights, **more)
    assert reason in (unseen_reason(found) or "")
    assert fingerprint(weights, **more) != found


def test_weights_that_cannot_be_read(weights: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert unseen_reason(fingerprint(empty)) == (
        f"{empty} has no *.safetensors, *.bin, *.pt, *.gguf"
    )
    assert "does not hold the model" in (unseen_reason(fingerprint("no-such/model")) or "")
    os.mkfifo(weights / "pipe.safetensors")
    assert "pipe.safetensors is not a regular file" in (unseen_reason(fingerprint(weights)) or "")
    os.unlink(weights / "pipe.safetensors")
    (weights / "link.safetensors").symlink_to("nothing")
    assert "link.safetensors" in (unseen_reason(fingerprint(weights)) or "")


def test_modelscope(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository of that name in Hugging Face's cache is another one; a directory is not."""
    in_the_hub(weights, tmp_path / "hub", sha256)
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "True")
    found = fingerprint("some/model", download_dir=str(tmp_path / "hub"))
    assert "ModelScope" in (unseen_reason(found) or "")
    assert unseen_reason(fingerprint(weights)) is None


def test_a_restart_without_known_weights_is_warned_of(
    weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, with the reason; dummy weights are not meant to be found again."""
    caplog.set_level(logging.WARNING, "kvstrata")
    fingerprint(weights)
    fingerprint(weights, load_format="dummy")
    assert not caplog.records
    fingerprint("no-such/model", download_dir=str(tmp_path))
    [record] = caplog.records
    text = record.getMessage()
    assert "no-such/model" in text and f"{tmp_path} does not hold the model" in text
    assert "not be found after a restart" in text


# -- the ranks share the work -------------------------------------------------------


TIMEOUT_SECONDS = 30.0  # only a rank that leaves out a collective meets it


def on_ranks(size: int, engine: Any) -> list[dict[str, str | None]]:
    """The names on each rank of an engine; every rank is a thread that bears its number."""
    barrier = threading.Barrier(size, timeout=TIMEOUT_SECONDS)
    board: list[Any] = [None] * size
    found: list[Any] = [None] * size
    calls: list[int] = []

    def one(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            calls.append(rank)
            board[rank] = pickle.loads(pickle.dumps(value))
            barrier.wait()
            values = list(board)
            barrier.wait()
            return values

        found[rank] = name_weights(engine, gather, rank).fields

    threads = [threading.Thread(target=one, args=(rank,), name=str(rank)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(calls) == sorted([*range(size)] * 2), "all ranks take part in two collectives"
    return found


def this_rank() -> int:
    return int(threading.current_thread().name)


@pytest.fixture
def more_weights(weights: Path) -> Path:
    for number in range(5):
        (weights / f"more-{number}.bin").write_bytes(os.urandom(1000 * number))
    return weights


def test_ranks_read_each_file_once(more_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(model_of(more_weights))
    expected = name_weights(engine).fields
    read: dict[int, list[str]] = {}
    digest = fingerprint_module.read_digests

    def note(paths: Any, *more: Any) -> Any:
        read[this_rank()] = paths
        return digest(paths, *more)

    monkeypatch.setattr(fingerprint_module, "read_digests", note)
    assert on_ranks(3, engine) == [expected] * 3
    paths = [path for part in read.values() for path in part]
    assert len(paths) == len(set(paths)) == 7 and all(read.values())


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_one_rank_that_fails(
    failing: int, more_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks go on, and agree that the weights cannot be seen."""
    digest = fingerprint_module.read_digests

    def fail(*args: Any) -> Any:
        if this_rank() == failing:
            raise MemoryError("no memory on this rank")
        return digest(*args)

    monkeypatch.setattr(fingerprint_module, "read_digests", fail)
    for fields in on_ranks(3, engine_of(model_of(more_weights))):
        assert unseen_reason(fields["weights"]) == "no memory on this rank"


def test_the_first_rank_fails_to_look(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(fingerprint_module, "find_digests", fail)
    for fields in on_ranks(2, engine_of(model_of(weights))):
        assert unseen_reason(fields["weights"]) == "broken"
        assert fields["draft_weights"] is None


def test_a_number_outside_the_ranks(weights: Path) -> None:
    """However an executor numbers its workers, the start neither hangs nor dies."""
    found = name_weights(engine_of(model_of(weights)), rank=7)
    assert unseen_reason(found.fields["weights"]) == "rank 0 has not looked"
