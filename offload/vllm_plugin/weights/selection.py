"""Which files of a model are its weights: at least all that vLLM may read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator

# What vLLM's loaders open (model_executor/model_loader/default_loader.py, `_prepare_weights`; the
# models that load parts of their own read the same kinds), and the files that say how.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_HOW = re.compile(r".*\.index\.json|.*quant.*\.json|adapter_config\.json")
# What training leaves beside a checkpoint (vLLM's `filter_files_not_needed_for_inference`).
_TRAINING = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
# Directories that no model reads: of tools, of the publisher's first form of the checkpoint
# (vLLM leaves it out of downloads), and of a trainer's earlier states.
_LEFT_OUT = re.compile(r"\..*|original|checkpoint-\d+|global_step\d+")
_HF_INDEX = "model.safetensors.index.json"
_PART = re.compile(r"(.*)-\d{5}-of-\d{5}\.gguf")
_EITHER = "auto or mistral"
# Formats in which vLLM reads *.safetensors and, where there are some, nothing of the kind of *.bin
_SAFETENSORS_FIRST = frozenset(
    {
        *("auto", "hf", "mistral", _EITHER, "safetensors", "fastsafetensors"),
        *("instanttensor", "runai_streamer"),
    }
)


def weight_files(root: str, load_format: str, *, local: bool) -> list[tuple[str, str]]:
    """(name inside the model, path) of the weight files, sorted by name.

    Every file of a weight kind counts, in sub-directories too, because models read more than
    the checkpoint (towers, heads, adapters). Left out are another form of the same weights, where
    vLLM is known not to read it, and what no model reads.

    Args:
        root: the model's directory, or its one file.
        load_format: vLLM's; "auto" is decided as vLLM does.
        local: whether the user gave this directory rather than a repository's name.

    Raises:
        OSError: there are none, or a directory cannot be read; the message says where.
    """
    if os.path.isfile(root):
        return _single_file(root)
    folders = list(_walk(root))
    if load_format == "auto" and any(
        _is_consolidated(name) for _, names in folders for name in names
    ):
        # vLLM asks the hub for a repository, which a copy on this host need not resemble
        load_format = "mistral" if local else _EITHER
    found = []
    for folder, names in folders:
        inside = os.path.relpath(folder, root)
        unread = _other_forms(folder, names, load_format, top=inside == ".")
        for name in names:
            if name not in unread:
                found.append((os.path.normpath(f"{inside}/{name}"), os.path.join(folder, name)))
    if not any(name.endswith(_WEIGHTS) for name, _ in found):
        raise FileNotFoundError(f"{root} has no {', '.join(f'*{kind}' for kind in _WEIGHTS)}")
    return sorted(found)


def _walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """(directory, names of files that may count), each directory once, through links too."""

    def fail(error: OSError) -> None:
        if not isinstance(error, PermissionError) or error.filename == root:
            raise error  # what this user may not read (lost+found), vLLM has not read either

    seen = set()
    for folder, inner, names in os.walk(root, onerror=fail, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inner[:] = sorted(name for name in inner if not _LEFT_OUT.fullmatch(name))
        yield (
            folder,
            [
                name
                for name in names
                if (name.endswith(_WEIGHTS) and not name.endswith(_TRAINING))
                or _HOW.fullmatch(name)
            ],
        )


def _is_consolidated(name: str) -> bool:
    return name.startswith("consolidated") and name.endswith(".safetensors")


def _other_forms(folder: str, names: list[str], load_format: str, *, top: bool) -> set[str]:
    """Files in which the same weights lie once more, and which vLLM does not read."""
    unread = set()
    if load_format == "mistral" and top:
        unread |= {n for n in names if re.fullmatch(r"model(-.*)?\.safetensors", n)} | {_HF_INDEX}
    elif load_format not in ("mistral", "auto", _EITHER) and _HF_INDEX in names:
        indexed = _indexed(os.path.join(folder, _HF_INDEX))
        unread |= {n for n in names if n.startswith("consolidated") and n not in indexed}
    if load_format in _SAFETENSORS_FIRST and any(
        # parts that a model loads by itself have exactly this name
        name == "model.safetensors" or (top and re.fullmatch(r"model-.*\.safetensors", name))
        for name in names
    ):
        unread |= {name for name in names if name.startswith("pytorch_model")}
    return unread


def _indexed(path: str) -> set[str]:
    """The files that an index names; all names that there could be if it is broken."""
    with open(path, "rb") as file:
        text = file.read()
    try:
        return {str(name) for name in json.loads(text)["weight_map"].values()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {name for name in os.listdir(os.path.dirname(path))}


def _single_file(path: str) -> list[tuple[str, str]]:
    """A GGUF file comes with its other parts and the projector beside it; others alone."""
    folder, name = os.path.split(path)
    names = {name}
    if part := _PART.fullmatch(name):
        names |= {n for n in os.listdir(folder or ".") if n.startswith(f"{part[1]}-")}
    if name.endswith(".gguf"):
        names |= {n for n in os.listdir(folder or ".") if re.fullmatch(r"mmproj.*\.gguf", n)}
    return [(name, os.path.join(folder, name)) for name in sorted(names)]
