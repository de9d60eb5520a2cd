"""`kvstrata copy` to a bucket and back into a directory, and `kvstrata doctor --tier` for one."""

import json
from pathlib import Path
from typing import Any

import pytest
from obstore.store import S3Store

from kvstrata.tiers.base import Lookup
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.temporary import host_name
from kvstrata.tiers.object.bucket import SILENT, Bucket, BucketError
from kvstrata.tiers.testing import load, settle
from tests.offload.cli.cli_world import KEYS, PAGES, fill, run, run_json
from tests.tiers.object.conftest import OpenTier, S3Server

Options = dict[str, Any]


def place(options: Options, below: str = "") -> str:
    return json.dumps({"type": "object", **options, "url": options["url"] + below})


def files(root: Path) -> dict[str, bytes]:
    """What a root holds, without its books."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and ".kvstrata" not in path.parts
    }


def test_there_and_back(
    s3_options: Options, objects: S3Store, root: Path, tmp_path: Path, open_tier: OpenTier
) -> None:
    paths = fill(root)
    done = run_json("copy", root, place(s3_options))
    assert (done["pages"], done["there"], done["bad"]) == (3, 0, [])
    assert run_json("copy", root, place(s3_options))["there"] == 3
    assert {
        each["path"]: bytes(objects.get(each["path"]).bytes())
        for batch in objects.list()
        for each in batch
    } == files(root)
    tier = open_tier(**s3_options)
    for key, data in PAGES.items():
        assert settle(tier, key) is Lookup.HIT
        assert load(tier, [key])[1] == {key: data}
    said = run("copy", place(s3_options), place(s3_options, "/2"), exit_code=2)
    assert "give two places apart" in said
    assert run_json("copy", place(s3_options), tmp_path / "back", "--prefix", "org")["pages"] == 3
    assert files(tmp_path / "back") == files(root)
    assert run_json("copy", place(s3_options), tmp_path / "new", "--newer", "1d")["pages"] == 3
    assert paths.name in run_json("ls", tmp_path / "new")["namespaces"][0]["path"]


def test_what_is_wrong_there(
    s3_options: Options, objects: S3Store, root: Path, tmp_path: Path
) -> None:
    paths = fill(root)
    run("copy", root, place(s3_options))
    inside = NamespacePaths("", paths.name)
    flipped = bytearray(Path(paths.page(KEYS[0])).read_bytes())
    flipped[-1] ^= 1
    objects.put(inside.page(KEYS[0]), bytes(flipped))
    objects.put(f"{inside.pages}/abc/x.safetensors", b"")
    objects.put(f"{inside.quarantine}/x.safetensors", b"")
    done = run_json("copy", place(s3_options), tmp_path / "back", exit_code=1)
    assert (done["pages"], done["stopped"]) == (2, None)
    url = s3_options["url"]
    assert {each["path"]: each["reason"].split(":")[0] for each in done["bad"]} == {
        f"{url}/{inside.page(KEYS[0])}": "checksum",
        f"{url}/{inside.pages}/abc/x.safetensors": "key",
    }
    objects.put(inside.distrust, b"{}")
    (bad,) = run_json("copy", root, place(s3_options), exit_code=1)["bad"]
    assert bad["path"] == f"{url}/{inside.distrust}"
    (bad,) = run_json("copy", place(s3_options), tmp_path / "back", exit_code=1)["bad"]
    assert bad["path"] == f"{url}/{inside.distrust}"


def test_a_bucket_that_fails_ends_the_copy(
    s3: S3Server,
    s3_options: Options,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill(root)
    run("copy", root, place(s3_options))
    back = tmp_path / "back"
    with s3.silent():
        for ends in ((place(s3_options), back), (root, place(s3_options))):
            said = run("copy", *ends, exit_code=2)
            assert said.startswith(f"kvstrata: url: '{s3_options['url']}' cannot be used (")
            assert "; see that the server runs and can be reached, or give another" in said
    read = Bucket.read

    def read_config(self: Bucket, path: str, size: int, most: int) -> Any:
        if not path.endswith("/config.json"):
            raise BucketError(SILENT, "nobody answers")
        return read(self, path, size, most)

    monkeypatch.setattr(Bucket, "read", read_config)
    done = run_json("copy", place(s3_options), back, exit_code=1)
    assert (done["pages"], done["bad"]) == (0, [])
    assert done["stopped"] == "FROM failed: unreachable: nobody answers"


def test_what_fails_in_a_bucket_is_told_of_the_bucket(
    s3_options: Options,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    size = Bucket.size

    def fail(self: Bucket, path: str) -> int | None:
        if path.endswith(".safetensors"):
            raise BucketError("io-error", "not today")
        return size(self, path)

    fill(root)
    monkeypatch.setattr(Bucket, "size", fail)
    assert run_json("copy", root, place(s3_options))["pages"] == 3
    assert [record.getMessage() for record in caplog.records] == [
        f"kvstrata: {s3_options['url']}: io-error: not today"
    ]


def test_the_doctor_leaves_nothing(s3_options: Options, objects: S3Store) -> None:
    dead = f".kvstrata-{host_name()}-1-1-{'0' * 16}.tmp"  # a probe's that was killed
    objects.put(f"{dead}/m_{'0' * 12}/config.json", b"{}")
    objects.put("another", b"object")
    found = run_json("doctor", "--tier", place(s3_options))
    checks = {check["name"]: check for check in found["checks"]}
    assert {check["status"] for check in checks.values()} == {"ok"}
    assert list(checks) == ["options", "connect", "store", "look up", "load", "list", "delete"]
    assert [each["path"] for batch in objects.list() for each in batch] == ["another"]


def test_the_doctor_says_what_is_wrong(
    s3_options: Options, objects: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    found = run_json("doctor", "--tier", place(s3_options), exit_code=1)
    problem = found["checks"][-1]
    assert (problem["name"], problem["status"]) == ("connect", "problem")
    assert "SignatureDoesNotMatch" in problem["meaning"] and "wrong" not in problem["meaning"]
    assert problem["meaning"].startswith(f"url: '{s3_options['url']}' cannot be used (")
    assert "; see that " in problem["meaning"]
