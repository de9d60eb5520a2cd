"""Who may import whom: between the top-level folders, between the rooms in them, and when."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("kernels", "offload", "tiers")

# Files, and what none of them imports at any place of its code: packages, or modules of kvstrata
# without that name before them.
_NOT_OF_OFFLOAD = "vllm kernels offload.cli offload.simulate offload.vllm_plugin"
_DECISIONS = "offload.manager offload.finding offload.demand.cascade"
_MEDIA = "tiers.process tiers.fs tiers.mooncake tiers.object tiers.page tiers.pool tiers.valkey"
FORBIDDEN: Mapping[str, str] = {
    "kernels/**/*.py": "vllm offload tiers",
    # what moves does not depend on the form that moves it
    "kernels/*.py": "kernels.gpu kernels.bench",
    "kernels/gpu/*.py": "kernels.bench kernels.opening",
    # a room of offload/ knows those below it
    "offload/*.py": _NOT_OF_OFFLOAD,
    "offload/finding/*.py": f"{_NOT_OF_OFFLOAD} offload.manager offload.demand",
    "offload/audit/*.py": (
        f"{_NOT_OF_OFFLOAD} offload.manager offload.finding.promotion offload.demand.cascade"
    ),
    "offload/secondary/*.py": f"{_NOT_OF_OFFLOAD} {_DECISIONS} offload.demand",
    "offload/demand/*.py": f"{_NOT_OF_OFFLOAD} offload.manager offload.finding",
    "offload/request/*.py": f"{_NOT_OF_OFFLOAD} {_DECISIONS} offload.audit offload.config",
    "offload/primary/**/*.py": (
        f"{_NOT_OF_OFFLOAD} {_DECISIONS} {_MEDIA} offload.audit offload.config offload.context "
        "offload.request offload.secondary"
    ),
    "offload/metering/*.py": (
        f"{_NOT_OF_OFFLOAD} {_DECISIONS} {_MEDIA} offload.audit offload.config offload.request "
        "offload.secondary"
    ),
    "offload/config/*.py": (
        f"{_NOT_OF_OFFLOAD} {_DECISIONS} offload.audit offload.request offload.secondary"
    ),
    # the command line knows roots and configurations, and no engine
    "offload/cli/**/*.py": (
        f"vllm kernels offload.vllm_plugin {_DECISIONS} offload.audit offload.request "
        "offload.secondary tiers.process tiers.fs.tier tiers.fs.medium tiers.pool.tier"
    ),
    # a replay has the real manager, and the books of the files without the files
    "offload/simulate/*.py": (
        "vllm kernels offload.cli offload.vllm_plugin tiers.process tiers.fs.tier tiers.fs.medium "
        "tiers.fs.page_files tiers.fs.startup"
    ),
    "offload/vllm_plugin/**/*.py": "offload.cli offload.simulate tiers.process tiers.fs tiers.pool",
    # behind vLLM's own manager nothing of ours decides
    "offload/vllm_plugin/engine/stock/*.py": (
        f"{_DECISIONS} offload.demand offload.request offload.primary.region "
        "offload.vllm_plugin.scheduler offload.vllm_plugin.registration"
    ),
    "tiers/**/*.py": "torch triton vllm kernels offload",
    # the contract and what goes with it know no medium
    "tiers/*.py": _MEDIA,
    "tiers/page/*.py": "tiers.process tiers.fs tiers.mooncake tiers.object tiers.pool tiers.valkey",
    # what runs any medium knows none
    "tiers/process/*.py": "tiers.fs tiers.mooncake tiers.object tiers.pool tiers.valkey",
    # files know no other medium; a pool is made of them
    "tiers/fs/**/*.py": "tiers.mooncake tiers.object tiers.pool tiers.valkey",
    # media do not know each other
    "tiers/valkey/*.py": "tiers.fs tiers.mooncake tiers.object tiers.pool",
    "tiers/mooncake/*.py": "tiers.fs tiers.object tiers.pool tiers.valkey",
    # the engine's process loads no client
    "tiers/valkey/tier.py": "tiers.valkey.client tiers.valkey.medium tiers.valkey.probe",
    "tiers/mooncake/tier.py": "tiers.mooncake.client tiers.mooncake.medium tiers.mooncake.probe",
    "tiers/fs/files/*.py": (
        "tiers.process tiers.fs.budget tiers.fs.tools tiers.fs.tier tiers.fs.medium "
        "tiers.fs.page_files tiers.fs.startup"
    ),
    "tiers/fs/budget/**/*.py": (
        "tiers.process tiers.fs.tools tiers.fs.tier tiers.fs.medium tiers.fs.page_files "
        "tiers.fs.startup"
    ),
    "tiers/pool/*.py": "tiers.process tiers.fs.medium tiers.fs.page_files",
    # a bucket is named and filled as a root is
    "tiers/object/*.py": (
        "tiers.fs.budget tiers.fs.tools tiers.fs.tier tiers.fs.medium tiers.fs.page_files "
        "tiers.fs.startup"
    ),
    # what the command line does to a root needs no engine and no I/O process
    "tiers/fs/tools/*.py": "tiers.process tiers.fs.tier tiers.fs.medium tiers.fs.page_files",
}
# (file, what it imports all the same) -> why
ALLOWED: Mapping[tuple[str, str], str] = {
    ("kernels/opening.py", "kernels.gpu"): "it chooses the form",
    ("offload/cli/doctor/machine.py", "offload.vllm_plugin.entry_point"): "the spec's module",
    (
        "offload/cli/doctor/machine.py",
        "offload.vllm_plugin.engine.version",
    ): "the versions that are supported",
    (
        "offload/cli/doctor/config.py",
        "offload.vllm_plugin.engine.early_check",
    ): "the spec's name",
    ("offload/cli/doctor/config.py", "offload.vllm_plugin.entry_point"): "the spec's module",
    ("offload/cli/copy/bucket.py", "tiers.process.medium"): "bytes move through media",
    ("offload/cli/copy/directory.py", "tiers.process.medium"): "bytes move through media",
    ("offload/cli/copy/host.py", "tiers.process.medium"): "what the host of a medium is told",
    ("offload/cli/copy/pool.py", "tiers.process.medium"): "bytes move through media",
    ("offload/cli/copy/pages.py", "tiers.process.medium"): "bytes move through media",
    ("offload/cli/copy/place.py", "tiers.process.medium"): "bytes move through media",
    ("offload/cli/copy/server.py", "tiers.process.medium"): "bytes move through media",
    ("tiers/fs/budget/member.py", "tiers.process.medium"): "what the host of a medium is told",
    ("tiers/fs/budget/tail.py", "tiers.process.medium"): "what the host of a medium is told",
    ("tiers/fs/tools/trim.py", "tiers.process.failures"): "a failure is said as the tier says it",
    ("tiers/fs/tools/trim.py", "tiers.process.medium"): "what the host of a medium is told",
}
# Files that import something only where it is used -> why
LAZY: Mapping[str, str] = {
    "offload/cli": "a command starts at once, and the doctor where packages are missing",
    "offload/simulate/chart.py": "matplotlib is of an extra, and takes long to load",
    "offload/vllm_plugin/caches/content_order.py": "a private name of one backend",
    "offload/vllm_plugin/engine/early_check.py": "engines without our spec load it too",
    "offload/vllm_plugin/entry_point.py": "any vLLM loads it, or none",
    "offload/vllm_plugin/spec.py": "a process loads its own side alone",
    "offload/vllm_plugin/engine/version.py": "the doctor asks it where there is no vLLM",
    "tiers/mooncake/client.py": "the library reads the environment, which is made for it",
    "tiers/object/bucket.py": "profiles are AWS's alone",
    "tiers/object/tier.py": "obstore is of an extra, and the options are known without it",
    "tiers/fs/budget/catalog.py": "the engine's processes do without numpy's memory",
}


def sources(folder: str = "") -> list[Path]:
    """The Python files of a top-level folder, or of all."""
    found = [
        path for name in FOLDERS if folder in ("", name) for path in (ROOT / name).rglob("*.py")
    ]
    assert found, f"{folder}/ holds no Python file"
    return sorted(found)


def module_name(path: Path) -> str:
    """`tiers/page/form.py` -> `kvstrata.tiers.page.form`."""
    return ".".join(("kvstrata", *path.relative_to(ROOT).with_suffix("").parts))


def file_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def statements(tree: ast.AST, lazy: bool) -> Iterator[ast.AST]:
    """Every node below `tree` that may run; without `lazy`, when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
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


@cache
def imports_of(path: Path, lazy: bool = True) -> set[str]:
    return imports(path.read_text(), module_name(path), lazy)


def under(name: str, packages: set[str]) -> bool:
    """Whether `name` is one of `packages` or lies in one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def full(name: str) -> str:
    """A name of the tables as an import has it."""
    return f"kvstrata.{name}" if name.split(".")[0] in FOLDERS else name


def test_imports_are_read_whole() -> None:
    source = """
import torch.cuda as cuda
from kvstrata import offload
from . import tier
from ..base import SecondaryTier
class C:
    import triton
if TYPE_CHECKING:
    import rich
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


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_a_room_imports_none_but_those_below_it(pattern: str) -> None:
    files = sorted(ROOT.glob(pattern))
    assert files, f"no file is of {pattern}: mend the table"
    for path in files:
        allowed = {full(name) for file, name in ALLOWED if file == file_name(path)}
        banned = {full(name) for name in FORBIDDEN[pattern].split()}
        # a benchmark imports its baselines where it needs them
        found = imports_of(path, lazy="bench" not in path.parts)
        wrong = {name for name in found if under(name, banned) and not under(name, allowed)}
        assert not wrong, f"{file_name(path)} must not import {sorted(wrong)}"


def test_every_room_has_a_rule() -> None:
    ruled = {path for pattern in FORBIDDEN for path in ROOT.glob(pattern)}
    left = [file_name(path) for path in sources() if path not in ruled]
    assert not left, "say in FORBIDDEN what these must not import"


def test_the_tables_name_what_there_is() -> None:
    names = {name for banned in FORBIDDEN.values() for name in banned.split()}
    for name in names | {name for _, name in ALLOWED}:
        path = ROOT.joinpath(*name.split("."))
        known = path.is_dir() or path.with_suffix(".py").exists()
        assert known or name in ("torch", "triton", "vllm"), f"{name} is no module: mend the table"
    for file, name in ALLOWED:
        assert any(under(found, {full(name)}) for found in imports_of(ROOT / file)), (file, name)


def test_kernels_import_torch_triton_and_numpy_only() -> None:
    allowed = {"torch", "triton", "numpy", "kvstrata.kernels", *sys.stdlib_module_names}
    for path in sources("kernels"):
        # a benchmark imports its baselines where it needs them
        found = imports_of(path, lazy="bench" not in path.parts)
        wrong = {name for name in found if not under(name, allowed)}
        assert not wrong, f"{file_name(path)} imports {sorted(wrong)}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Nor in a function, where a cycle would hide."""
    modules = {module_name(path): path for path in sources()}

    def module_of(name: str) -> str:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name

    graph = {
        module: {module_of(name) for name in imports_of(path)} - {"", module}
        for module, path in modules.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"an import cycle: {' <- '.join(error.args[1])}")


def test_no_import_hides_in_a_function_without_a_reason() -> None:
    hiding = {
        file_name(path)
        for path in sources()
        if imports_of(path) != imports_of(path, lazy=False)
        and "bench" not in path.parts  # which may do without its baselines and pictures
    }
    named = {file for file in hiding for name in LAZY if Path(file).is_relative_to(name)}
    assert not hiding - named, "import at the top, or give LAZY the reason"
    for name in LAZY:
        assert any(Path(file).is_relative_to(name) for file in hiding), f"{name} hides none"


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


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("tiers.fs.tier", ("tiers.fs.budget.keeper", "tiers.fs.budget.member", "tiers.fs.tools")),
        ("tiers.pool.tier", ("tiers.fs.budget.keeper", "tiers.fs.budget.member", "tiers.fs.tools")),
        ("tiers.fs.tools.repair", ("tiers.process.worker", "tiers.process.supervisor")),
        ("tiers.fs.tools.trim", ("tiers.process.worker", "tiers.process.supervisor")),
    ],
)
def test_no_process_loads_what_another_does(module: str, banned: tuple[str, ...]) -> None:
    """The engine's side neither keeps the books nor repairs; the command line starts no workers."""
    loads = f"import sys, kvstrata.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", loads], capture_output=True, text=True, check=True)
    assert {m for m in done.stdout.split() if under(m, {f"kvstrata.{b}" for b in banned})} == set()
