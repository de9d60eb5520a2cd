"""What a configuration of vLLM is refused with."""

from __future__ import annotations


class NamespaceError(ValueError):
    """Secondary tiers cannot be used with this engine configuration."""
