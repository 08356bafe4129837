"""Where a shared registry is: the URL that a user gives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from registry.remote.bucket import check_key
from registry.store.errors import Invalid, Unsupported
from registry.store.text import quoted

SCHEMES = ("s3", "file", "gs", "az")

_URL = re.compile(rf"[A-Za-z][A-Za-z0-9+.-]*://|(?i:{'|'.join(SCHEMES)}):")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,254}\Z")
_SERVER = r"(?:[A-Za-z0-9._~%-]*|\[[0-9A-Fa-f:.%]*\])(?::[0-9]{0,5})?"
"""A server and its port. What is no number behind a colon may be a password."""
_LOG_URL = re.compile(rf"postgres(ql)?://{_SERVER}(?:,{_SERVER})*(/[A-Za-z0-9._~%-]*)?\Z")
_CONTAINER = re.compile(r"(?=.{3,63}\Z)[a-z0-9]+(-[a-z0-9]+)*\Z")
_HOLDERS = {"s3": "bucket", "gs": "bucket", "az": "container"}
_KEYS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_LOG_TABLE = re.compile(r"journal_[0-9a-f]{16}\Z")


class Address(NamedTuple):
    """A place in an object store.

    Attributes:
        scheme: one of `SCHEMES`.
        bucket: its name, or that of a container for `az`; empty for `file`.
        prefix: what the keys of the registry begin with, without a slash at the end; for `file`, the folder.
    """

    scheme: str
    bucket: str
    prefix: str

    def __str__(self) -> str:
        if self.scheme == "file":
            return Path(self.prefix).as_uri()
        return f"{self.scheme}://{self.bucket}{f'/{self.prefix}' if self.prefix else ''}"


def is_url(text: str) -> bool:
    """Whether a text is meant as a URL, which may be malformed, and not as a folder."""
    return _URL.match(text) is not None


def parse(text: str) -> Address:
    """The place that a URL names.

    Raises:
        Invalid: if it is malformed, has another scheme, or carries a password, which is not repeated in the message.
    """
    scheme, _, rest = text.partition(":")
    scheme = scheme.lower()
    if not rest.startswith("//"):
        raise Invalid(
            f"a URL has two slashes behind {scheme}: and is given as text, not as a Path, which takes one of them away",
            f"a folder of this name is ./{scheme}:...",
        )
    if scheme not in SCHEMES:
        known = ", ".join(f"{one}://" for one in SCHEMES)
        raise Invalid(
            f"{quoted(scheme)} is no kind of place for a registry", f"give a folder, or one of {known}"
        )
    parts = urlsplit(text.replace(f"{scheme}://", "x://", 1))
    if "@" in parts.netloc or parts.query or parts.fragment:
        if scheme == "file":
            raise Invalid("a file:// URL names a folder alone, without passwords, ? or #")
        raise Invalid(
            f"a {scheme}:// URL names {_HOLDERS[scheme]} and prefix alone, without keys, passwords, ? or #",
            f"keys come from the environment, such as {_KEYS[scheme]}",
        )
    path = unquote(parts.path)
    if scheme == "file":
        if parts.netloc not in ("", "localhost") or not path.startswith("/"):
            raise Invalid(
                f"{quoted(text)}: a file:// URL has three slashes and an absolute path, as file:///srv/models"
            )
        return Address("file", "", str(Path(path)))
    if not (_CONTAINER if scheme == "az" else _BUCKET).match(parts.netloc):
        holder = _HOLDERS[scheme]
        raise Invalid(f"{quoted(text)} names no {holder}; expected {scheme}://{holder.upper()}/PREFIX")
    prefix = path.strip("/")
    if prefix:
        try:
            check_key(prefix)
        except Invalid:
            raise Invalid(
                f"{quoted(text)}: the prefix may have letters, digits, '_', '-' and '.', in parts with '/' between them"
            ) from None
    return Address(scheme, parts.netloc, prefix)


def log_place(url: str, name: str) -> str:
    """Where in PostgreSQL the log of a shared registry lies: the URL of the database, `#`, and the table.

    Args:
        url: of the database, as a user gives it.
        name: 16 hex digits that no other registry has, as several may use one database.

    Raises:
        Invalid: if the URL is malformed, or holds more than a server and a database. It is not repeated in the message.
    """
    if not _LOG_URL.match(url):
        raise Invalid(
            "the log's URL names a server and a database alone, as postgresql://HOST/DATABASE",
            "user, password and options "
            "come from the environment: PGUSER, PGPASSWORD or PGPASSFILE, PGSERVICE, PGSSLMODE",
        )
    return f"{url}#journal_{name}"


def parse_log_place(place: str) -> tuple[str, str]:
    """The URL of a database, and the table in it.

    Raises:
        Unsupported: if it is none that `log_place` makes. It is not repeated in the message.
    """
    url, _, table = place.partition("#")
    if not _LOG_URL.match(url) or not _LOG_TABLE.match(table):
        raise Unsupported(
            "the registry names a place for its log that this version of torch-registry does not know",
            "upgrade with: pip install -U torch-registry, or correct its registry.toml",
        )
    return url, table
