"""From the repository's root, `import kernels` is still Hugging Face's package."""

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]

SCRIPT = """
import kernels, transformers, kvstrata.tiers.base
from transformers.utils import is_kernels_available
from kernels import get_kernel
assert is_kernels_available(), "transformers does not see the kernels package"
assert callable(get_kernel)
print(kernels.__file__)
print(kvstrata.tiers.base.__file__)
"""


def test_hugging_face_kernels_is_not_shadowed() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs, ours = map(Path, done.stdout.split())
    assert theirs.is_relative_to(sysconfig.get_path("purelib"))
    assert ours == ROOT / "tiers" / "base.py"
