"""A Triton driver for a GPU that is not there: it compiles for real, and launches nothing.

For the cost of launches, and to count compilations, on any machine. Triton's interpreter must be
off (TRITON_INTERPRET), and nothing in the process may use a real GPU's kernels.
"""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

HANDLE = 7  # of its only stream
_LIMITS = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}  # an H100's


class AbsentGpu:
    """What Triton 3.6 to 3.9 ask of a driver.

    compiled: names of the kernels, one for each compilation. launched: how many launches.
    """

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.launched = 0
        self.utils = self

    def install(self) -> None:
        """Let Triton compile and launch for this GPU from now on."""
        driver.set_active(self)

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        """The launcher of a kernel that was just compiled or found in Triton's cache."""
        self.compiled.append(src.fn.__name__)

        def launch(*arguments: object) -> None:
            self.launched += 1

        return launch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return HANDLE

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return _LIMITS

    def load_binary(self, *kernel: object) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, most threads."""
        return 1, 2, 40, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def map_python_to_cpp_type(self, name: str) -> str:
        return name
