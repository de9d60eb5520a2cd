"""The environment of every test, set before a test module imports triton or vLLM.

Also the fixtures that several folders use.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

try:
    import torch

    HAS_CUDA = torch.cuda.is_available()
except ImportError:
    HAS_CUDA = False

if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# The tests start a thousand processes: without byte code each compiles its modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Timing never decides a test. In CI the same examples run every time.
settings.register_profile(
    "kvstrata", deadline=None, max_examples=50, derandomize="CI" in os.environ
)
settings.load_profile("kvstrata")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the fault tests in their long form")
    parser.addoption("--seed", type=int, help="of the soak test; the long form chooses one")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--long"):
        settings.register_profile("long", deadline=None, max_examples=500)
        settings.load_profile("long")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int | None:
    """The seed that the soak test is to use, if one was given."""
    value: int | None = request.config.getoption("--seed")
    return value


@pytest.fixture
def is_long(request: pytest.FixtureRequest) -> bool:
    """Whether the tests run in their long form, as `make test-faults` does."""
    return bool(request.config.getoption("--long"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave files of which every test needs vLLM out of runs without them: it takes seconds to
    import, in each process of a parallel run."""
    if config.option.markexpr != "not vllm" or collection_path.suffix != ".py":
        return None
    return "\npytestmark = pytest.mark.vllm\n" in collection_path.read_text() or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is no CUDA device."""
    if HAS_CUDA:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


FillRoot = Callable[..., None]


@pytest.fixture(scope="session")
def fill_root(tmp_path_factory: pytest.TempPathFactory) -> FillRoot:
    """Makes a root as a tier leaves it that stored some pages.

    A tier starts two processes, so one fills a root of each kind, and the others are copies.
    """
    from kvstrata.tiers.fs.tier import FsTier
    from kvstrata.tiers.testing import CONTEXT, store

    made: dict[tuple[object, ...], Path] = {}

    def fill(root: Path, pages: Mapping[bytes, bytes], **options: object) -> None:
        kind = (*pages.items(), *options.items())
        if kind not in made:
            first = tmp_path_factory.mktemp("filled")
            tier = FsTier({"root_dir": str(first), **options}, CONTEXT)
            for key, data in pages.items():
                assert not store(tier, {key: data}).failed
            assert tier.shutdown(60.0)
            made[kind] = first
        shutil.copytree(made[kind], root, symlinks=True)

    return fill


@pytest.fixture(scope="session")
def disk_of_any_fullness() -> Iterator[None]:
    """Tiers of this process leave nothing free unless they are told to.

    The default floor is a share of the machine's disk, of whose fullness no test may depend.
    """
    from kvstrata.tiers.fs import startup

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(startup, "default_floor", lambda total: 0)
        yield


@pytest.fixture
def another_user() -> Callable[[], AbstractContextManager[None]]:
    """Makes a context without root's right to open everything; changes nothing for others."""

    @contextmanager
    def change() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return change
