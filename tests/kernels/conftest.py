"""Where there is no GPU, kernels run in Triton's interpreter, chosen before its import.

torch has one thread: several would wait for each other over each of these small tensors.
"""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent / "support"))
