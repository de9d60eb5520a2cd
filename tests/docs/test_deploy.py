"""The examples of docs/deploy agree with themselves, with each other, and with what takes them."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvstrata.offload.config.offload_config import parse_config
from kvstrata.offload.primary import region
from kvstrata.offload.vllm_plugin.engine.version import SUPPORTED
from kvstrata.tiers.options import parse_bytes
from tests.docs.blocks import ROOT, shell_commands

DEPLOY = ROOT / "docs" / "deploy"
GIB = 2**30
VLLM_USER = (2000, 0)  # `vllm` of vLLM's image


@dataclass(frozen=True)
class Example:
    """A server as one of the files starts it; None of what is not the file's to say.

    arguments: of `vllm serve`. shm, volume, memory: bytes; volume: of the disk at `root_dir`.
    mounts: paths in the container that outlive it. user: uid and gid.
    grace_s: how long the server has to stop before it is killed.
    """

    arguments: list[str]
    mounts: list[str]
    grace_s: int
    shm: int | None = None
    volume: int | None = None
    memory: int | None = None
    user: tuple[int, int] | None = None


def size(text: str) -> int:
    """Docker's `17g` and `17gb`, and Kubernetes' `17Gi`: all of them powers of two."""
    number, unit = re.fullmatch(r"(\d+)(g|gb|Gi)", text).groups()  # type: ignore[union-attr]
    assert unit
    return int(number) * GIB


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


def docker_run() -> Example:
    (words,) = [
        command.words
        for command in shell_commands([DEPLOY / "README.md"])
        if command.text.startswith("docker run ")
    ]
    image = words.index("vllm-kvstrata")
    options = words[2:image]

    def values(name: str) -> list[str]:
        return [options[n + 1] for n, word in enumerate(options) if word == name]

    (user,), (shm,), (grace,) = map(values, ("--user", "--shm-size", "--stop-timeout"))
    uid, gid = map(int, user.split(":"))
    mounts = [value.split(":")[1] for value in values("-v")]
    return Example(words[image + 1 :], mounts, int(grace), size(shm), user=(uid, gid))


def compose() -> Example:
    document = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    (service,) = document["services"].values()
    named = dict(volume.split(":") for volume in service["volumes"])
    assert named.keys() == document["volumes"].keys()
    uid, gid = map(int, service["user"].split(":"))
    return Example(
        service["command"],
        list(named.values()),
        seconds(service["stop_grace_period"]),
        size(service["shm_size"]),
        user=(uid, gid),
    )


def kubernetes_documents() -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for document in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()):
        found.setdefault(document["kind"], []).append(document)
    return found


def kubernetes() -> Example:
    documents = kubernetes_documents()
    claims = {
        claim["metadata"]["name"]: claim["spec"]["resources"]["requests"]["storage"]
        for claim in documents["PersistentVolumeClaim"]
    }
    (deployment,) = documents["Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes.pop(mount["name"]) for mount in container["volumeMounts"]}
    assert volumes == {}, "a volume that is not mounted"
    shm = mounts.pop("/dev/shm")["emptyDir"]
    assert shm["medium"] == "Memory"
    sizes = {
        path: claims.pop(volume["persistentVolumeClaim"]["claimName"])
        for path, volume in mounts.items()
    }
    assert claims == {}, "a claim that is not used"
    context = pod["securityContext"]
    sleep = container["lifecycle"]["preStop"]["exec"]["command"][1]
    return Example(
        container["args"],
        list(sizes),
        pod["terminationGracePeriodSeconds"] - int(sleep),
        size(shm["sizeLimit"]),
        size(sizes["/mnt/kv"]),
        size(container["resources"]["limits"]["memory"]),
        (context["runAsUser"], context["runAsGroup"]),
    )


def unit() -> dict[str, str]:
    text = (DEPLOY / "kvstrata.service").read_text().replace("\\\n", " ")
    return dict(re.findall(r"^(\w+)=(.*)$", text, re.M))


def systemd() -> Example:
    service = unit()
    command = shlex.split(service["ExecStart"])
    assert command[1] == "serve"
    return Example(
        command[2:], [f"/var/lib/{service['StateDirectory']}"], seconds(service["TimeoutStopSec"])
    )


EXAMPLES = {"docker": docker_run, "compose": compose, "kubernetes": kubernetes, "systemd": systemd}
each = pytest.mark.parametrize("read", EXAMPLES.values(), ids=EXAMPLES)


def option(arguments: list[str], name: str) -> str:
    """The value of `name value` or `name=value`."""
    for n, word in enumerate(arguments):
        if word == name:
            return arguments[n + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    raise AssertionError(f"{name} is not given")


@each
def test_the_configuration_is_accepted(read: Any) -> None:
    example = read()
    transfer = json.loads(option(example.arguments, "--kv-transfer-config"))
    assert (transfer["kv_connector"], transfer["kv_role"]) == ("OffloadingConnector", "kv_both")
    extra = transfer["kv_connector_extra_config"]
    assert extra["spec_name"] == "KVStrataSpec"
    config = parse_config(extra)
    (tier,) = config.tiers
    root = tier.entry["root_dir"]
    mounts = [mount for mount in example.mounts if f"{root}/".startswith(f"{mount}/")]
    assert len(mounts) == 1, f"{root} does not outlive the container"
    most = parse_bytes("max_bytes", tier.entry["max_bytes"])
    assert example.volume is None or most <= example.volume * 0.95
    assert example.shm is None or config.cpu_bytes + GIB <= example.shm
    assert example.memory is None or example.shm < example.memory


@each
def test_a_stop_is_longer_than_the_engines(read: Any) -> None:
    example = read()
    assert int(option(example.arguments, "--shutdown-timeout")) + 15 <= example.grace_s


@each
def test_containers_run_as_the_images_user(read: Any) -> None:
    assert read().user in (None, VLLM_USER)


def test_they_serve_the_same() -> None:
    models = {name: read().arguments[0] for name, read in EXAMPLES.items()}
    assert len(set(models.values())) == 1, models
    sizes = {
        json.loads(option(read().arguments, "--kv-transfer-config"))["kv_connector_extra_config"][
            "cpu_bytes_to_use"
        ]
        for read in EXAMPLES.values()
    }
    assert len(sizes) == 1


def test_the_parts_of_the_kubernetes_example_meet() -> None:
    documents = kubernetes_documents()
    (deployment,), (service,) = documents["Deployment"], documents["Service"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert labels == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (port,) = container["ports"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    start = container["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 1800
    assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    # a GPU and a ReadWriteOnce volume are held by one pod at a time
    assert deployment["spec"]["strategy"]["type"] == "Recreate"


def test_the_dockerfile() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    (tag,) = re.findall(r"^FROM vllm/vllm-openai:v(\d+)\.(\d+)\.\d+$", text, re.M)
    assert tuple(map(int, tag)) in SUPPORTED
    copied = [
        source for line in re.findall(r"^COPY (.*)$", text, re.M) for source in line.split()[:-1]
    ]
    assert sorted(copied) == sorted(
        ["pyproject.toml", "README.md", "LICENSE", "kernels", "offload", "tiers"]
    ), "what a wheel is built of: see tests/packaging/test_wheel.py"
    assert all((ROOT / source).exists() for source in copied)
    assert re.findall(r"^USER (.*)$", text, re.M) == ["2000:0"]
    assert "install -d -o 2000 -g 0 -m 0700 /mnt/kv" in text  # where the examples mount


def test_the_compose_file_builds_the_dockerfile() -> None:
    (service,) = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].values()
    context = (DEPLOY / service["build"]["context"]).resolve()
    assert context / service["build"]["dockerfile"] == DEPLOY / "Dockerfile"
    assert context == ROOT


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "kvstrata.service").read_text()
    assert "/opt/kvstrata/.venv/bin/vllm " in text
    copy = tmp_path / "kvstrata.service"
    copy.write_text(text.replace("/opt/kvstrata/.venv/bin/vllm ", f"{sys.executable} "))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_owns_its_directories() -> None:
    service = unit()
    assert service["User"] != "root"
    assert service["StateDirectoryMode"] == "0700"
    assert service["KillMode"] == "mixed"
    for name in ("HOME", "XDG_CACHE_HOME"):
        assert f"{name}=/var/cache/{service['CacheDirectory']}" in service["Environment"].split()


def test_what_is_said_without_room_in_shm() -> None:
    """The two errors in docs/deploy/README.md, ours and vLLM's."""
    text = (DEPLOY / "README.md").read_text()
    ours = re.findall(r"^the CPU tier needs .*$", text, re.M)
    assert ours == [region._too_small("/dev/shm", 16 << 30, 64 << 20)]
    (theirs,) = re.findall(r"^Insufficient space in /dev/shm .*$", text, re.M)
    assert theirs.endswith("(e.g. --shm-size or --ipc=host).")
