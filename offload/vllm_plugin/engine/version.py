"""Which vLLM this plugin runs in."""

from __future__ import annotations

import re

# A release, or a build of it for some hardware: "0.32.0", "0.32.1.post1", "0.33.0+cu130".
_RELEASE = re.compile(r"(\d+)\.(\d+)(\.\d+)?(\.post\d+)?(\+(cpu|cu\d+|rocm[\d.]*))?")

SUPPORTED = ((0, 31), (0, 32), (0, 33))


def supported_versions() -> str:
    """For messages: "0.31, 0.32 and 0.33"."""
    *first, last = [f"{major}.{minor}" for major, minor in SUPPORTED]
    return f"{', '.join(first)} and {last}"


def check_version() -> None:
    """Refuse a vLLM whose offloading interface we do not know.

    Raises:
        RuntimeError: naming the version found and the supported ones.
    """
    import vllm

    found = tuple(vllm.__version_tuple__[:2])
    if found not in SUPPORTED:
        raise RuntimeError(
            f"kvstrata supports vLLM {supported_versions()}, this is {vllm.__version__}: "
            f"install a supported vLLM or a newer kvstrata"
        )


def content_version() -> str:
    """Whose form content has that only vLLM knows: "vllm0.32", or all of an odd build's version.

    Between minor versions vLLM changes what it keeps in the same number of bytes.
    """
    import vllm

    release = _RELEASE.fullmatch(vllm.__version__)
    if release is None:
        return f"vllm{vllm.__version__}"
    return f"vllm{release[1]}.{release[2]}"
