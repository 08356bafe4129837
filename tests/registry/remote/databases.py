"""A real PostgreSQL for tests, on a Unix socket alone, and a relay before it that ends connections on demand."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

SOCKET = ".s.PGSQL.5432"
OWNER = "owner"
"""The user that may do everything."""
_OPTIONS = (
    "-c listen_addresses='' -c max_connections=60 -c shared_buffers=16MB "
    "-c fsync=off -c synchronous_commit=off -c full_page_writes=off"
)


def programs() -> Path | None:
    """The folder of the server's programs; None if it is not installed."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    found = places[-1] if places else shutil.which("initdb")
    return Path(found).resolve().parent if found else None


@dataclass
class Database:
    """A server.

    Attributes:
        folder: of its socket and its files. The path of a socket has at most 107 bytes, so it is a short one.
    """

    folder: Path

    def url(self, database: str) -> str:
        """The URL of a database, through the server's own socket."""
        return f"postgresql://{quote(str(self.folder), safe='')}/{database}"

    def start(self) -> None:
        """Start it, and wait until it lets somebody in."""
        options = f"{_OPTIONS} -c unix_socket_directories={self.folder}"
        self.control("-w", "-s", "-l", str(self.folder / "log"), "-o", options, "start")

    def stop(self) -> None:
        """End it at once, as a crash does."""
        self.control("-m", "immediate", "-w", "-s", "stop")

    def control(self, *words: str) -> None:
        """Run `pg_ctl`."""
        self.run("pg_ctl", "-D", str(self.folder / "data"), *words)

    def run(self, program: str, *words: str) -> None:
        """Run one of the server's programs, which refuse to run as root."""
        place = programs()
        assert place
        user = {"user": "postgres", "group": "postgres", "extra_groups": []} if not os.getuid() else {}
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "LC_ALL": "C"}
        with open(self.folder.parent / f"{self.folder.name}.out", "wb") as out:
            subprocess.run(
                [str(place / program), *words],
                cwd="/",
                env=environment,
                stdout=out,
                stderr=out,
                check=True,
                **user,  # type: ignore[call-overload]
            )


@contextlib.contextmanager
def postgresql() -> Iterator[Database]:
    """Run a server until the block ends."""
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as outer:
        os.chmod(outer, 0o755)
        server = Database(Path(outer) / "s")
        server.folder.mkdir()
        if not os.getuid():
            account = pwd.getpwnam("postgres")
            os.chown(server.folder, account.pw_uid, account.pw_gid)
        words = [
            "-U",
            OWNER,
            "-A",
            "trust",
            "--no-sync",
            "--no-instructions",
            "--locale=C.UTF-8",
            "-E",
            "UTF8",
        ]
        server.run("initdb", "-D", str(server.folder / "data"), *words)
        server.start()
        try:
            yield server
        finally:
            server.stop()


@dataclass
class Fault:
    """What the relay does to a statement.

    Attributes:
        match: bytes of it.
        before, after: called before the statement is handed on, and when its answer has come, which is kept back.
        loses: whether the connection ends then. `before` or `after` says when.
        skip: how many such statements pass first.
    """

    match: bytes
    before: Callable[[], object] | None = None
    after: Callable[[], object] | None = None
    loses: bool = True
    skip: int = 0
    is_done: bool = False


@dataclass
class Relay:
    """A relay before a server.

    Attributes:
        folder: of its socket.
        statements: that passed so far, as the client sent them.
        connections: how many were made.
        latency: seconds that each statement waits.
    """

    folder: Path
    behind: Path
    faults: list[Fault] = field(default_factory=list)
    statements: list[bytes] = field(default_factory=list)
    connections: int = 0
    latency: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def url(self, database: str) -> str:
        """The URL of a database, through the relay."""
        return f"postgresql://{quote(str(self.folder), safe='')}/{database}"

    def chosen(self, statement: bytes) -> Fault | None:
        """The fault for a statement, which is used up."""
        with self.lock:
            self.statements.append(statement)
            for fault in self.faults:
                if not fault.is_done and fault.match in statement:
                    if fault.skip:
                        fault.skip -= 1
                        return None
                    fault.is_done = True
                    return fault
        return None


@contextlib.contextmanager
def relay(behind: Path) -> Iterator[Relay]:
    """Run a relay before the server whose socket lies in a folder, until the block ends."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp")))
        state = Relay(folder, behind)
        listening = stack.enter_context(socket.socket(socket.AF_UNIX))
        listening.bind(str(folder / SOCKET))
        listening.listen(50)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client = listening.accept()[0]
                    state.connections += 1
                    threading.Thread(target=_serve, args=(client, state), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield state
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def _serve(client: socket.socket, state: Relay) -> None:
    with client, socket.socket(socket.AF_UNIX) as server, contextlib.suppress(OSError):
        try:
            server.connect(str(state.behind / SOCKET))
        except OSError:
            return
        held: list[Fault] = []

        def answers() -> None:
            with contextlib.suppress(OSError):
                while data := server.recv(1 << 16):
                    if held:
                        fault = held.pop()
                        assert fault.after
                        fault.after()
                        if fault.loses:
                            break
                    client.sendall(data)
            # The other side sees the end, too.
            for end in (client, server):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

        thread = threading.Thread(target=answers, daemon=True)
        thread.start()
        try:
            while data := client.recv(1 << 16):
                fault = state.chosen(data)
                time.sleep(state.latency)
                if fault and fault.before:
                    fault.before()
                    if fault.loses:
                        break
                elif fault:
                    held.append(fault)
                server.sendall(data)
        finally:
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            thread.join()
