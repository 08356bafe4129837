"""Where a shared registry is: the URL that a user gives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from registry.remote.bucket import check_key
from registry.store.errors import Invalid
from registry.store.text import quoted

SCHEMES = ("s3", "file", "gs", "az")

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,254}\Z")


class Address(NamedTuple):
    """A place in an object store.

    Attributes:
        scheme: one of `SCHEMES`.
        bucket: its name; empty for `file`.
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
    """Whether a text is meant as a URL, and not as a folder."""
    return _URL.match(text) is not None


def parse(text: str) -> Address:
    """The place that a URL names.

    Raises:
        Invalid: if it is malformed, has another scheme, or carries a password, which is not repeated in the message.
    """
    scheme = text.partition("://")[0].lower()
    if scheme not in SCHEMES:
        known = ", ".join(f"{one}://" for one in SCHEMES)
        raise Invalid(
            f"{quoted(scheme)} is no kind of place for a registry; give a folder, or one of {known}"
        )
    parts = urlsplit(text.replace(f"{scheme}://", "x://", 1))
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise Invalid(
            f"a {scheme}:// URL names bucket and prefix alone, without keys, passwords, ? or #; keys come from the "
            "environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    path = unquote(parts.path)
    if scheme == "file":
        if parts.netloc not in ("", "localhost") or not path.startswith("/"):
            raise Invalid(
                f"{quoted(text)}: a file:// URL has three slashes and an absolute path, as file:///srv/models"
            )
        return Address("file", "", str(Path(path)))
    if not _BUCKET.match(parts.netloc):
        raise Invalid(f"{quoted(text)} names no bucket; expected {scheme}://BUCKET/PREFIX")
    prefix = path.strip("/")
    if prefix:
        try:
            check_key(prefix)
        except Invalid:
            raise Invalid(
                f"{quoted(text)}: the prefix may have letters, digits, '_', '-' and '.', in parts with '/' between them"
            ) from None
    return Address(scheme, parts.netloc, prefix)
