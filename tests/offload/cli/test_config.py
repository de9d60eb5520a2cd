"""`kvstrata config`: every key, its default and what it is, also of tiers that others install."""

import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from kvstrata.tiers import registry
from kvstrata.tiers.base import SecondaryTier
from kvstrata.tiers.options import option, parse_text
from tests.offload.cli.cli_world import outcome, run, run_json


@dataclass(frozen=True)
class BucketOptions:
    bucket: str = option(parse_text, "the bucket in [bold]red[/bold]; see [stock](stock.md)")


class BucketTier(SecondaryTier):
    Options = BucketOptions


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("bucket", f"{__name__}:BucketTier", "kvstrata.tiers"),
        EntryPoint("broken", "no_such_module:Tier", "kvstrata.tiers"),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda **k: EntryPoints(points).select(**k))


def test_every_key_is_printed_with_default_and_meaning() -> None:
    found = run_json("config")
    media = ["fs", "memory", "mooncake", "object", "pool", "valkey"]
    assert list(found) == ["kv_connector_extra_config", "secondary_tiers", *media]
    rows = {name: {row["key"]: row for row in table} for name, table in found.items()}
    assert (
        rows["fs"]["io"]["default"] == '"auto"' and rows["fs"]["root_dir"]["default"] == "required"
    )
    assert rows["memory"]["max_bytes"]["default"] == "none"
    backpressure = rows["secondary_tiers"]["backpressure"]
    assert backpressure["help"].startswith("does nothing: a slow tier")
    shown = run("config")
    for table in found.values():
        for row in table:
            assert row["key"] in shown and row["help"] and "](" not in row["help"]


@pytest.mark.usefixtures("installed")
def test_tiers_of_installed_packages_are_shown() -> None:
    code, out, err = outcome("config", "--json")
    assert (code, err.count("\n")) == (0, 1)
    assert "type 'broken' cannot be imported from 'no_such_module'" in err
    assert '"help": "the bucket in [bold]red[/bold]; see stock"' in out
    assert "the bucket in [bold]red[/bold]; see stock" in outcome("config")[1]


def test_it_needs_neither_torch_nor_vllm() -> None:
    code = (
        "import sys; sys.modules['vllm'] = sys.modules['torch'] = None\n"
        "from kvstrata.offload.cli.main import main\n"
        "sys.argv = ['kvstrata', 'config']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cpu_bytes_to_use" in done.stdout
