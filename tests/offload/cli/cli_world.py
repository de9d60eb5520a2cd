"""A root that the filesystem tier filled, and the commands run on it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from kvstrata.offload.cli.main import app
from kvstrata.tiers.base import TierContext
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.namespace import namespace_paths
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.testing import CONTEXT, make_data, make_key, store

HEADER = 4096
KEYS = [make_key(0), make_key(1), make_key(2, 1)]
SIZE = CONTEXT.layouts[0].nbytes
PAGES = {key: make_data(n, CONTEXT.layouts[key[-1]].nbytes) for n, key in enumerate(KEYS)}


def run(*arguments: object, exit_code: int = 0) -> str:
    """What a command prints; its exit code is compared."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == exit_code, (result.output, result.exception)
    assert exit_code == 2 or result.stderr == ""
    return result.stderr if exit_code == 2 else result.stdout


def outcome(*arguments: object) -> tuple[int, str, str]:
    """The exit code, and what a command printed on stdout and stderr."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, result.stdout, result.stderr


def run_json(*arguments: object, exit_code: int = 0) -> Any:
    return json.loads(run(*arguments, "--json", exit_code=exit_code))


def fill(root: Path, context: TierContext = CONTEXT) -> NamespacePaths:
    """PAGES, of which two are of group 0 and one is of group 1, stored by the tier."""
    options = {"root_dir": str(root), "n_read_threads": 1, "n_write_threads": 1}
    tier = FsTier(options, replace(context, region=CONTEXT.region))
    for key, data in PAGES.items():
        assert not store(tier, {key: data}).failed
    assert tier.shutdown(60.0)
    return namespace_paths(str(root), context.model, context.namespace)
