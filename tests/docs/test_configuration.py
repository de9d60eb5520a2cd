"""The tables of docs/configuration.md are the options in the code.

`python -m tests.docs.test_configuration` writes them anew.
"""

import re

from kvstrata.offload.cli.config import meaning, option_tables
from kvstrata.tiers.registry import BUILT_IN
from tests.docs.blocks import ROOT

DOCUMENT = ROOT / "docs/configuration.md"
REMEDY = "the tables are not the code's: run .venv/bin/python -m tests.docs.test_configuration"
_TABLE = re.compile(r"(<!-- keys of (\S+) -->\n).*?(<!-- end -->)", re.S)


def with_tables(text: str) -> str:
    tables = option_tables()

    def table(match: re.Match[str]) -> str:
        rows = ["| key | default | meaning |", "|---|---|---|"]
        for key, option in tables[match[2]].items():
            rows.append(f"| `{key}` | {option.default} | {meaning(option)} |")
        return "\n".join([match[1], *rows, "", match[3]])

    return _TABLE.sub(table, text)


def test_the_tables_are_the_options_in_the_code() -> None:
    text = DOCUMENT.read_text()
    assert with_tables(text) == text, REMEDY


def test_each_table_is_there() -> None:
    found = {name for _, name, _ in _TABLE.findall(DOCUMENT.read_text())}
    assert found == {"kv_connector_extra_config", "secondary_tiers", *BUILT_IN}


def test_a_table_that_is_not_the_codes_is_found() -> None:
    text = DOCUMENT.read_text().replace("| `lookup_deadline_s` | `1.0` |", "| `x` | `2.0` |")
    assert text != DOCUMENT.read_text() == with_tables(text)


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text()))
