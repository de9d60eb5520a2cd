import os
from pathlib import Path

import pytest

from kvstrata.tiers.machine.disk import Mount, file_system, mount_of
from kvstrata.tiers.machine.memory import available_memory


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1000 * 1024),
        ({"memory.max": "max", "memory.current": "5"}, 1000 * 1024),
        (
            {
                "memory.max": "900000",
                "memory.current": "800000",
                "memory.stat": "anon 700000\nfile 100000\nactive_file 20000\ninactive_file 30000\n",
            },
            150_000,
        ),
        (
            {
                "memory/memory.limit_in_bytes": "900000",
                "memory/memory.usage_in_bytes": "800000",
                "memory/memory.stat": "active_file 1\ntotal_active_file 7\ntotal_inactive_file 9\n",
            },
            100_016,
        ),
        (
            {
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "memory/memory.usage_in_bytes": "800000",
                "memory/memory.stat": "",
            },
            1000 * 1024,
        ),
    ],
    ids=["no-cgroup", "v2-no-limit", "v2", "v1", "v1-no-limit"],
)
def test_available_memory(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 5000 kB\nMemFree: 10 kB\nMemAvailable: 1000 kB\n")
    cgroup = tmp_path / "cgroup"
    (cgroup / "memory").mkdir(parents=True)
    for name, text in files.items():
        (cgroup / name).write_text(text)
    assert available_memory(tmp_path, cgroup) == expected


def test_available_memory_here() -> None:
    assert 0 < available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_file_system(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    (tmp_path / "a b").mkdir()
    (tmp_path / "link").symlink_to("a b")
    here = str(tmp_path)
    lines = [
        "21 1 8:1 / / rw - ext4 /dev/sda rw",
        f"22 21 8:2 / {here} rw shared:1 master:2 - tmpfs tmpfs rw",
        f"25 21 0:9 / {here}/shm rw - tmpfs tmpfs rw,size=4k,huge=within_size",
        f"23 21 8:2 / {here} rw - xfs /dev/sdb rw",  # mounted over the other
        f"24 21 8:3 / {here}/a\\040b rw - nfs4 server:/x rw",
    ]
    mounts.write_text("\n".join(lines))
    found = [
        file_system(path, mounts)
        for path in ("/", f"{here}x", here, f"{here}/a", f"{here}/a b", f"{here}/link/c")
    ]
    assert found == ["ext4", "ext4", "xfs", "xfs", "nfs4", "nfs4"]
    assert file_system("/", tmp_path / "absent") == "unknown"
    assert file_system("/proc") == "proc"
    assert mount_of(f"{here}/shm/x", mounts) == Mount(
        "tmpfs", ("rw", "size=4k", "huge=within_size")
    )
    assert mount_of("/", tmp_path / "absent") == Mount("unknown", ())
