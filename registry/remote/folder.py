"""A bucket in a folder, for `file://` and for tests: hosts that share a file system need no object store."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from registry.progress import Progress, silent
from registry.remote.bucket import Absent, Held, check_key, is_key, too_large
from registry.store import durable, places
from registry.store.errors import storage_errors

_TMP = ".tmp"
_CHUNK = 8 << 20


class FolderBucket:
    """Objects as files below a folder; a `registry.remote.bucket.Bucket`.

    Args:
        root: the folder, which is made when something is written.
        marks: names of which one is there once the folder stands for a bucket. Without any, nothing but the first and what
            lies below `probe/` is touched: the folder of a file system that is not mounted is there as well, and empty.
    """

    def __init__(self, root: Path, marks: Sequence[str] = ()) -> None:
        self.root = root
        self._marks = marks

    def __repr__(self) -> str:
        return f"FolderBucket({str(self.root)!r})"

    @property
    def url(self) -> str:
        """Where it is."""
        return self.root.as_uri()

    def create(self, key: str, data: bytes) -> bool:
        """Make an object if there is none of this key."""
        with self._errors(key), self._new_file() as file:
            file.write(data)
            file.sync(data)
            return file.publish_new(self._path(key), inner=self._inner(key))

    def put(self, key: str, data: bytes) -> None:
        """Put a small object in the place of one that has the key."""
        with self._errors(key), self._new_file() as file:
            file.write(data)
            file.sync(data)
            file.publish(self._path(key), inner=self._inner(key))

    def put_file(self, key: str, path: Path, progress: Progress = silent) -> None:
        """Copy a file, in the place of an object that has the key."""
        with self._errors(key), places.open_regular(path) as source, self._new_file() as file:
            size = os.fstat(source.fileno()).st_size
            done = 0
            while data := os.pread(source.fileno(), _CHUNK, done):
                file.write(data)
                done += len(data)
                progress(done, size)
            file.sync(b"")
            file.publish(self._path(key), inner=self._inner(key))

    def get(self, key: str, limit: int) -> bytes | None:
        """An object's bytes; None if it is not there."""
        data = self.get_range(key, 0, limit + 1)
        if data is not None and len(data) > limit:
            raise too_large(self.url, key, limit)
        return data

    def get_range(self, key: str, start: int, size: int) -> bytes | None:
        """Bytes of an object; None if it is not there."""
        with self._errors(key):
            try:
                fd = places.open_file(self._path(key), os.O_RDONLY, inner=self._inner(key))
            except FileNotFoundError:
                return None
            with os.fdopen(fd, "rb") as file:
                file.seek(start)
                return file.read(size)

    def head(self, key: str) -> Held | None:
        """An object's size and age; None if it is not there."""
        with self._errors(key):
            status = places.status_of(self._path(key), inner=self._inner(key))
        if status is None or not stat.S_ISREG(status.st_mode):
            return None
        return Held(key, status.st_size, status.st_mtime)

    def list(self, folder: str, after: str = "") -> Iterator[Held]:
        """The objects below a folder whose keys come behind `after`, sorted by key."""
        keys = []
        with self._errors(folder):
            for place, _, names in os.walk(self._path(folder)):
                keys += [(Path(place) / name).relative_to(self.root).as_posix() for name in names]
        for key in sorted(keys):
            # File systems that are shared leave files of their own, such as `.nfs0001`.
            if key > after and is_key(key) and (held := self.head(key)) is not None:
                yield held

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; one that is not there is fine."""
        with self._errors(""):
            for key in keys:
                durable.unlink(self._path(key), inner=self._inner(key))

    def uploads(self, older_than: float) -> Sequence[str]:
        """A copy that was not finished is swept when the next one is made, so there are none to tell of."""
        return ()

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    @staticmethod
    def _inner(key: str) -> int:
        return key.count("/")

    @contextlib.contextmanager
    def _new_file(self) -> Iterator[durable.NewFile]:
        durable.make_folder(self.root / _TMP, inner=1)
        file = durable.NewFile(self.root / _TMP)
        try:
            yield file
        finally:
            file.discard()

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        with storage_errors(self.root):
            is_first = not self._marks or key == self._marks[0] or key.startswith("probe/")
            if not is_first and not any((self.root / mark).exists() for mark in self._marks):
                raise Absent(
                    f"{self.url}: there is no registry in that folder",
                    "mount it, or make one with registry init",
                )
            yield
