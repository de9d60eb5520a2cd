"""`kvstrata copy` to a server and back into a directory, and `kvstrata doctor --tier` for one."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.tiers.base import Lookup
from kvstrata.tiers.page.identity import config_text
from kvstrata.tiers.testing import CONTEXT, load, settle, store
from kvstrata.tiers.valkey.client import Client
from tests.offload.cli.cli_world import KEYS, PAGES, fill, run, run_json
from tests.tiers.valkey.conftest import OpenTier, StartServer
from tests.tiers.valkey.server import Server
from tests.tiers.valkey.values import names


def files(root: Path) -> dict[str, bytes]:
    """What a root holds, without its books."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and ".kvstrata" not in path.parts
    }


def test_there_and_back(server: Server, root: Path, tmp_path: Path, open_tier: OpenTier) -> None:
    fill(root)
    done = run_json("copy", root, server.url)
    assert (done["pages"], done["there"], done["bad"]) == (3, 0, [])
    assert run_json("copy", root, server.url)["there"] == 3
    tier = open_tier(server)
    for key, data in PAGES.items():
        assert settle(tier, key) is Lookup.HIT
        assert load(tier, [key])[1] == {key: data}
    place = json.dumps({"type": "valkey", "url": server.url})
    assert run_json("copy", place, tmp_path / "back")["pages"] == 3
    assert files(tmp_path / "back") == files(root)


def test_what_a_tier_stored_can_be_copied(
    server: Server, open_tier: OpenTier, tmp_path: Path
) -> None:
    tier = open_tier(server, ttl_s=1000)
    for key, data in PAGES.items():
        assert not store(tier, {key: data}).failed
    (name,) = server.ask("KEYS", "*}:config")
    assert server.ask("GET", name).decode() == config_text(CONTEXT.namespace)
    assert 1000 < server.ask("TTL", name) <= 1060
    assert run_json("copy", server.url, tmp_path / "copy")["pages"] == 3


def test_what_is_wrong_there(server: Server, root: Path, tmp_path: Path) -> None:
    paths = fill(root)
    run("copy", root, server.url)
    data = names(KEYS[0])[1]
    server.ask("SETRANGE", data, 0, b"xx")
    server.ask("DEL", names(KEYS[1])[0])
    server.ask("SET", data.replace("}", "zz}"), "foreign")
    server.ask("SET", data.replace("00000000}", "00000009}"), "foreign")
    done = run_json("copy", server.url, tmp_path / "back", exit_code=1)
    assert (done["pages"], done["gone"], done["stopped"]) == (1, 1, None)
    reasons = sorted(each["reason"].split(":")[0] for each in done["bad"])
    assert reasons == ["checksum", "key", "shape"]
    said = run("copy", server.url, tmp_path / "new", "--newer", "1d", exit_code=2)
    assert said == f"kvstrata: --newer: {server.url} does not know when a page was written\n"
    server.ask("SET", f"{{{paths.name}}}:config", "{}")
    (bad,) = run_json("copy", server.url, tmp_path / "back", exit_code=1)["bad"]
    assert bad["reason"].startswith("config: ")
    server.ask("SET", f"{{{paths.name}}}:distrusted", "{}")
    for ends in ((server.url, tmp_path / "back"), (root, server.url)):
        (bad,) = run_json("copy", *ends, exit_code=1)["bad"]
        assert bad["reason"].startswith("audits found pages")
    server.ask("DEL", f"{{{paths.name}}}:config")
    said = run("copy", server.url, tmp_path / "back", exit_code=2)
    assert said == f"kvstrata: no namespaces in '{server.url}'\n"


def test_a_server_that_fails(start_server: StartServer, root: Path) -> None:
    fill(root)
    server = start_server("--maxmemory", "1mb", "--maxmemory-policy", "noeviction")
    done = run_json("copy", root, server.url, exit_code=1)
    assert done["stopped"].startswith("TO failed: no-space: ") and not done["pages"]
    server.kill()
    said = run("copy", root, server.url, exit_code=2)
    assert said.startswith(f"kvstrata: url: '{server.url}' cannot be used")


def test_passwords(start_server: StartServer, root: Path, tmp_path: Path) -> None:
    fill(root)
    server = start_server(password="swordfish")
    said = run("copy", root, server.url, exit_code=2)
    assert "password_file is missing" in said
    password = tmp_path / "password"
    password.write_text("swordfish\n")
    os.chmod(password, 0o600)
    place = json.dumps({"type": "valkey", "url": server.url, "password_file": str(password)})
    assert run_json("copy", root, place)["pages"] == 3


def test_the_doctor_leaves_nothing(server: Server) -> None:
    server.ask("SET", "another", "value")
    found = run_json("doctor", "--tier", json.dumps({"type": "valkey", "url": server.url}))
    checks = {check["name"]: check for check in found["checks"]}
    assert {check["status"] for check in checks.values()} == {"ok"}
    assert list(checks) == ["options", "connect", "store", "look up", "load", "list", "delete"]
    assert (checks["list"]["found"], checks["delete"]["found"]) == ("17 pages", "nothing is left")
    assert server.ask("KEYS", "*") == [b"another"]


def test_the_doctor_outlasts_a_short_ttl(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its values have a time of their own; and it knows them by name but for the listing."""
    scanned: list[str] = []
    times: set[int] = set()
    scan = Client.scan

    def listen(self: Client, pattern: str) -> Iterator[bytes]:
        scanned.append(pattern)
        names = list(scan(self, pattern))
        times.update(server.ask("TTL", name) for name in names)
        return iter(names)

    monkeypatch.setattr(Client, "scan", listen)
    run_json("doctor", "--tier", json.dumps({"type": "valkey", "url": server.url, "ttl_s": 1}))
    assert len(scanned) == 1 and min(times) > 1
    assert server.ask("KEYS", "*") == []


def test_the_doctor_says_what_is_wrong(start_server: StartServer) -> None:
    server = start_server("--maxmemory", "4mb", "--maxmemory-policy", "noeviction")
    place = json.dumps({"type": "valkey", "url": server.url})
    found = run_json("doctor", "--tier", place, exit_code=1)
    problem = found["checks"][-1]
    assert (problem["name"], problem["status"]) == ("store", "problem")
    assert "no-space" in problem["meaning"] and "OOM" in problem["meaning"]
    assert not server.ask("KEYS", "*data") and not server.ask("KEYS", "*config")
    server.kill()
    found = run_json("doctor", "--tier", place, exit_code=1)
    assert found["checks"][-1]["name"] == "connect"
    assert "cannot be used" in found["checks"][-1]["meaning"]
