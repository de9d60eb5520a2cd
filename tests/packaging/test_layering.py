"""Who may import whom: kernels <- offload -> tiers, and vLLM in offload/vllm_plugin alone."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("kernels", "offload", "tiers")


def sources(folder: str) -> list[Path]:
    """The Python files of a top-level folder."""
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"{folder}/ holds no Python file"
    return found


def module_name(path: Path) -> str:
    """`tiers/page/form.py` -> `kvstrata.tiers.page.form`."""
    return ".".join(("kvstrata", *path.relative_to(ROOT).with_suffix("").parts))


def statements(tree: ast.AST, lazy: bool) -> Iterator[ast.AST]:
    """Every node below `tree`; without `lazy`, those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from statements(node, lazy)


def imports(source: str, module: str, lazy: bool = True) -> set[str]:
    """Absolute names of what a module's source imports, in full: `from a import b` is `a.b`."""
    found: set[str] = set()
    for node in statements(ast.parse(source), lazy):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def imports_of(path: Path) -> set[str]:
    """What a file imports. A benchmark may import its baselines lazily, inside functions."""
    return imports(path.read_text(), module_name(path), lazy="bench" not in path.parts)


def under(name: str, packages: set[str]) -> bool:
    """Whether `name` is one of `packages` or lies in one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def outside(path: Path, allowed: set[str]) -> set[str]:
    return {name for name in imports_of(path) if not under(name, allowed)}


def inside(path: Path, banned: set[str]) -> set[str]:
    return {name for name in imports_of(path) if under(name, banned)}


def test_imports_are_read_whole() -> None:
    source = """
import torch.cuda as cuda
from kvstrata import offload
from . import tier
from ..base import SecondaryTier
class C:
    import triton
def f():
    import vllm
"""
    eager = {
        "torch.cuda",
        "kvstrata.offload",
        "kvstrata.tiers.fs.tier",
        "kvstrata.tiers.base.SecondaryTier",
        "triton",
    }
    assert imports(source, "kvstrata.tiers.fs.tier", lazy=False) == eager
    assert imports(source, "kvstrata.tiers.fs.tier") == eager | {"vllm"}


@pytest.mark.parametrize("path", sources("kernels"), ids=module_name)
def test_kernels_import_torch_triton_and_numpy_only(path: Path) -> None:
    allowed = {"torch", "triton", "numpy", "kvstrata.kernels", *sys.stdlib_module_names}
    assert outside(path, allowed) == set()


def kernels_but(*rooms: str) -> list[Path]:
    """The sources of kernels/ outside these sub-folders."""
    return [p for p in sources("kernels") if p.relative_to(ROOT / "kernels").parts[0] not in rooms]


@pytest.mark.parametrize("path", kernels_but("bench", "gpu"), ids=module_name)
def test_what_moves_does_not_depend_on_the_form_that_moves_it(path: Path) -> None:
    """The one who chooses a form knows both; nobody outside gpu/ knows more of it."""
    forms = set() if path.stem == "opening" else {"kvstrata.kernels.gpu"}
    assert inside(path, forms | {"kvstrata.kernels.bench"}) == set()


@pytest.mark.parametrize("path", kernels_but("bench"), ids=module_name)
def test_kernels_hide_no_import_in_a_function(path: Path) -> None:
    source, module = path.read_text(), module_name(path)
    assert imports(source, module) == imports(source, module, lazy=False)


@pytest.mark.parametrize("path", sources("tiers"), ids=module_name)
def test_tiers_import_no_torch_no_vllm_and_no_other_folder(path: Path) -> None:
    assert (
        inside(path, {"torch", "triton", "vllm", "kvstrata.kernels", "kvstrata.offload"}) == set()
    )


@pytest.mark.parametrize("path", sources("offload"), ids=module_name)
def test_only_the_plugin_imports_vllm(path: Path) -> None:
    if not path.is_relative_to(ROOT / "offload" / "vllm_plugin"):
        assert inside(path, {"vllm"}) == set()


def test_no_folder_is_a_regular_package() -> None:
    """An `__init__.py` would make ./kernels shadow Hugging Face's package."""
    inits = [path for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")]
    assert inits == [] and not (ROOT / "__init__.py").exists()


@pytest.mark.parametrize("folder", FOLDERS)
def test_type_checkers_see_each_folder(folder: str) -> None:
    assert (ROOT / ".typing" / "kvstrata" / folder).samefile(ROOT / folder)


@pytest.mark.parametrize(
    ("folders", "banned"),
    [(("kernels", "offload"), {"vllm"}), (("tiers",), {"torch", "triton", "vllm"})],
)
def test_importing_a_folder_loads_no_banned_package(
    folders: tuple[str, ...], banned: set[str], tmp_path: Path
) -> None:
    """What the sources cannot show: imports by name, and imports of what is imported."""
    plugin = "kvstrata.offload.vllm_plugin"
    paths = [path for folder in folders for path in sources(folder)]
    modules = [m for m in map(module_name, paths) if not under(m, {plugin})]
    script = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(*sorted({banned!r} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
