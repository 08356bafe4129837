"""A real S3 server for tests, SeaweedFS, a layer before it that fails on demand, and an emulator of Azure. All listen on 127.0.0.1 alone."""

from __future__ import annotations

import base64
import contextlib
import hmac
import http.client
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import obstore
from obstore.store import S3Store

KEYS = {"AWS_ACCESS_KEY_ID": "testkey", "AWS_SECRET_ACCESS_KEY": "testsecret", "AWS_REGION": "us-east-1"}
BUCKET = "reg"


def weed() -> str | None:
    """The server's program; None if it is not installed."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


@contextlib.contextmanager
def seaweed(folder: Path, users: Path | None = None) -> Iterator[int]:
    """Run the server until the block ends; gives its port.

    Args:
        users: a file with users and their rights, one of them with `KEYS`; otherwise there is that one alone.
    """
    program = weed()
    assert program
    first = _free_ports()
    ports = {name: first + 10 * i for i, name in enumerate(("s3", "filer", "master", "volume", "admin"))}
    words = [
        *(program, "mini", f"-dir={folder}", f"-bucket={BUCKET}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(
            "-master.telemetry=false",
            "-admin.ui=false",
            "-webdav=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ),
        *(f"-{name}.port={port}" for name, port in ports.items()),
    ]
    if users:
        words.append(f"-s3.config={users}")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "weed.log", "wb") as log:
        # Its sockets lie in the temporary folder.
        environment = {**os.environ, **KEYS, "TMPDIR": str(folder)}
        server = subprocess.Popen(words, env=environment, stdout=log, stderr=log, cwd=folder)
    try:
        _wait_until_ready(server, ports["s3"])
        yield ports["s3"]
    finally:
        server.kill()
        server.wait()


def _free_ports() -> int:
    """The first of some ports, ten apart, that are free; each service takes its own and that plus 10,000."""
    for first in range(12_000 + os.getpid() % 97 * 60, 22_000, 60):
        wanted = [port + more for port in range(first, first + 50, 10) for more in (0, 10_000)]
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in wanted:
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError("no free ports")


def _wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    """The port is open before the bucket is there, so wait until an object can be made."""
    program = (
        "import obstore; from obstore.store import S3Store; "
        f"obstore.put(S3Store('{BUCKET}', endpoint='http://127.0.0.1:{port}', client_options={{'allow_http': True}}, "
        "retry_config={'max_retries': 0}), 'ready', b'')"
    )
    deadline = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < deadline:
        # In a process of its own: obstore cannot be used behind a fork, and tests fork.
        done = subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, **KEYS}, capture_output=True
        )
        if not done.returncode:
            return
        time.sleep(0.1)
    raise RuntimeError("the S3 server does not start")


ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Those of every emulator of Azure, as its documents say."""


def azurite_program() -> str | None:
    """The emulator's program; None if it is not installed."""
    return shutil.which("azurite-blob")


@contextlib.contextmanager
def azurite(folder: Path) -> Iterator[int]:
    """Run an emulator of Azure with a container called `BUCKET` until the block ends; gives its port."""
    program = azurite_program()
    assert program
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--silent", "--disableTelemetry"]
    with open(folder / "azurite.log", "wb") as log:
        server = subprocess.Popen(
            [*words, "--skipApiVersionCheck", "--inMemoryPersistence"], stdout=log, stderr=log, cwd=folder
        )
    try:
        deadline = time.monotonic() + 60
        while not _make_container(port):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the emulator of Azure does not start")
            time.sleep(0.1)
        yield port
    finally:
        server.terminate()
        server.wait()


def _make_container(port: int) -> bool:
    """Make it, once the emulator answers. obstore makes no containers, so the request is signed here."""
    now = formatdate(usegmt=True)
    path = f"/{ACCOUNT}/{BUCKET}"
    lines = [
        "PUT",
        *[""] * 11,
        f"x-ms-date:{now}",
        "x-ms-version:2021-08-06",
        f"/{ACCOUNT}{path}",
        "restype:container",
    ]
    signed = hmac.digest(base64.b64decode(ACCOUNT_KEY), "\n".join(lines).encode(), "sha256")
    headers = {
        "x-ms-date": now,
        "x-ms-version": "2021-08-06",
        "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(signed).decode()}",
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection), contextlib.suppress(ConnectionError):
        connection.request("PUT", f"{path}?restype=container", headers=headers)
        return connection.getresponse().status == 201
    return False


@dataclass
class Fault:
    """What the layer does to some requests.

    Attributes:
        method, match: of the requests: their method, and a pattern that is looked for in path and query.
        do: `403`, `409`, `500`, `503`, `507`, `400 ExpiredToken`: answer that, and hand nothing on. `lose`: hand it on, then end the
            connection without an answer. `flip`, `cut`: change a bit of the answer's body, or end it in the middle.
            `race`: look whether the object is there, then put without the condition. `blind`: without the condition.
        skip: how many such requests pass first.
        times: to how many it is done then.
        before, after: called before the request is handed on, and behind that.
    """

    method: str
    match: str
    do: str = ""
    skip: int = 0
    times: int = 1
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None


@dataclass
class Layer:
    """A layer before an S3 server.

    Attributes:
        port: its own.
        latency: seconds that each request waits.
        faults: the first one that fits and is not used up is done.
        requests: method and path of each request so far.
        sent: bytes of all answers' bodies so far.
        received: bytes of all requests' bodies so far.
    """

    behind: int
    latency: float = 0.0
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    sent: int = 0
    received: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    port: int = 0

    def chosen(self, method: str, path: str) -> Fault | None:
        """The fault for a request, which is used up."""
        with self.lock:
            self.requests.append(f"{method} {path}")
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.match, path):
                    if fault.skip > 0:
                        fault.skip -= 1
                        return None
                    fault.times -= 1
                    return fault
        return None


@contextlib.contextmanager
def layer(behind: int) -> Iterator[Layer]:
    """Run a layer before the server at a port until the block ends."""
    state = Layer(behind)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Otherwise each answer waits 40 ms for the client's receipt of its head.
        disable_nagle_algorithm = True

        def handle_one_request(self) -> None:
            with contextlib.suppress(ConnectionError, TimeoutError):
                super().handle_one_request()

        def log_message(self, *_: object) -> None:
            pass

        def answer(self) -> None:
            _answer(self, state)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(handler: BaseHTTPRequestHandler, state: Layer) -> None:
    body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    fault = state.chosen(handler.command, handler.path)
    with state.lock:
        state.received += len(body)
    time.sleep(state.latency)
    do = fault.do if fault else ""
    if fault:
        fault.before()
    if do[:3].isdigit():
        _say(handler, int(do[:3]), do[4:])
        return
    if do in ("race", "blind"):
        _say(handler, 200 if _put_anyway(state, handler.path, body, looks=do == "race") else 412)
        return
    status, names, data = _hand_on(handler, state, body)
    if fault:
        fault.after()
    if do == "lose":
        # Ends with a reset, which the client sees at once.
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.close_connection = True
        handler.connection.close()
        return
    if do == "flip" and data:
        data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    with state.lock:
        state.sent += len(data)
    handler.send_response_only(status)
    for name, value in names:
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(data[: len(data) // 2] if do == "cut" else data)
    if do == "cut":
        handler.close_connection = True


_CODES = {403: "AccessDenied", 409: "ConditionalRequestConflict", 412: "PreconditionFailed", 503: "SlowDown"}


def _say(handler: BaseHTTPRequestHandler, status: int, code: str = "") -> None:
    code = code or _CODES.get(status, "InternalError")
    body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode() if status != 200 else b""
    handler.send_response_only(status)
    handler.send_header("ETag", '"injected"')
    handler.send_header("Content-Type", "application/xml")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def _put_anyway(state: Layer, path: str, body: bytes, *, looks: bool) -> bool:
    """Put an object without the condition. The layer signs that itself, as the client's signature covers its headers."""
    options = {"allow_http": True}
    store = S3Store(BUCKET, endpoint=f"http://127.0.0.1:{state.behind}", client_options=options)
    key = unquote(path.removeprefix(f"/{BUCKET}/"))
    if looks:
        with contextlib.suppress(FileNotFoundError):
            obstore.head(store, key)
            return False
        # So that all clients of a race have looked before the first one puts.
        time.sleep(0.1)
    obstore.put(store, key, body)
    return True


def _hand_on(
    handler: BaseHTTPRequestHandler, state: Layer, body: bytes
) -> tuple[int, list[tuple[str, str]], bytes]:
    """What the server answers. The client's signature covers the host that it asked, so that stays as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", state.behind, timeout=60)
    try:
        connection.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
        for name, value in handler.headers.items():
            connection.putheader(name, value)
        connection.endheaders(body or None)
        answer = connection.getresponse()
        data = answer.read()
        names = [
            pair for pair in answer.getheaders() if pair[0].lower() not in ("transfer-encoding", "connection")
        ]
        if handler.command != "HEAD" and not any(name.lower() == "content-length" for name, _ in names):
            names.append(("Content-Length", str(len(data))))
        return answer.status, names, data
    finally:
        connection.close()
