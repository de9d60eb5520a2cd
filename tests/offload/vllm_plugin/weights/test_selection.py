"""Which files count: at least all that vLLM may read, and no second form of the same weights."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvstrata.offload.vllm_plugin.weights.selection import weight_files

INDEX = "model.safetensors.index.json"


def make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def names(root: Path, load_format: str = "auto", *, local: bool = True) -> list[str]:
    return [name for name, _ in weight_files(str(root), load_format, local=local)]


def test_every_kind_of_weight_file_counts(tmp_path: Path) -> None:
    files = [
        *("a.safetensors", "adapter_config.json", "adapter_model.safetensors"),
        *("colbert_linear.pt", "hf_quant_config.json", INDEX, "quantize_config.json"),
        *("tower/deep/x.bin", "x.gguf"),
    ]
    make(tmp_path, *files, "config.json", "README.md", "tokenizer.json", "vocab.bin.txt")
    assert names(tmp_path) == files
    assert weight_files(str(tmp_path), "auto", local=True)[0][1] == str(tmp_path / "a.safetensors")


def test_what_no_model_reads_does_not_count(tmp_path: Path) -> None:
    make(tmp_path, "model.safetensors", "optimizer.pt", "training_args.bin", "my_scheduler.pt")
    make(tmp_path, "original/consolidated.00.pt", ".git/lfs/x.bin", ".cache/y.safetensors")
    make(tmp_path, "checkpoint-500/model.safetensors", "global_step9/mp_rank_00.pt")
    assert names(tmp_path, "hf") == ["model.safetensors"]
    make(tmp_path, "originals/a.bin", "checkpoint-best/a.bin")
    assert names(tmp_path, "hf") == [
        "checkpoint-best/a.bin",
        "model.safetensors",
        "originals/a.bin",
    ]


def test_bin_beside_safetensors_is_not_read(tmp_path: Path) -> None:
    """Other than the checkpoint in its older form, it may be read by the model's own code."""
    make(tmp_path, "pytorch_model-1.bin", "pytorch_model.bin.index.json", "head.bin")
    every = ["head.bin", "pytorch_model-1.bin", "pytorch_model.bin.index.json"]
    assert names(tmp_path) == every
    make(tmp_path, "model-1.safetensors")
    assert names(tmp_path) == ["head.bin", "model-1.safetensors"]
    assert names(tmp_path, "pt") == sorted([*every, "model-1.safetensors"])


def test_parts_in_directories_of_their_own(tmp_path: Path) -> None:
    """A model reads `model.safetensors` there, else `pytorch_model.bin`."""
    make(tmp_path, "2_Dense/pytorch_model.bin", "2_Dense/model-1.safetensors", "a.safetensors")
    assert "2_Dense/pytorch_model.bin" in names(tmp_path)
    make(tmp_path, "2_Dense/model.safetensors")
    assert "2_Dense/pytorch_model.bin" not in names(tmp_path)


MISTRAL = ["consolidated.safetensors", "params.json"]
SHARDS = ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]


@pytest.mark.parametrize(
    ("load_format", "local", "read"),
    [
        ("auto", True, ["consolidated.safetensors"]),
        ("mistral", False, ["consolidated.safetensors"]),
        ("hf", True, [*SHARDS, INDEX]),
        ("safetensors", True, [*SHARDS, INDEX]),
        # the hub's list of files decides, and the cache need not resemble it
        ("auto", False, ["consolidated.safetensors", *SHARDS, INDEX]),
    ],
)
def test_consolidated_beside_shards(
    load_format: str, local: bool, read: list[str], tmp_path: Path
) -> None:
    make(tmp_path, *MISTRAL, *SHARDS)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}))
    assert names(tmp_path, load_format, local=local) == read


@pytest.mark.parametrize("index", [None, "{", "[]", '{"weight_map": 1}', "[" * 10_000])
def test_without_an_index_vllm_reads_both(index: str | None, tmp_path: Path) -> None:
    make(tmp_path, *MISTRAL, *SHARDS)
    if index is not None:
        (tmp_path / INDEX).write_text(index)
    assert set(names(tmp_path, "hf")) >= {"consolidated.safetensors", *SHARDS}


def test_an_index_that_names_it(tmp_path: Path) -> None:
    make(tmp_path, *MISTRAL)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": MISTRAL[0]}}))
    assert names(tmp_path, "hf") == [MISTRAL[0], INDEX]


def test_links_to_directories_are_followed_once(tmp_path: Path) -> None:
    elsewhere = make(tmp_path / "elsewhere", "a.safetensors", "inner/b.bin")
    model = tmp_path / "model"
    model.mkdir()
    (model / "tower").symlink_to(elsewhere)
    (model / "tower2").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(model)
    assert names(model) == ["tower/a.safetensors", "tower/inner/b.bin"]
    (tmp_path / "link").symlink_to(model)
    assert names(tmp_path / "link") == names(model)


def test_parts_of_a_gguf_file_come_with_it(tmp_path: Path) -> None:
    parts = [f"m-Q4-0000{number}-of-00002.gguf" for number in (1, 2)]
    make(tmp_path, *parts, "m-Q8.gguf", "other.gguf")
    assert names(tmp_path / "m-Q8.gguf") == ["m-Q8.gguf"]
    assert names(tmp_path / parts[1]) == parts
    make(tmp_path, "mmproj-m-f16.gguf")
    assert names(tmp_path / "m-Q8.gguf") == ["m-Q8.gguf", "mmproj-m-f16.gguf"]


def test_a_directory_that_nobody_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lost+found` of a volume: vLLM runs as the same user. Other errors are no answer."""
    make(tmp_path, "a.safetensors", "lost+found/b.bin", "z/c.bin")
    scan, error = os.scandir, [PermissionError]

    def refuse(path: str) -> Any:
        if path.endswith("lost+found"):
            raise error[0](errno.EACCES, "refused", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert names(tmp_path) == ["a.safetensors", "z/c.bin"]
    with pytest.raises(PermissionError):
        names(tmp_path / "lost+found")
    error[0] = TimeoutError
    with pytest.raises(TimeoutError):
        names(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    make(tmp_path, "config.json", "quantize_config.json", "a.safetensors/b.txt")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no .*safetensors, .*bin"):
        names(tmp_path)
