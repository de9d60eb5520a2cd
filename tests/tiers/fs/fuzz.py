"""Gives the readers of `test_fuzz` to atheris, a coverage-guided fuzzer: `make fuzz`.

    python tests/tiers/fs/fuzz.py header -max_total_time=600

The first argument is one of `READERS`, the others are libFuzzer's.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kvstrata.tiers", "json"]):
    import test_fuzz


def main() -> None:
    name = sys.argv.pop(1)
    seeds = Path(tempfile.mkdtemp(prefix="kvstrata-seeds-"))
    tokens = seeds / "dictionary"
    for number, raw in enumerate((test_fuzz.SEEDS[name], *test_fuzz.GIANTS.values())):
        (seeds / str(number)).write_bytes(raw)
    tokens.write_text(
        "\n".join('"' + "".join(f"\\x{b:02x}" for b in t[:60]) + '"' for t in test_fuzz.TOKENS if t)
    )
    options = [f"-dict={tokens}", "-max_len=65536", "-timeout=5", "-rss_limit_mb=2048"]
    atheris.Setup([sys.argv[0], *options, *sys.argv[1:], str(seeds)], test_fuzz.READERS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
