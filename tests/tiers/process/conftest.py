from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kvstrata.tiers.base import TierContext
from kvstrata.tiers.testing import CONTEXT
from tests.tiers.process.folder_tier import FolderTier

OpenTier = Callable[..., FolderTier]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "pages"
    made.mkdir()
    return made


@pytest.fixture
def open_tier(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenTier]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]), prepend=":")
    made: list[FolderTier] = []

    def make(
        medium: str = "Folder", context: TierContext = CONTEXT, folders: Sequence[Path] = (folder,)
    ) -> FolderTier:
        made.append(FolderTier(replace(context, region=CONTEXT.region), medium, folders))
        return made[-1]

    yield make
    for tier in made:
        assert tier.shutdown(60.0)
