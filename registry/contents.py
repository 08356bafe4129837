"""Contents: digests of files and folders, remembered while size, times and inode stay as they were."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from registry.store.digest import digest, is_digest
from registry.store.durable import make_folder, storage_errors, write_file
from registry.store.errors import Conflict, NotFound, StorageError, Unsupported
from registry.store.text import printable

FOLDER = "digests"
_AT_ONCE = 8 << 20
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
    memory = root / FOLDER / f"{digest(os.fsencode(os.path.abspath(path)))[:32]}.json"
    known = _remembered(memory)
    entries = _entries(path)
    found: dict[str, tuple[str, str]] = {}
    for name, mark in entries.items():
        old = known.get(name)
        found[name] = old if old and old[0] == mark else (mark, _read(path / name if name else path))
    if found != known:
        if _entries(path) != entries:
            what = "the folder" if path.is_dir() else "the file"
            raise Conflict(
                f"{printable(str(path))}: {what} changed while it was read; repeat when it is complete"
            )
        _remember(memory, found)
    if path.is_dir():
        whole = digest(
            "".join(f"{name}\0{d}\n" for name, (_, d) in sorted(found.items())).encode(
                "utf-8", "surrogateescape"
            )
        )
    else:
        whole = found[""][1]
    return Content(path, whole, _signature(entries))


def _signature(entries: dict[str, str]) -> str:
    return digest(
        "".join(f"{name}\0{mark}\n" for name, mark in sorted(entries.items())).encode(
            "utf-8", "surrogateescape"
        )
    )


def _entries(path: Path) -> dict[str, str]:
    """Size, times and inode of a file (under the name ""), or of all files in a folder by relative name."""
    try:
        status = path.stat()
        if not stat.S_ISDIR(status.st_mode):
            return {"": _mark(path, status)}
        return {os.path.relpath(found, path): _mark(found, status) for found, status in _walk(path)}
    except FileNotFoundError as error:
        raise NotFound(f"{printable(str(error.filename or path))}: there is no such file or folder") from None
    except OSError as error:
        raise StorageError(f"{printable(str(path))}: {error.strerror}; ask its owner for access") from error


def _walk(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for folder, names, files in os.walk(path, onerror=_raise):
        names.sort()
        for name in files:
            found = Path(folder, name)
            yield found, found.stat()


def _raise(error: OSError) -> None:
    raise error


def _mark(path: Path, status: os.stat_result) -> str:
    if not stat.S_ISREG(status.st_mode):
        raise Unsupported(f"{printable(str(path))} is no regular file; its content cannot be part of a key")
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino} {status.st_dev}"


def _read(path: Path) -> str:
    hasher = blake3(max_threads=blake3.AUTO)
    try:
        with path.open(
            "rb", buffering=0
        ) as file:  # mapped, a file that shrinks meanwhile would kill the process
            while data := file.read(_AT_ONCE):
                hasher.update(data)
        return hasher.hexdigest()
    except OSError as error:
        raise StorageError(f"{printable(str(path))}: {error.strerror}") from error


def _remembered(memory: Path) -> dict[str, tuple[str, str]]:
    try:
        found = json.loads(memory.read_bytes())
        return {
            name: (mark, known)
            for name, (mark, known) in found.items()
            if isinstance(mark, str) and isinstance(known, str) and is_digest(known)
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # it only saves time


def _remember(memory: Path, found: dict[str, tuple[str, str]]) -> None:
    """Keep digests of files that have not changed just now; a time stamp would not show the next change."""
    now = time.time_ns()
    settled = {
        name: entry
        for name, entry in found.items()
        if now - max(map(int, entry[0].split()[1:3])) > _RECENT * 1e9
    }
    if settled and os.access(memory.parent.parent, os.W_OK):
        with storage_errors(memory):
            make_folder(memory.parent)
            write_file(memory, json.dumps(settled).encode())
