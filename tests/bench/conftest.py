import sys
from pathlib import Path

import pytest

# The processes that a benchmark spawns import its modules, from wherever pytest was started.
sys.path.append(str(Path(__file__).parents[2]))


@pytest.fixture(scope="session", autouse=True)
def any_disk(disk_of_any_fullness: None) -> None:
    """See there."""
