"""Contents: digests of files and folders, remembered while size, times and inode stay as they were."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from registry.store.digest import digest, hasher, is_digest
from registry.store.durable import make_folder, write_file
from registry.store.errors import Conflict, Corrupt, NotFound, StorageError, Unsupported, storage_errors
from registry.store.places import read_file
from registry.store.text import printable

FOLDER = "digests"
"""The folder of a registry in which digests are remembered."""

_AT_ONCE = 8 << 20
"""Bytes that are read and hashed at once."""

_LARGEST = 256 << 20
"""The most bytes that are kept about the files of one folder."""

_RECENT = 2.0
"""Seconds after a change in which a file may change again without another time stamp."""


class Content(NamedTuple):
    """A file or a folder as it was when it was looked at: the digest of its content, and what shows a change."""

    path: Path
    digest: str
    signature: str

    def is_unchanged(self) -> bool:
        """Whether nothing has been written there since, as far as sizes, times and inodes tell."""
        try:
            return _signature(_entries(self.path)) == self.signature
        except NotFound:
            return False


def content_of(path: Path, root: Path) -> Content:
    """The content of a file, or of a folder by the sorted relative names of its files.

    Args:
        root: the registry's folder, where digests are remembered.

    Raises:
        NotFound: if it is not there.
        Conflict: if it changes while it is read.
        Unsupported: if it is a device, a socket or a pipe.
        StorageError: if it cannot be read.
    """
    seen = Seen(root, os.path.abspath(path))
    known = seen.entries
    entries = _entries(path)
    found: dict[str, tuple[str, str]] = {}
    for name, state in entries.items():
        old = known.get(name)
        found[name] = old if old and old[0] == state else (state, _read(path / name if name else path))
    if found != known:
        if _entries(path) != entries:
            what = "the folder" if path.is_dir() else "the file"
            raise Conflict(
                f"{printable(str(path))}: {what} changed while it was read", "repeat when it is complete"
            )
        seen.keep(found)
    if path.is_dir():
        whole = digest(
            "".join(f"{name}\0{d}\n" for name, (_, d) in sorted(found.items())).encode(
                "utf-8", "surrogateescape"
            )
        )
    else:
        whole = found[""][1]
    return Content(path, whole, _signature(entries))


def mark(path: Path, status: os.stat_result | None = None) -> str:
    """Size, times and inode of a file.

    Raises:
        Unsupported: if it is no regular file.
    """
    status = status or path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise Unsupported(
            f"{printable(str(path))} is not a regular file; its content cannot be part of a key"
        )
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino} {status.st_dev}"


class Seen:
    """What was found out about some files, kept while sizes, times and inodes stay as they were.

    Args:
        root: the registry's folder.
        what: a text that stands for these files; the same text finds their entries again.

    Attributes:
        entries: for each file what `mark` gave, and its digest.
    """

    def __init__(self, root: Path, what: str) -> None:
        self._file = root / FOLDER / f"{digest(os.fsencode(what))[:32]}.json"
        self.entries = self._read()

    def keep(self, found: dict[str, tuple[str, str]]) -> None:
        """Keep what was found, except of files that have changed just now: their times may not show the next change.

        Args:
            found: as `entries`.
        """
        now = time.time_ns()
        settled = {
            name: entry
            for name, entry in found.items()
            if now - max(map(int, entry[0].split()[1:3])) > _RECENT * 1e9
        }
        if settled and os.access(self._file.parent.parent, os.W_OK):
            with storage_errors(self._file):
                make_folder(self._file.parent, inner=1)
                tmp = self._file.parent.parent / "tmp"
                write_file(self._file, json.dumps(settled).encode(), folder=tmp, inner=1)

    def _read(self) -> dict[str, tuple[str, str]]:
        try:
            found = json.loads(read_file(self._file, _LARGEST, inner=1))
            return {
                name: (state, known)
                for name, (state, known) in found.items()
                if isinstance(state, str) and isinstance(known, str) and is_digest(known)
            }
        except (OSError, ValueError, AttributeError, TypeError, RecursionError, Corrupt):
            # What was kept only saves time, so the files are read again.
            return {}


def _signature(entries: dict[str, str]) -> str:
    return digest(
        "".join(f"{name}\0{state}\n" for name, state in sorted(entries.items())).encode(
            "utf-8", "surrogateescape"
        )
    )


def _entries(path: Path) -> dict[str, str]:
    """Size, times and inode of a file (under the name ""), or of all files in a folder by relative name."""
    try:
        status = path.stat()
        if not stat.S_ISDIR(status.st_mode):
            return {"": mark(path, status)}
        return {os.path.relpath(found, path): mark(found, status) for found, status in _walk(path)}
    except FileNotFoundError as error:
        raise NotFound(f"{printable(str(error.filename or path))}: there is no such file or folder") from None
    except OSError as error:
        raise StorageError(f"{printable(str(path))}: {error.strerror}", "ask its owner for access") from error


def _walk(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for folder, names, files in os.walk(path, onerror=_raise):
        names.sort()
        for name in files:
            found = Path(folder, name)
            yield found, found.stat()


def _raise(error: OSError) -> None:
    raise error


def _read(path: Path) -> str:
    hashed = hasher()
    try:
        # The file is not mapped: one that shrinks meanwhile would kill the process.
        with path.open("rb", buffering=0) as file:
            while data := file.read(_AT_ONCE):
                hashed.update(data)
        return hashed.hexdigest()
    except OSError as error:
        raise StorageError(f"{printable(str(path))}: {error.strerror}") from error
