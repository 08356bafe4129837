"""Places on the disk: opened without following links, asked about, and kept apart from a user's own files.

A registry may come from somebody else. So its folders are opened one by one, without following links. An argument
`inner` says how many of the last folders of a path belong to the registry. The folders before them are the user's own,
and links among these are followed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from registry.store.errors import Corrupt, Invalid, Missing, storage_errors
from registry.store.text import printable

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_READ = 64 << 20
_SETTLED = 100_000_000
"""Age in nanoseconds of a file's times from which on a change is sure to give others: they count in steps of some
milliseconds."""

_SETTINGS = "registry.toml"
_FOLDERS = frozenset(("journal", "manifests", "packs", "tmp"))
_FILES = ("catalog.sqlite", _SETTINGS)
"""What a registry keeps to itself: its folders, and how the names of its files begin."""

_LOCAL = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "tmpfs", "ramfs", "overlay", "jfs")
)
"""File systems of one machine: what one program writes, another sees at once, the time of the change included."""


@contextlib.contextmanager
def opened_folder(path: Path, inner: int = 0) -> Iterator[int]:
    """Open a folder without following links to it.

    Args:
        inner: how many of the last parts of the path belong to the registry; links among the folders before
            them are followed.

    Raises:
        Corrupt: if one of these is something else than a folder.
    """
    # Strings, as this is called very often.
    names = str(path).rsplit("/", inner) if inner else [str(path)]
    place = names.pop(0) or "/" if len(names) > inner else "."
    fd = os.open(place, _FOLDER)
    try:
        for name in names:
            place = f"{place}/{name}"
            below = _open_inner_folder(name, fd, place)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


def _open_inner_folder(name: str, folder: int, place: str) -> int:
    try:
        return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            error.filename = place
            raise
        raise Corrupt(
            f"{place}: is not a folder but {_kind(os.stat(name, dir_fd=folder, follow_symlinks=False))}, which a "
            "registry does not have there; nothing was changed"
        ) from None


def _kind(status: os.stat_result) -> str:
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(status.st_mode), "a device")


def open_file(path: Path, flags: int, *, inner: int = 0, mode: int = 0o666) -> int:
    """Open a regular file without following links.

    Args:
        inner: how many of the folders that it is in belong to the registry.

    Raises:
        Corrupt: if there is no regular file of this name.
        FileNotFoundError: if there is nothing.
    """
    with opened_folder(path.parent, inner) as folder:
        try:
            fd = os.open(path.name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode, dir_fd=folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                refuse_odd(os.stat(path.name, dir_fd=folder, follow_symlinks=False), path)
            error.filename = str(path)
            raise
    try:
        refuse_odd(os.fstat(fd), path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def refuse_odd(status: os.stat_result, path: Path) -> None:
    """Check that something is a regular file.

    Raises:
        Corrupt: if it is anything else.
    """
    if not stat.S_ISREG(status.st_mode):
        raise Corrupt(f"{path}: is {_kind(status)}, not a regular file")


def read_file(path: Path, limit: int, *, inner: int = 0) -> bytes:
    """The first bytes of a small file of the registry, up to a limit.

    Raises:
        Corrupt, FileNotFoundError: as `open_file`.
    """
    fd = open_file(path, os.O_RDONLY, inner=inner)
    try:
        parts = []
        while limit > 0 and (part := os.read(fd, limit)):
            parts.append(part)
            limit -= len(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def read_end(path: Path, limit: int, *, inner: int = 0) -> bytes:
    """The last bytes of a file of the registry, up to a limit.

    Raises:
        Corrupt, FileNotFoundError: as `open_file`.
    """
    fd = open_file(path, os.O_RDONLY, inner=inner)
    try:
        return os.pread(fd, limit, max(0, os.fstat(fd).st_size - limit))
    finally:
        os.close(fd)


def status_of(path: Path, *, inner: int = 0) -> os.stat_result | None:
    """What the system knows of a file, links not followed; None if there is nothing."""
    try:
        with opened_folder(path.parent, inner) as folder:
            return os.stat(path.name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def names_in(path: Path, *, inner: int = 0) -> list[str]:
    """The names in a folder, sorted; none if it is not there."""
    try:
        with opened_folder(path, inner) as folder:
            return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


class open_regular:
    """Open a file for reading, refusing links, devices and pipes; a context manager.

    Args:
        inner: how many of the folders that it is in belong to a registry, which has no links.

    Raises:
        Corrupt: if there is no regular file at `path`.
        StorageError: if the system refuses.
    """

    def __init__(self, path: Path, *, inner: int = 0) -> None:
        self._fd = -1
        with storage_errors(path):
            try:
                self._fd = open_file(path, os.O_RDONLY, inner=inner)
            except FileNotFoundError:
                raise Missing(f"{path}: the file is missing") from None

    def __enter__(self) -> open_regular:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def fileno(self) -> int:
        """The file's descriptor."""
        return self._fd

    def read(self, size: int) -> bytes:
        """The next bytes, up to `size`; fewer only at the end of the file."""
        parts = []
        while size > 0:
            part = os.read(self._fd, min(size, _READ))
            if not part:
                break
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


class OpenFiles:
    """Regular files that are opened once each, and read by several threads; a context manager."""

    def __init__(self) -> None:
        self._open: dict[str, open_regular] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.__exit__()

    def read(
        self, path: Path, size: int, start: int, end: int, buffers: list[memoryview], *, inner: int = 0
    ) -> bool:
        """Fill buffers with the bytes of a file from `start` to `end`.

        Args:
            size: how many bytes the file must have.
            buffers: writable, and as long together as what is read.
            inner: as for `open_regular`.

        Returns:
            False if the file ends before.

        Raises:
            Corrupt: if the file does not have `size` bytes.
            StorageError: if the system refuses.
        """
        fd = self.open(path, size, inner=inner)
        with storage_errors(path):
            while start < end:
                count = os.preadv(fd, buffers, start)
                if count == 0:
                    return False
                start += count
                buffers = _after(buffers, count) if start < end else []
        return True

    def open(self, path: Path, size: int, *, inner: int = 0) -> int:
        """The descriptor of a file, which is opened unless it is open.

        Raises:
            Corrupt: if the file does not have `size` bytes.
            StorageError: if the system refuses.
        """
        name = str(path)
        with self._lock:
            if name not in self._open:
                file = open_regular(path, inner=inner)
                actual = os.fstat(file.fileno()).st_size
                if actual != size:
                    file.__exit__()
                    raise Corrupt(f"{path}: has {actual} bytes instead of {size}")
                self._open[name] = file
            return self._open[name].fileno()


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left to fill after a read that filled `count` bytes."""
    for i, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[i + 1 :]]
        count -= len(buffer)
    return []


class FileState(NamedTuple):
    """What the system records about a file; every change to the bytes changes it.

    Attributes:
        modified, changed: times of the last change of the bytes, and of anything, in nanoseconds since the epoch.
        is_settled: whether these times are so old that a change from now on gives others.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int
    is_settled: bool


def state_of(path: Path, *, inner: int = 0) -> FileState | None:
    """What the system records about a file; None if there is nothing."""
    status = status_of(path, inner=inner)
    if status is None:
        return None
    return FileState(
        device=status.st_dev,
        inode=status.st_ino,
        size=status.st_size,
        modified=status.st_mtime_ns,
        changed=status.st_ctime_ns,
        is_settled=max(status.st_mtime_ns, status.st_ctime_ns) < time.time_ns() - _SETTLED,
    )


def refuse_inside(path: Path) -> None:
    """Refuse a place for a user's own file among the files that a registry keeps to itself.

    Args:
        path: without links.

    Raises:
        Invalid: if it is such a place.
    """
    for folder in path.parents:
        name = path.relative_to(folder).parts[0]
        if (name in _FOLDERS or name.startswith(_FILES)) and (folder / _SETTINGS).is_file():
            raise Invalid(f"{printable(str(path))}: {name} belongs to the registry", "choose another place")


def is_local(path: Path) -> bool:
    """Whether a folder is on a file system that is known to belong to this machine alone."""
    try:
        return _file_system(os.path.realpath(path), os.stat(path).st_dev) in _LOCAL
    except OSError:
        return False


@functools.lru_cache(maxsize=64)
def _file_system(place: str, _device: int) -> str:
    """The kind of file system; empty if it cannot be told.

    State of the process: the answers are kept. `_file_system.cache_clear()` forgets them.
    """
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            best, kind = "", ""
            for line in mounts:
                left, _, right = line.partition(" - ")
                point = left.split(" ")[4].encode().decode("unicode_escape", "replace")
                inside = point == "/" or place == point or place.startswith(point + "/")
                if inside and len(point) >= len(best):
                    best, kind = point, right.split(" ")[0]
        return kind
    except (OSError, IndexError):
        return ""
