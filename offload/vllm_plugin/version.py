"""Which vLLM this plugin runs in."""

from __future__ import annotations

SUPPORTED = ((0, 32), (0, 33))


def check_version() -> None:
    """Refuse a vLLM whose offloading interface we do not know.

    Raises:
        RuntimeError: naming the version found and the supported ones.
    """
    import vllm

    found = tuple(vllm.__version_tuple__[:2])
    if found not in SUPPORTED:
        names = " and ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
        raise RuntimeError(
            f"kvstrata supports vLLM {names}, this is {vllm.__version__}: "
            f"install a supported vLLM or a newer kvstrata"
        )
