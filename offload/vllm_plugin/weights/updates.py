"""Whether the weights may change while the engine runs. vLLM does not tell connectors."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig

from kvstrata.offload.vllm_plugin.engine.errors import NamespaceError

# What vLLM starts by itself; any other executor belongs to the program that runs the engine.
_EXECUTORS = (None, "mp", "ray", "uni")


def update_signs(vllm_config: VllmConfig) -> list[str]:
    """The settings, as a user gives them, of an engine that is made for new weights.

    `weight_transfer_config` is not among them: with it they do change.
    """
    model = getattr(vllm_config, "model_config", None)
    parallel = getattr(vllm_config, "parallel_config", None)
    signs = []
    if getattr(model, "enable_sleep_mode", False):
        signs.append("enable_sleep_mode=True")
    if extension := getattr(parallel, "worker_extension_cls", ""):
        signs.append(f"worker_extension_cls={extension!r}")
    executor: Any = getattr(parallel, "distributed_executor_backend", None)
    if executor not in _EXECUTORS:
        name = executor if isinstance(executor, str) else getattr(executor, "__name__", executor)
        signs.append(f"distributed_executor_backend={name!r}")
    return signs


def weights_fixed(configured: bool | None, vllm_config: VllmConfig) -> bool:
    """Whether the weights stay what they are while the engine runs.

    An engine that can receive new weights is taken to do so at every cache reset, unless the
    user says otherwise.
    """
    if configured is not None:
        return configured
    transfer = getattr(vllm_config, "weight_transfer_config", None)
    return transfer is None and not update_signs(vllm_config)


def check_weights_fixed(configured: bool | None, vllm_config: VllmConfig) -> None:
    """Refuse secondary tiers where weights may change or not, and nobody has said which.

    Raises:
        NamespaceError: naming what was recognised and both choices.
    """
    signs = update_signs(vllm_config)
    if configured is None and signs:
        raise NamespaceError(
            f"{' and '.join(signs)}: such an engine can be given new weights while it runs, and "
            'secondary_tiers must not answer from those before: give "weights_fixed": true if it '
            "only ever runs with the weights of its start (or loads the same files again), or "
            '"weights_fixed": false if they may change; then every reset of the cache begins '
            "anew, and files are private to the engine"
        )
