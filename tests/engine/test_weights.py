"""Weight updates: what was computed with other weights is never loaded.

vLLM does not tell connectors of weight updates; it resets caches around them.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.engine.driver import Engine, connector, prompt

pytestmark = pytest.mark.vllm

UPDATES = {"backend": "nccl"}  # a weight_transfer_config; nothing is transferred here


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that all engines of this module share."""
    return tmp_path_factory.mktemp("kv")


def started(llama: Path, root: Path, log: Path, **extra: Any) -> Engine:
    """An engine that may receive weights."""
    tiers = [{"type": "fs", "root_dir": str(root), "max_bytes": "1GiB"}]
    config = connector(secondary_tiers=tiers, **extra)
    return Engine(llama, log, kv_transfer_config=config, weight_transfer_config=UPDATES)


def test_an_engine_that_may_receive_weights_forgets_at_every_reset(
    llama: Path, root: Path, tmp_path: Path
) -> None:
    text = prompt(1)
    with started(llama, root, tmp_path / "log") as engine:
        old = engine.ask(text)
        for seed in range(100, 104):
            engine.ask(prompt(seed), max_tokens=1)
        assert engine.ask(text)["cached"] >= 256  # stored, and used while the weights stay
        assert engine.reset(connector=True)
        again = engine.ask(text)
        assert (again["tokens"], again["cached"]) == (old["tokens"], 0)

        engine.ask(prompt(2))
        engine.generate([prompt(3)], max_tokens=2)  # its stores are under way
        engine.sleep(1)
        engine.change_weights()
        engine.wake_up()
        new = engine.ask(text)
        assert new["cached"] == 0
        assert new["tokens"] != old["tokens"]
        assert engine.reset(connector=False)
        hit = engine.ask(text)
        assert hit["cached"] >= 256
        assert hit["tokens"] == new["tokens"]
        assert engine.counters().get("promoted_pages:fs", 0) == 0
        assert engine.counters()["failures"] == {"fs": {}}


def test_an_engine_whose_weights_are_said_to_be_fixed_keeps_its_files(
    llama: Path, root: Path, tmp_path: Path
) -> None:
    """The other engine's files are private to it, although they lie in the same directory."""
    text = prompt(1)
    with started(llama, root, tmp_path / "log", weights_fixed=True) as engine:
        cold = engine.ask(text)
        assert cold["cached"] == 0
        assert engine.reset(connector=True)
        hit = engine.ask(text)
        assert hit["cached"] >= 256
        assert hit["tokens"] == cold["tokens"]
        assert engine.counters()["promoted_pages:fs"] >= 8


def test_an_engine_that_loads_other_files_forgets(llama: Path, tmp_path: Path) -> None:
    """Its configuration does not show it, and the reset comes before the new files."""
    model, text = tmp_path / "model", prompt(1)
    shutil.copytree(llama, model)
    tiers = [{"type": "fs", "root_dir": str(tmp_path / "kv"), "max_bytes": "1GiB"}]
    config = connector(secondary_tiers=tiers)
    with Engine(model, tmp_path / "log", kv_transfer_config=config) as engine:
        old = engine.ask(text)
        assert engine.reset(connector=True)
        engine.reload_weights()  # the same files
        hit = engine.ask(text)
        assert (hit["tokens"], hit["cached"]) == (old["tokens"], 320)

        assert engine.reset(connector=True)
        [file] = model.glob("*.safetensors")
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith("k_proj.weight")]:
            tensors[name] = tensors[name].flip(0).contiguous()
        save_file(tensors, model / "new", {"format": "pt"})
        os.replace(model / "new", file)
        engine.reload_weights()
        new = engine.ask(text)
        assert new["cached"] == 0 and new["tokens"] != old["tokens"]
        engine.push_out(range(100, 104))
        hit = engine.ask(text)
        assert (hit["tokens"], hit["cached"]) == (new["tokens"], 320)
        assert engine.reset(connector=True)
        assert engine.ask(text)["cached"] == 0, "nobody knows the weights any more"
    assert "were changed since this engine started" in (tmp_path / "log").read_text()


def test_an_engine_that_is_made_for_updates_needs_the_key(llama: Path, tmp_path: Path) -> None:
    """All workers refuse together, with one sentence; without secondary tiers nothing is asked."""
    extension = {"worker_extension_cls": "tests.engine.test_weights.Extension"}
    config = connector(secondary_tiers=[{"type": "fs", "root_dir": str(tmp_path / "kv")}])
    refusal = r"worker 0: worker_extension_cls='tests.*\"weights_fixed\": true .* false if they may"
    with pytest.raises(RuntimeError, match=refusal):
        Engine(llama, tmp_path / "refused", kv_transfer_config=config, **extension)
    with Engine(llama, tmp_path / "log", kv_transfer_config=connector(), **extension) as engine:
        assert engine.ask(prompt(1))["cached"] == 0


class Extension:
    """A trainer's methods in vLLM's worker."""

    def load_from_trainer(self) -> None:
        """Named by its users; nothing calls it here."""
