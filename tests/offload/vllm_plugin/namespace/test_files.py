"""Which of a checkpoint's small files count."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from kvstrata.offload.vllm_plugin.namespace.files import LEFT_OUT, checkpoint_files  # noqa: E402
from kvstrata.offload.vllm_plugin.namespace.values import digest_of  # noqa: E402


def model_of(folder: Path | str, **more: Any) -> Any:
    fields = {
        "model": str(folder),
        "revision": None,
        "multimodal_config": None,
        "quantization": None,
        "trust_remote_code": False,
    }
    return SimpleNamespace(**{**fields, **more})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in LEFT_OUT:
        (folder / name.replace("*", "some")).write_text("{}")
    (folder / "preprocessor_config.json").write_text('{"min_pixels": 4, "transformers_version": 1}')
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    (folder / "modeling.py").write_text("code")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


PIXELS = {"preprocessor_config.json": {"min_pixels": 4}}


def test_processors_always_count(folder: Path) -> None:
    assert checkpoint_files(model_of(folder), None) == PIXELS


@pytest.mark.parametrize("more", [{"multimodal_config": object()}, {"quantization": "gptq"}])
def test_all_json_that_is_not_left_out_by_name(more: dict[str, Any], folder: Path) -> None:
    found = checkpoint_files(model_of(folder, **more), None)
    assert found == PIXELS | {"quantize_config.json": {"bits": 4}}


def test_remote_code_counts_where_it_may_run(folder: Path) -> None:
    found = checkpoint_files(model_of(folder, trust_remote_code=True), None)
    assert found == PIXELS | {"modeling.py": digest_of(b"code")}


def test_remote_code_may_lie_in_sub_folders(folder: Path) -> None:
    (folder / "lib").mkdir()
    (folder / "lib/attention.py").write_text("more code")
    for unread in (".git", "original"):
        (folder / unread).mkdir()
        (folder / unread / "other.py").write_text("none of the model's")
    found = checkpoint_files(model_of(folder, trust_remote_code=True), None)
    code = {"modeling.py": digest_of(b"code"), "lib/attention.py": digest_of(b"more code")}
    assert found == PIXELS | code


def test_a_configuration_in_a_sub_folder_counts(folder: Path) -> None:
    (folder / "vision").mkdir()
    (folder / "vision/config.json").write_text('{"layers": 2}')
    found = checkpoint_files(model_of(folder, multimodal_config=object()), None)
    assert found["vision/config.json"] == {"layers": 2}


def test_the_classes_that_remote_code_names(folder: Path) -> None:
    text = '{"min_pixels": 4, "auto_map": {"AutoProcessor": "processing.A"}}'
    (folder / "preprocessor_config.json").write_text(text)
    assert checkpoint_files(model_of(folder), None) == PIXELS
    found = checkpoint_files(model_of(folder, trust_remote_code=True), None)
    assert found["preprocessor_config.json"] == json.loads(text)


def test_two_processors_differ(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    assert checkpoint_files(model_of(other), None) == checkpoint_files(model_of(folder), None)
    (other / "preprocessor_config.json").write_text('{"min_pixels": 5}')
    assert checkpoint_files(model_of(other), None) != checkpoint_files(model_of(folder), None)


@pytest.mark.parametrize("text", ["nonsense", "[" * 100_000, '{"a": ' * 40 + "1" + "}" * 40])
def test_odd_json_counts_by_its_bytes(text: str, folder: Path) -> None:
    (folder / "processor_config.json").write_text(text)
    found = checkpoint_files(model_of(folder), None)
    assert found["processor_config.json"] == digest_of(text.encode())


def test_links_into_nowhere_are_no_files(folder: Path) -> None:
    (folder / "processor_config.json").symlink_to(folder / "gone")
    assert checkpoint_files(model_of(folder), None) == PIXELS


def test_a_single_file_has_its_folder(folder: Path) -> None:
    assert checkpoint_files(model_of(folder / "model.safetensors"), None) == PIXELS


def test_a_model_that_is_nowhere_has_no_files(tmp_path: Path) -> None:
    assert checkpoint_files(model_of("no/such-model"), str(tmp_path)) == {}


def test_downloads(folder: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    repository = tmp_path / "downloads" / "models--some--model"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    found = checkpoint_files(model_of("some/model"), str(tmp_path / "downloads"))
    assert found == PIXELS
    assert json.dumps(found)
