"""What cannot work is one error at start, and no error shows a password."""

import shutil
import socket
import socketserver
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from kvstrata.tiers.base import PageLayout, TensorSpec, TierConfigError
from kvstrata.tiers.options import parse_options
from kvstrata.tiers.process import probe
from kvstrata.tiers.testing import CONTEXT, load, make_data, make_key, store
from kvstrata.tiers.valkey import tier as tier_module
from kvstrata.tiers.valkey.config import ValkeyOptions
from tests.tiers.valkey.conftest import OpenTier, StartServer
from tests.tiers.valkey.server import Server, free_port
from tests.waiting import wait_until

PAGE = {make_key(1): make_data(1, CONTEXT.layouts[0].nbytes)}


@pytest.mark.parametrize(
    ("url", "parsed"),
    [
        ("valkey://kv", "valkey://kv:6379"),
        ("valkey://10.0.0.7:7000/", "valkey://10.0.0.7:7000"),
        ("valkey://[::1]:7000", "valkey://[::1]:7000"),
    ],
)
def test_urls(url: str, parsed: str) -> None:
    options = parse_options(ValkeyOptions, {"url": url}, "valkey tier")
    assert options.url == parsed
    assert options.address == (parsed[9:].rpartition(":")[0].strip("[]"), int(parsed[-4:]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, '^url is missing: give the server, for example "valkey://host:6379"'),
        ({"url": "kv:6379"}, r"^url: 'kv:6379' is wrong; give \"valkey://host:6379\""),
        (
            {"url": "redis://kv"},
            "^url: 'redis://kv' is wrong; give \"valkey://host:6379\"; a Redis",
        ),
        ({"url": "rediss://kv"}, "^url: 'rediss://kv' is wrong.*\"tls\": true"),
        ({"url": "valkey://kv:65536"}, "^url: 'valkey://kv:65536' is wrong"),
        ({"url": "valkey://kv/3"}, "^url: 'valkey://kv/3' is wrong.*nothing behind the port"),
        ({"url": "valkey://me:hunter2@kv"}, "^url: it names a user or a password.*password_file"),
        ({"url": "valkey://kv", "password_file": "hunter2"}, "^password_file: what is given is no"),
        ({"url": "valkey://kv", "password": "hunter2"}, "'password': use password_file"),
        ({"url": "valkey://kv", "timeout_s": 1e-9}, "^timeout_s: 1e-09 is wrong.*at least 0.01"),
        ({"url": "valkey://kv", "timeout_s": 11}, "^timeout_s: 11 is wrong.*at most 10"),
        ({"host": "kv"}, "'host': use url"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(TierConfigError, match=message) as raised:
        tier_module.ValkeyTier.check_options(options)
    assert "hunter2" not in str(raised.value)


def test_without_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "find_spec", lambda name: None)
    with pytest.raises(TierConfigError, match=r"pip install 'kvstrata\[valkey\]'"):
        tier_module.ValkeyTier.check_options({"url": "valkey://kv"})


def test_without_a_server() -> None:
    url = f"valkey://127.0.0.1:{free_port()}"
    with pytest.raises(TierConfigError, match=f"^url: '{url}' cannot be used.*start the server"):
        tier_module.ValkeyTier({"url": url, "timeout_s": 0.3}, CONTEXT)


def test_passwords(open_tier: OpenTier, start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(password="swordfish")
    file = tmp_path / "password"
    given = {"password_file": str(file)}
    for options, text, message in [
        ({}, "", "^password_file is missing: 'valkey://.*' needs a password .*; give the absolute"),
        (given, None, "^password_file: .*No such file"),
        (given, "hunter2\n", "^password_file: .* does not open the server"),
        (
            given,
            "me\nhunter2\nhunter3\n",
            "^password_file: .*give one line with the password, or two",
        ),
        (given, "me\nswordfish\n", "^password_file: .* does not open the server"),
    ]:
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        with pytest.raises(TierConfigError, match=message) as raised:
            open_tier(server, **options)
        assert not any(word in str(raised.value) for word in ("hunter", "swordfish", "Errno"))
    server.ask("ACL", "SETUSER", "me", "on", ">tuna", "~*", "+@all")
    for text in ("swordfish", "default\nswordfish\n", "me\ntuna\n"):
        file.write_text(text)
        assert not store(open_tier(server, **given), PAGE).failed


@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o640, True), (0o604, True)])
def test_a_password_that_others_can_read(
    open_tier: OpenTier,
    start_server: StartServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    mode: int,
    warns: bool,
) -> None:
    server = start_server(password="swordfish")
    (file := tmp_path / "password").write_text("swordfish\n")
    file.chmod(mode)
    open_tier(server, password_file=str(file))
    assert ("give it mode 0600" in caplog.text) == warns


@pytest.mark.parametrize("key", ["cluster", "tls"])
def test_what_the_server_is_not(open_tier: OpenTier, start_server: StartServer, key: str) -> None:
    with pytest.raises(TierConfigError, match=f"^{key}: true is wrong: 'valkey://.*give false"):
        open_tier(start_server(), timeout_s=1, **{key: True})


def test_a_page_that_is_no_value(open_tier: OpenTier, start_server: StartServer) -> None:
    layout = PageLayout((TensorSpec("kv", "U8", (1, 2 * 2**20)),), tokens=16)
    context = replace(CONTEXT, layouts={**CONTEXT.layouts, 3: layout})
    server = start_server("--proto-max-bulk-len", "1mb")
    with pytest.raises(TierConfigError, match=r"takes values of 1.0 MiB .*a page has 2.0 MiB; "):
        open_tier(server, context)
    assert not store(open_tier(server), PAGE).failed


def test_a_server_that_does_not_tell(open_tier: OpenTier, server: Server) -> None:
    server.ask("ACL", "SETUSER", "default", "-config")
    try:
        assert not store(open_tier(server), PAGE).failed
    finally:
        server.ask("ACL", "SETUSER", "default", "+config")


def test_a_cluster(open_tier: OpenTier, start_server: StartServer) -> None:
    server = start_server("--cluster-enabled", "yes")
    server.ask("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
    wait_until(lambda: b"cluster_state:ok" in server.ask("CLUSTER", "INFO"))
    with pytest.raises(TierConfigError, match=r"^cluster: .* is a server of a cluster; give true"):
        open_tier(server)
    tier = open_tier(server, cluster=True)
    many = {make_key(n): make_data(n, CONTEXT.layouts[0].nbytes) for n in range(20)}
    assert not store(tier, many).failed
    assert load(tier, list(many))[1] == many


@contextmanager
def encrypted(server: Server, certificate: Path, key: Path) -> Iterator[int]:
    """A port that speaks TLS and hands all to the server, which may be built without it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with (
                suppress(OSError),
                context.wrap_socket(self.request, server_side=True) as client,
                socket.create_connection(("127.0.0.1", server.port)) as plain,
            ):
                back = threading.Thread(target=pump, args=(plain, client), daemon=True)
                back.start()
                pump(client, plain)
                plain.shutdown(socket.SHUT_RDWR)
                back.join()

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as listener:
        listener.daemon_threads = True
        listener.block_on_close = False
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield listener.server_address[1]
        listener.shutdown()


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl to make a certificate with")
def test_tls(
    open_tier: OpenTier, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext "
        f"subjectAltName=IP:127.0.0.1 -addext "
        f"basicConstraints=critical,CA:FALSE -keyout {key} -out {certificate}".split(),
        check=True,
        capture_output=True,
    )
    with encrypted(server, certificate, key) as port:
        options = {"url": f"valkey://127.0.0.1:{port}", "tls": True}
        with pytest.raises(TierConfigError, match=r"^url: .* cannot be used"):
            open_tier(server, **options)  # nobody vouches for it
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        tier = open_tier(server, **options)
        assert not store(tier, PAGE).failed
        assert load(tier, list(PAGE))[1] == PAGE
        assert tier.shutdown(60.0)
