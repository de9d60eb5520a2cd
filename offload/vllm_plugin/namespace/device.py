"""The device, where it decides more than rounding.

Where weights or the KV cache are quantised, vLLM chooses kernels by the device, and with them
whether activations and queries are quantised as well (an A100 computes an fp8 checkpoint with 16
bits of activations, an H100 with 8), and which of the two fp8 formats of AMD's GPUs is written.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from vllm.platforms import current_platform


def device_fields(*, quantised: bool) -> dict[str, Any] | None:
    """Kind and capability of this process's device; None where nothing is quantised."""
    if not quantised:
        return None
    capability = current_platform.get_device_capability()
    found = {
        "platform": current_platform.device_name,
        "capability": None if capability is None else capability.as_version_str(),
        "fp8_fnuz": bool(current_platform.is_fp8_fnuz()),
    }
    if current_platform.is_cpu():
        found["capability"] = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return found
