"""Files that are not as they were."""

from pathlib import Path


def flip(path: str | Path, offset: int = -1) -> None:
    """Flip a bit of one byte, by default the last."""
    raw = bytearray(Path(path).read_bytes())
    raw[offset] ^= 1
    Path(path).write_bytes(raw)
