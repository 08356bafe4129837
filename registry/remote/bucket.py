"""What the shared registry asks of an object store."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from registry.progress import Progress, silent
from registry.store.errors import Corrupt, Invalid, StorageError
from registry.store.text import quoted

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*\Z")
_LONGEST_KEY = 200


class Unreachable(StorageError):
    """The store does not answer, or its last answer was lost: what was asked of it may have happened."""


class Absent(Unreachable):
    """The folder that stands for a bucket is not there: nothing was made there yet, or it is not mounted."""


class Denied(StorageError):
    """The store refuses, as the keys lack a right or are not known to it."""


class Held(NamedTuple):
    """An object in a bucket.

    Attributes:
        key: its name below the prefix of the registry.
        size: in bytes.
        modified: when it was written, in seconds since 1970 by the store's clock.
    """

    key: str
    size: int
    modified: float


class Bucket(Protocol):
    """Objects by key; safe to use from several threads.

    Every method raises `Unreachable`, `Denied`, or another `StorageError` that names the bucket.
    """

    @property
    def url(self) -> str:
        """Where it is, without keys."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Make a small object if there is none of this key.

        Returns:
            Whether this call is known to have made it. Otherwise look: it may be there, by this call or another, or not.
        """
        ...

    def put(self, key: str, data: bytes) -> None:
        """Put a small object in the place of one that has the key; it may be repeated."""
        ...

    def put_file(self, key: str, path: Path, progress: Progress = silent) -> None:
        """Upload a file, in the place of an object that has the key; it may be repeated."""
        ...

    def get(self, key: str, limit: int) -> bytes | None:
        """An object's bytes; None if it is not there.

        Raises:
            Corrupt: if it has more than `limit` bytes, of which none is kept.
        """
        ...

    def get_range(self, key: str, start: int, size: int) -> bytes | None:
        """Some bytes of an object, at least one; fewer where it ends before, and None if it is not there."""
        ...

    def head(self, key: str) -> Held | None:
        """An object's size and age; None if it is not there."""
        ...

    def list(self, folder: str, after: str = "") -> Iterator[Held]:
        """The objects below a folder whose keys come behind `after`, sorted by key."""
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; one that is not there is fine."""
        ...

    def uploads(self, older_than: float) -> Sequence[str] | None:
        """Keys of uploads that were begun so many seconds ago and not finished; None if this cannot be told."""
        ...


def check_key(key: str) -> str:
    """Return a key that names an object, whatever the store makes of dots and slashes.

    Raises:
        Invalid: if it might name something else.
    """
    if not is_key(key):
        raise Invalid(f"{quoted(key[:_LONGEST_KEY])} is no key of a registry's bucket")
    return key


def is_key(text: str) -> bool:
    """Whether a text is a key that names an object; see `check_key`."""
    return len(text) <= _LONGEST_KEY and _KEY.match(text) is not None


def too_large(url: str, key: str, limit: int) -> Corrupt:
    """The error for an object that is larger than anything that this program writes under its key."""
    return Corrupt(
        f"{url}/{key}: the object is larger than {limit:,} bytes; it is none that a registry writes"
    )
