"""`kvstrata copy` from one root to another."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.trust import distrust
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.testing import CONTEXT, load, make_data, make_key, settle, store
from tests.offload.cli.cli_world import KEYS, PAGES, fill, outcome, run, run_json
from tests.spoiling import flip


def test_a_copy(root: Path, paths: NamespacePaths, tmp_path: Path) -> None:
    done = run_json("copy", root, tmp_path / "copy")
    nbytes = sum(os.path.getsize(paths.page(key)) for key in KEYS)
    assert done == {
        "namespaces": [paths.name],
        "pages": 3,
        "bytes": nbytes,
        "there": 0,
        "gone": 0,
        "bad": [],
        "stopped": None,
    }
