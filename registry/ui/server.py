"""The server: sockets on this machine, a thread for each browser, and an end without loose threads."""

from __future__ import annotations

import errno
import logging
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from registry.store.errors import Conflict
from registry.ui.access import Access
from registry.ui.app import Application
from registry.ui.reader import Reader

PORT = 6007
"""The port unless another is asked for, or it is taken."""

_PORTS = 100
"""How many ports are tried."""

_LOOK_SECONDS = 0.2
"""How often a server looks whether it is to end."""

_SILENCE_SECONDS = 60
"""How long a browser may keep a connection without saying or taking anything."""


class _Handler(WSGIRequestHandler):
    """Keeps connections, and writes no line for a request: it could hold the token."""

    protocol_version = "HTTP/1.1"
    timeout = _SILENCE_SECONDS

    def log(self, type: str, message: str, *args: Any) -> None:
        """Say nothing."""

    def version_string(self) -> str:
        """What the header `Server` says."""
        return "torch-registry"


class Server:
    """Serves the pages of a registry until it is closed.

    Attributes:
        place: the registry's folder or URL.
        port: the port that it listens on.

    Args:
        root: the registry's folder or URL.
        host: the address to listen on; the loopback, in both of its forms, unless given.
        port: the port; the first free one from `PORT` on unless given.
        allowed_hosts: names by which browsers may call this server, beside those of the loopback and `host`.
        has_token: whether a browser must show a token.
        base, is_api_only, allows_changes: as `Application` takes them.

    Raises:
        NotFound: if there is no registry.
        Conflict: if the port is taken.
    """

    def __init__(
        self,
        root: Path | str | None,
        *,
        host: str | None = None,
        port: int | None = None,
        allowed_hosts: Sequence[str] = (),
        has_token: bool = True,
        base: str = "",
        is_api_only: bool = False,
        allows_changes: bool = False,
    ) -> None:
        # Werkzeug would print a line about production servers.
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        reader = Reader(root)
        sockets: list[socket.socket] = []
        try:
            sockets, self.port = _sockets(host, port)
            names = [*allowed_hosts, *([f"[{host}]" if ":" in host else host] if host else [])]
            self._access = Access(self.port, hosts=names, has_token=has_token)
            self._app = Application(
                reader, self._access, base=base, is_api_only=is_api_only, allows_changes=allows_changes
            )
            self._servers = [_serving(one, self._app) for one in sockets]
        except BaseException:
            for one in sockets:
                one.close()
            reader.close()
            raise
        self.place = reader.registry.place
        self._host = host
        self._base = base.rstrip("/")
        self._threads = [
            threading.Thread(target=one.serve_forever, args=(_LOOK_SECONDS,), daemon=True)
            for one in self._servers
        ]
        for thread in self._threads:
            thread.start()

    def address(self, path: str = "/") -> str:
        """The address of a page, with the token if one is needed."""
        host = "localhost" if self._host in (None, "0.0.0.0", "::") else self._host  # noqa: S104 - it is compared
        shown = f"[{host}]" if ":" in host else host
        token = self._access.token
        path, hash_sign, fragment = path.partition("#")
        joint = "&" if "?" in path else "?"
        return f"http://{shown}:{self.port}{self._base}{path}{f'{joint}token={token}' if token else ''}{hash_sign}{fragment}"

    def wait(self) -> None:
        """Serve until an interruption."""
        for thread in self._threads:
            while thread.is_alive():
                thread.join(3_600)

    def close(self) -> None:
        """End all that the server began."""
        for one in self._servers:
            one.shutdown()
        self._app.close()
        for one in self._servers:
            one.server_close()


def _serving(listening: socket.socket, app: Application) -> BaseWSGIServer:
    host, port = listening.getsockname()[:2]
    server = make_server(host, port, app, threaded=True, request_handler=_Handler, fd=listening.fileno())
    # The server has a copy of the socket.
    listening.close()
    return server


def _sockets(host: str | None, port: int | None) -> tuple[list[socket.socket], int]:
    """Sockets that listen, and their port.

    Raises:
        Conflict: if the port, or each that may be taken, is in use.
    """
    hosts = [host] if host else ["127.0.0.1", "::1"]
    for number in [port] * (_PORTS if port == 0 else 1) if port is not None else range(PORT, PORT + _PORTS):
        try:
            found = [_listening(hosts[0], number)]
        except OSError as error:
            if port is not None or error.errno != errno.EADDRINUSE:
                where = f"port {number} of {hosts[0]}"
                raise Conflict(
                    f"{where} cannot be used ({error.strerror})", "leave --port out to take a free one"
                ) from None
            continue
        number = found[0].getsockname()[1]
        try:
            found += [_listening(other, number) for other in hosts[1:]]
        except OSError as error:
            # A machine may have no such address. But if another program has it, browsers would give that one the token.
            if error.errno == errno.EADDRINUSE:
                found[0].close()
                if port not in (None, 0):
                    raise Conflict(
                        f"port {number} of {hosts[1]} is taken", "leave --port out to take a free one"
                    ) from None
                continue
        return found, number
    raise Conflict(f"the ports {PORT} to {PORT + _PORTS - 1} are taken", "give another one with --port")


def _listening(host: str, port: int) -> socket.socket:
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if ":" in host:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        found.bind((host, port))
        found.listen(64)
    except BaseException:
        found.close()
        raise
    return found
