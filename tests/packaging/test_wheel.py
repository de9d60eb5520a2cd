"""The wheel and both kinds of install hold every module, under kvstrata and nowhere else."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("kernels", "offload", "tiers")


# Prints where an installed module lies, then the entry points, each of them loaded.
SCRIPT = """
import importlib.metadata, kvstrata.tiers.base
print(kvstrata.tiers.base.__file__)
for point in importlib.metadata.distribution("kvstrata").entry_points:
    assert callable(point.load()), point
    print(point.group, point.name)
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_tree(copy: Path) -> Path:
    """A copy of what is packaged, so that no build output lands in the repository."""
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return copy_tree(tmp_path / "tree")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built_from = copy_tree(tmp_path_factory.mktemp("wheel") / "tree")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=built_from)
    (wheel,) = (built_from / "dist").iterdir()
    return wheel


def test_wheel_holds_every_module_and_nothing_else(tree: Path, wheel: Path) -> None:
    expected = {
        f"kvstrata/{path.relative_to(tree)}"
        for folder in FOLDERS
        for path in (tree / folder).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert {f"kvstrata/{folder}/py.typed" for folder in FOLDERS} <= expected
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names ^ expected == set()
    benchmarks = {name.split("/bench/")[0] for name in names if "/bench/" in name}
    assert benchmarks == {"kvstrata/kernels"}, "the others are in tests/bench/"


@pytest.mark.parametrize("kind", ["wheel", "directory", "editable"])
def test_install(kind: str, tree: Path, wheel: Path, tmp_path: Path) -> None:
    """`pip install WHEEL`, `pip install .` and `pip install -e .` in an environment of its own."""
    home = tmp_path / "env"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", scheme="venv", vars={"base": str(home)}))
    # The dependencies and setuptools, from this environment; a path added by a .pth file has
    # its own .pth files ignored, so the repository's editable install stays out of sight.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    what: dict[str, list[str | Path]] = {
        "wheel": [wheel],
        "directory": [tree],
        "editable": ["--editable", tree],
    }
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed"]
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", *offline, *what[kind]),
        cwd=tmp_path,
    )

    empty = tmp_path / "empty"
    empty.mkdir()
    imported, *entry_points = run(python, "-c", SCRIPT, cwd=empty).splitlines()
    place = tree if kind == "editable" else site / "kvstrata"
    assert Path(imported) == place / "tiers" / "base.py"
    assert {"console_scripts kvstrata", "vllm.general_plugins kvstrata"} <= set(entry_points)
    assert "check" in run(home / "bin" / "kvstrata", "--help", cwd=empty)
