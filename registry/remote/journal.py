"""The objects of the log, one for each entry, by number; and how they lie in a bucket."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from registry.remote.bucket import Bucket

FOLDER = "journal"
_AT_ONCE = 16
_MANY = 256
"""Objects that are asked for in one go."""


class Journal(Protocol):
    """The objects of the log by number; safe to use from several threads.

    Every method raises `Unreachable`, `Denied`, or another `StorageError` that says where the log is.
    """

    @property
    def url(self) -> str:
        """Where it is, without keys."""
        ...

    def name(self, seq: int) -> str:
        """What to call an object in an error."""
        ...

    def create(self, seq: int, data: bytes) -> bool:
        """Make an object if there is none of this number.

        Returns:
            Whether this call is known to have made it. Otherwise look: it may be there, by this call or another, or not.
        """
        ...

    def get(self, seq: int, limit: int) -> bytes | None:
        """An object's bytes; None if it is not there.

        Raises:
            Corrupt: if it has more than `limit` bytes, of which none is kept.
        """
        ...

    def put(self, seq: int, data: bytes) -> None:
        """Make an object in the place of a damaged one."""
        ...

    def last(self, behind: int = 0) -> int:
        """The highest number that is known to have an object; the one that is given if there is none behind it."""
        ...

    def behind(self, seq: int, limit: int) -> Iterator[tuple[int, bytes]]:
        """The objects behind a number, in order. The last ones may be missing.

        Raises:
            Corrupt: as `get`.
        """
        ...


class BucketJournal:
    """The log in a bucket; a `Journal`.

    Args:
        bucket: where it lies.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    @property
    def url(self) -> str:
        """Where it is, without keys."""
        return self._bucket.url

    def name(self, seq: int) -> str:
        """The URL of an object."""
        return f"{self.url}/{entry_key(seq)}"

    def create(self, seq: int, data: bytes) -> bool:
        """Make an object if there is none of this number."""
        return self._bucket.create(entry_key(seq), data)

    def get(self, seq: int, limit: int) -> bytes | None:
        """An object's bytes; None if it is not there."""
        return self._bucket.get(entry_key(seq), limit)

    def put(self, seq: int, data: bytes) -> None:
        """Make an object in the place of a damaged one."""
        self._bucket.put(entry_key(seq), data)

    def last(self, behind: int = 0) -> int:
        """The highest number in a listing, which may lag; the one that is given if there is none behind it."""
        return max(self._listed(behind), default=behind)

    def behind(self, seq: int, limit: int) -> Iterator[tuple[int, bytes]]:
        """The objects behind a number that a listing shows, which may lag; several are read at a time."""
        listed = self._listed(seq)
        with ThreadPoolExecutor(_AT_ONCE, "registry-log") as pool:
            # What has been read waits in memory, so not all are asked for at once.
            for start in range(0, len(listed), _MANY):
                part = listed[start : start + _MANY]
                for number, data in zip(part, pool.map(lambda n: self.get(n, limit), part), strict=True):
                    if data is None:
                        return
                    yield number, data

    def _listed(self, seq: int) -> list[int]:
        """The numbers behind one in a listing."""
        keys = (held.key for held in self._bucket.list(FOLDER, after=entry_key(seq)))
        return [int(key[len(FOLDER) + 1 :].partition(".")[0]) for key in keys if _is_key(key)]


def entry_key(seq: int) -> str:
    """The key of an entry in a bucket."""
    return f"{FOLDER}/{seq:016d}.zst"


def _is_key(key: str) -> bool:
    name = key.removeprefix(f"{FOLDER}/").removesuffix(".zst")
    return len(name) == 16 and name.isdecimal() and name.isascii()
