"""Whether weights may change in a running engine."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.config import ModelConfig, ParallelConfig  # noqa: E402

from kvstrata.offload.vllm_plugin.engine.errors import NamespaceError  # noqa: E402
from kvstrata.offload.vllm_plugin.weights.updates import check_weights_fixed, weights_fixed  # noqa: E402


def engine(**more: Any) -> Any:
    model = {"enable_sleep_mode": more.pop("enable_sleep_mode", False)}
    parallel = {"worker_extension_cls": "", "distributed_executor_backend": "mp", **more}
    return SimpleNamespace(
        weight_transfer_config=None,
        model_config=SimpleNamespace(**model),
        parallel_config=SimpleNamespace(**parallel),
    )


class Executor:
    """Stands for one of the program that runs the engine."""


SIGNS: dict[str, dict[str, Any]] = {
    "enable_sleep_mode=True": {"enable_sleep_mode": True},
    "worker_extension_cls='trainer.Loader'": {"worker_extension_cls": "trainer.Loader"},
    "distributed_executor_backend='external_launcher'": {
        "distributed_executor_backend": "external_launcher"
    },
    "distributed_executor_backend='Executor'": {"distributed_executor_backend": Executor},
    "distributed_executor_backend='trainer.Executor'": {
        "distributed_executor_backend": "trainer.Executor"
    },
}


@pytest.mark.parametrize("sign", SIGNS)
def test_an_engine_that_is_made_for_updates_needs_the_key(sign: str) -> None:
    config = engine(**SIGNS[sign])
    assert not weights_fixed(None, config)
    with pytest.raises(NamespaceError) as caught:
        check_weights_fixed(None, config)
    text = str(caught.value)
    assert sign in text and '"weights_fixed": true' in text and '"weights_fixed": false' in text


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("configured", [True, False])
def test_the_users_word_holds(sign: str, configured: bool) -> None:
    config = engine(**SIGNS[sign])
    check_weights_fixed(configured, config)
    assert weights_fixed(configured, config) is configured


def test_all_signs_are_named() -> None:
    config = engine(enable_sleep_mode=True, worker_extension_cls="a.B")
    with pytest.raises(NamespaceError, match=r"sleep_mode=True and worker_extension_cls='a\.B'"):
        check_weights_fixed(None, config)


@pytest.mark.parametrize("backend", [None, "mp", "ray", "uni"])
def test_weights_of_other_engines_are_fixed(backend: str | None) -> None:
    config = engine(distributed_executor_backend=backend)
    check_weights_fixed(None, config)
    assert weights_fixed(None, config) and not weights_fixed(False, config)


def test_weight_transfer_says_that_they_change() -> None:
    config = engine()
    config.weight_transfer_config = object()
    check_weights_fixed(None, config)
    assert not weights_fixed(None, config) and weights_fixed(True, config)


def test_vllm_has_these_settings() -> None:
    """A renamed one would never be recognised."""
    assert ModelConfig.enable_sleep_mode is False
    assert ParallelConfig.worker_extension_cls == ""
    assert ParallelConfig.distributed_executor_backend is None
