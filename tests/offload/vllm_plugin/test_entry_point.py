"""The entry point must never break an engine, whatever vLLM it finds."""

import logging
import subprocess
import sys
from importlib.metadata import entry_points
from types import ModuleType

import pytest

from kvstrata.offload.vllm_plugin.engine.early_check import SPEC_NAME
from kvstrata.offload.vllm_plugin.engine.version import check_version
from kvstrata.offload.vllm_plugin.entry_point import SPEC_MODULE, register

FACTORY = "vllm.v1.kv_offload.factory"


class Factory:
    """Stands for vLLM's `OffloadingSpecFactory`."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.known: dict[str, tuple[str, str]] = {}

    def register_spec(self, name: str, module_path: str, class_name: str) -> None:
        if self.error:
            raise self.error
        if name in self.known:
            raise ValueError(f"spec '{name}' is already registered")
        self.known[name] = (module_path, class_name)


def put_factory(monkeypatch: pytest.MonkeyPatch, factory: object) -> None:
    """Make `from vllm.v1.kv_offload.factory import OffloadingSpecFactory` give `factory`."""
    for name in ("vllm", "vllm.v1", "vllm.v1.kv_offload", FACTORY):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    if factory is not None:
        sys.modules[FACTORY].OffloadingSpecFactory = factory  # type: ignore[attr-defined]


def test_log_lines_go_where_vllm_sends_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put_factory(monkeypatch, Factory())
    register()
    seen: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    theirs = logging.getLogger("vllm")  # configured only after the plugins were loaded
    monkeypatch.setattr(theirs, "handlers", [Handler()])
    monkeypatch.setattr(theirs, "propagate", False)
    with caplog.at_level(logging.WARNING, "vllm"):
        logging.getLogger("kvstrata.tiers.fs").warning("a line")
    assert seen == ["a line"]


def test_entry_point_leads_here() -> None:
    (point,) = entry_points(group="vllm.general_plugins", name="kvstrata")
    assert point.load() is register


def test_registering_twice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    factory = Factory()
    put_factory(monkeypatch, factory)
    register()
    register()
    assert factory.known == {SPEC_NAME: (SPEC_MODULE, SPEC_NAME)}
    assert not caplog.records


@pytest.mark.parametrize("missing", ["vllm", "vllm.v1", FACTORY])
def test_without_vllm(
    missing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put_factory(monkeypatch, Factory())
    monkeypatch.setitem(sys.modules, missing, None)
    if missing != FACTORY:
        monkeypatch.delitem(sys.modules, FACTORY)
    with caplog.at_level(logging.WARNING, "kvstrata"):
        register()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not available in this vLLM" in caplog.text


def test_vllm_without_the_factory(monkeypatch: pytest.MonkeyPatch) -> None:
    put_factory(monkeypatch, None)
    register()


@pytest.mark.parametrize("error", [RuntimeError("x"), TypeError("signature"), OSError("cuda")])
def test_broken_factory(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put_factory(monkeypatch, Factory(error))
    register()
    assert str(error) in caplog.text


def test_importing_the_entry_point_imports_no_vllm_and_no_torch() -> None:
    code = (
        "import sys, kvstrata.offload.vllm_plugin.entry_point\n"
        "print(sorted({'vllm', 'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def put_version(monkeypatch: pytest.MonkeyPatch, version: str, parts: tuple[object, ...]) -> None:
    module = ModuleType("vllm")
    module.__version__ = version  # type: ignore[attr-defined]
    module.__version_tuple__ = parts  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)


@pytest.mark.parametrize("minor", [31, 32, 33])
def test_supported_versions(minor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    put_version(monkeypatch, f"0.{minor}.1+cpu", (0, minor, 1, "cpu"))
    check_version()


@pytest.mark.parametrize(
    ("version", "parts"),
    [
        ("0.30.4", (0, 30, 4)),
        ("0.34.0", (0, 34, 0)),
        ("1.32.0", (1, 32, 0)),
        ("dev", (0, 0, "dev")),
    ],
)
def test_unsupported_version_is_one_clear_error(
    version: str, parts: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_version(monkeypatch, version, parts)
    supported = r"supports vLLM 0\.31, 0\.32 and 0\.33"
    with pytest.raises(RuntimeError, match=rf"{supported}, this is {version}: "):
        check_version()
