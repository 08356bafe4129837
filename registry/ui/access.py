"""Access: who may ask. Every user of a machine can reach its loopback, so an address alone opens nothing."""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Collection
from typing import NamedTuple

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?\Z")
"""A host as a browser names it: a name or an address, and a port."""

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
"""What every answer tells the browser to refuse."""


class Login(NamedTuple):
    """What a browser that gave the right token gets.

    Attributes:
        cookie: the name of a cookie.
        value: its value.
    """

    cookie: str
    value: str


class Access:
    """Decides who may ask.

    Args:
        port: the port of the server. Cookies know no ports, so the name of the cookie holds it.
        hosts: names of this server beside those of the loopback.
        has_token: whether a browser must show a token before it sees anything.
    """

    def __init__(self, port: int, *, hosts: Collection[str] = (), has_token: bool = True) -> None:
        self._hosts = _LOOPBACK | {host.lower() for host in hosts}
        self.token = secrets.token_urlsafe(18) if has_token else ""
        self._login = Login(f"torch-registry-{port}", secrets.token_urlsafe(24))
        self.form_token = secrets.token_urlsafe(18)

    def is_host(self, host: str) -> bool:
        """Whether the header `Host` names this server, with any port, as a tunnel changes it.

        A page from elsewhere whose name was made to lead to this machine gives its own name.
        """
        match = _HOST.match(host.lower())
        return match is not None and match[1] in self._hosts

    def login(self, token: str) -> Login | None:
        """What a browser gets for a token; None for a wrong one."""
        is_right = hmac.compare_digest(token.encode(), self.token.encode())
        return self._login if self.token and is_right else None

    def is_known(self, cookies: dict[str, str]) -> bool:
        """Whether a browser has shown the token before, by its cookies."""
        if not self.token:
            return True
        shown = cookies.get(self._login.cookie, "")
        return hmac.compare_digest(shown.encode(), self._login.value.encode())
