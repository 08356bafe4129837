"""A bucket that does something before and behind each request: kills the process, stops it, lets others go on, lies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from registry.progress import Progress, silent
from registry.remote.bucket import Bucket, Held

At = Callable[[int, str, str], object]
Sees = Callable[[Iterable[Held]], Iterable[Held]]


class FaultyBucket:
    """Another bucket with faults.

    Args:
        at: called before and behind each request, with the number of the moment, from zero, the request, and its key.
        sees: what a listing shows of the objects that are there.
    """

    def __init__(self, bucket: Bucket, at: At = lambda *_: None, sees: Sees = lambda held: held) -> None:
        self._bucket = bucket
        self._at = at
        self._sees = sees
        self.moments = 0

    @property
    def url(self) -> str:
        """Where it is."""
        return self._bucket.url

    def create(self, key: str, data: bytes) -> bool:
        """See `Bucket`; the same for all others."""
        return bool(self._ask("create", key, lambda: self._bucket.create(key, data)))

    def put_file(self, key: str, path: Path, progress: Progress = silent) -> None:
        self._ask("put", key, lambda: self._bucket.put_file(key, path, progress))

    def get(self, key: str, limit: int) -> bytes | None:
        found: bytes | None = self._ask("get", key, lambda: self._bucket.get(key, limit))
        return found

    def get_range(self, key: str, start: int, size: int) -> bytes | None:
        found: bytes | None = self._ask("get", key, lambda: self._bucket.get_range(key, start, size))
        return found

    def head(self, key: str) -> Held | None:
        found: Held | None = self._ask("head", key, lambda: self._bucket.head(key))
        return found

    def list(self, folder: str, after: str = "") -> Iterator[Held]:
        found: Iterable[Held] = self._ask("list", folder, lambda: [*self._bucket.list(folder, after)])
        return iter(self._sees(found))

    def delete(self, keys: Sequence[str]) -> None:
        self._ask("delete", keys[0] if keys else "", lambda: self._bucket.delete(keys))

    def uploads(self, older_than: float) -> Sequence[str] | None:
        return self._bucket.uploads(older_than)

    def _ask(self, what: str, key: str, run: Callable[[], Any]) -> Any:
        self._moment(f"before {what}", key)
        result = run()
        self._moment(f"after {what}", key)
        return result

    def _moment(self, what: str, key: str) -> None:
        number = self.moments
        self.moments += 1
        self._at(number, what, key)
