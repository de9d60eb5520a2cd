"""Whether weights changed since the start; in doubt they did."""

import logging
import os
import shutil
import threading
from pathlib import Path

import pytest

from kvstrata.offload.vllm_plugin.weights import watch
from kvstrata.offload.vllm_plugin.weights.source import WeightSource
from kvstrata.offload.vllm_plugin.weights.watch import WeightWatch, watch_entry


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("model-1.safetensors", "model-2.safetensors", "config.json"):
        (folder / name).write_bytes(b"content")
    return folder


def watched(model: Path) -> WeightWatch:
    source = WeightSource(str(model), None, None, "auto")
    return WeightWatch([watch_entry(source, source.state())])


def test_nothing_changed(model: Path) -> None:
    found = watched(model)
    (model / "config.json").write_text("more")
    (model / "notes.txt").write_text("new")
    (model / "model-1.safetensors").read_bytes()
    assert not found.changed() and not found.changed()


def replace(model: Path) -> None:
    """As a trainer or `rsync` publishes: same size and modification time."""
    old = model / "model-2.safetensors"
    new = model / "new"
    new.write_bytes(b"CONTENT")
    os.utime(new, ns=(old.stat().st_atime_ns, old.stat().st_mtime_ns))
    os.replace(new, old)


CHANGES = {
    "replaced": replace,
    "larger": lambda model: (model / "model-1.safetensors").write_bytes(b"more content"),
    "one more": lambda model: (model / "model-3.safetensors").write_bytes(b""),
    "one less": lambda model: (model / "model-1.safetensors").unlink(),
    "gone": shutil.rmtree,
    "a directory": lambda model: (
        (model / "model-1.safetensors").unlink(),
        (model / "model-1.safetensors").mkdir(),
    ),
    "a link to another": lambda model: (
        (model / "model-1.safetensors").rename(model / "other.safetensors"),
        (model / "model-1.safetensors").symlink_to(model / "model-2.safetensors"),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes(change: str, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = watched(model)
    CHANGES[change](model)
    assert found.changed()
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert str(model) in record.getMessage() and "were changed" in record.getMessage()
    assert "restart the engine" in record.getMessage()


def test_a_new_revision_in_the_cache(tmp_path: Path) -> None:
    """A reload of a repository's name reads what the reference names then."""
    repository = tmp_path / "models--some--model"
    for commit in ("1" * 40, "2" * 40):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").write_bytes(b"content")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1" * 40)
    source = WeightSource("some/model", None, str(tmp_path), "auto")
    found = WeightWatch([watch_entry(source, source.state())])
    assert not found.changed()
    (repository / "refs" / "main").write_text("2" * 40)
    assert found.changed()


def test_a_file_system_that_does_not_answer(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = watched(model)
    answer = threading.Event()
    monkeypatch.setattr(watch, "DEADLINE_S", 0.01)
    monkeypatch.setattr(WeightSource, "state", lambda self: answer.wait(60.0))
    assert found.changed()
    answer.set()
    assert "cannot be seen for 0.01 s" in caplog.text
