"""Where a model's weights come from, as the engine was told; the same in every process."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass

from huggingface_hub import snapshot_download

from kvstrata.offload.vllm_plugin.weights.identity import identity_of
from kvstrata.offload.vllm_plugin.weights.selection import weight_files


@dataclass(frozen=True, slots=True)
class WeightSource:
    """A model on this host: a directory, a file, or a repository in Hugging Face's cache.

    `download_dir` stands for that cache; `load_format` is vLLM's.
    """

    model: str
    revision: str | None
    download_dir: str | None
    load_format: str

    def files(self) -> list[tuple[str, str]]:
        """(name inside the model, path) of the weight files, sorted by name.

        Raises:
            OSError: there are none; the message says where they were looked for.
        """
        local = os.path.exists(self.model)
        root = self.model if local else self._downloaded()
        return weight_files(root, self.load_format, local=local)

    def state(self) -> str:
        """A digest that is another one as soon as a weight file is another.

        No file is opened, and the same content in a new file counts as another.

        Raises:
            OSError: a file is missing.
        """
        files = [(name, identity_of(path)) for name, path in self.files()]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()

    def _downloaded(self) -> str:
        try:
            return str(
                snapshot_download(
                    self.model,
                    revision=self.revision,
                    cache_dir=self.download_dir,
                    local_files_only=True,
                )
            )
        except Exception as error:  # the library raises many kinds
            place = self.download_dir or "Hugging Face's cache"
            raise FileNotFoundError(f"{place} does not hold the model: {error}") from error
