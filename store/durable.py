"""Every step that must survive a power cut: write, fsync, rename, unlink, mkdir.

Nothing else in this package changes a file of the store. The steps go through the module's `disk`, so that a
test can record them, fail one of them, or rebuild the state that a crash after any of them would leave.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from registry.store.errors import Corrupt, StorageError

Buffer = bytes | bytearray | memoryview

WRITEBACK = 4 << 20
"""Bytes after which a long write asks the kernel to start writing back, so that the final fsync is short."""

_CHUNK = 4 << 20
_SYNC_FILE_RANGE_WRITE = 2


class Disk:
    """The durable steps, as the operating system offers them."""

    def write(self, fd: int, path: Path, data: memoryview) -> int:
        return os.write(fd, data)

    def write_at(self, fd: int, path: Path, data: memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def sync(self, fd: int, path: Path) -> None:
        os.fsync(fd)

    def sync_folder(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)

    def truncate(self, fd: int, path: Path, size: int) -> None:
        os.ftruncate(fd, size)


disk = Disk()


class NewFile:
    """A file that is being written and does not exist under its own name yet.

    Either `publish` or `discard` ends it; after an error from any method only `discard` may follow.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"{host()}-{os.getpid()}-{os.urandom(16).hex()}"
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._position = 0
        self._written_back = 0

    def skip_to(self, offset: int) -> None:
        """Leave the bytes before `offset` for a later `write_at`."""
        self._position = self._written_back = os.lseek(self._fd, offset, os.SEEK_SET)

    def write(self, data: Buffer) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            count = disk.write(self._fd, self.path, rest[:_CHUNK])
            rest = rest[count:]
            self._position += count
            if self._position - self._written_back >= WRITEBACK:
                _start_writeback(self._fd, self._written_back, self._position - self._written_back)
                self._written_back = self._position

    def write_at(self, data: Buffer, offset: int) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            count = disk.write_at(self._fd, self.path, rest, offset)
            rest = rest[count:]
            offset += count

    def publish(self, target: Path, head: Buffer, *, read_only: bool = True) -> None:
        """Make the file durable under its final name, replacing what is there.

        The size and the first bytes are read back first: a disk that claims to have written and has not is
        found here, while the data is still in memory.

        Raises:
            StorageError: if the file does not hold what was written.
        """
        status = os.fstat(self._fd)
        if status.st_size != self._position or os.pread(self._fd, len(head), 0) != bytes(head):
            raise StorageError(
                f"{self.path}: the disk reports success but did not keep what was written "
                f"({status.st_size} of {self._position} bytes); check the disk, nothing was saved"
            )
        if read_only:
            os.fchmod(self._fd, stat.S_IMODE(status.st_mode) & ~0o222)
        disk.sync(self._fd, self.path)
        os.close(self._fd)
        self._fd = -1
        make_folder(target.parent)
        disk.rename(self.path, target)
        disk.sync_folder(target.parent)

    def discard(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        with contextlib.suppress(OSError):
            disk.unlink(self.path)


def host() -> str:
    """This machine's name, as it stands in the names of temporary files."""
    return os.uname().nodename[:64]


def is_gone(machine: str, pid: str) -> bool:
    """Whether a process is known to have ended: one of this machine that is not there any more."""
    if machine != host() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def refuse_links(root: Path, *paths: Path) -> None:
    """Check that no path leaves the folder `root`: none of what is on the way below it is a link.

    Raises:
        Corrupt: naming the link.
    """
    for path in paths:
        place = root
        for part in path.relative_to(root).parts:
            place = place / part
            if place.is_symlink():
                raise Corrupt(
                    f"{place}: is a symbolic link, which a registry has none of; nothing was changed"
                )


def make_folder(path: Path) -> None:
    """Create a folder, and durably its entry in the parent, unless it is there."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with contextlib.suppress(FileExistsError):
        disk.mkdir(path)
    disk.sync_folder(path.parent)


def write_file(path: Path, data: bytes, *, folder: Path | None = None, read_only: bool = False) -> None:
    """Write a small file whole or not at all; its mode follows the umask.

    Args:
        folder: where the file lies until it is complete. Without it the file is a user's own: it lies beside
            its target meanwhile, and a symbolic link at `path` is followed, not replaced.

    Raises:
        StorageError: if the system refuses, with the earlier file untouched.
    """
    target = path if folder else Path(os.path.realpath(path))
    with storage_errors(path):
        twice_on_io_error(lambda: _write_once(target, data, folder or target.parent, read_only))


def _write_once(target: Path, data: bytes, folder: Path, read_only: bool) -> None:
    file = NewFile(folder)
    try:
        file.write(data)
        file.publish(target, data, read_only=read_only)
    except BaseException:
        file.discard()
        raise


def append(path: Path, data: bytes) -> None:
    """Add one record to the end of a file, durably; on an error the file is as long as before."""
    fresh = not path.exists()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        before = os.fstat(fd).st_size
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[disk.write(fd, path, rest) :]
            if os.fstat(fd).st_size != before + len(data):
                raise StorageError(f"{path}: the disk reports success but did not keep what was written")
            disk.sync(fd, path)
        except BaseException:
            with contextlib.suppress(OSError):
                disk.truncate(fd, path, before)
                disk.sync(fd, path)
            raise
    finally:
        os.close(fd)
    if fresh:
        disk.sync_folder(path.parent)


def truncate(path: Path, size: int) -> None:
    """Cut a file back to `size` bytes, durably."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        disk.truncate(fd, path, size)
        disk.sync(fd, path)
    finally:
        os.close(fd)


def unlink(path: Path) -> bool:
    """Remove a file; false if it was not there."""
    try:
        disk.unlink(path)
    except FileNotFoundError:
        return False
    return True


def twice_on_io_error(step: Callable[[], None]) -> None:
    """Run a step that writes a whole file, and once more from memory if the disk reports an I/O error.

    The kernel drops dirty pages after a failed fsync, so the same descriptor must not be synced again.
    """
    try:
        step()
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        step()


_ADVICE = {
    errno.ENOSPC: "no space left on the device; free some and repeat",
    errno.EDQUOT: "the disk quota is used up; free some space and repeat",
    errno.EFBIG: "the file would exceed the allowed file size; raise the limit (ulimit -f) and repeat",
    errno.EROFS: "the file system is read-only; use another --root or remount it",
    errno.EMFILE: "too many open files; raise the limit (ulimit -n) and repeat",
    errno.EIO: "the disk reports an I/O error; check the disk",
}


@contextlib.contextmanager
def storage_errors(path: Path | str) -> Iterator[None]:
    """Turn an operating system's refusal into a `StorageError` that names the file and what to do."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        if error.errno in (errno.EACCES, errno.EPERM):
            advice = f"permission denied{_owner(Path(os.fsdecode(where)))}; ask its owner for access"
        else:
            advice = _ADVICE.get(error.errno or 0) or (error.strerror or str(error))
        raise StorageError(f"{os.fsdecode(where)}: {advice}") from error


def _owner(path: Path) -> str:
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            owner = place.stat().st_uid
            return f" ({place} belongs to user {owner}, this process runs as {os.geteuid()})"
    return ""


def _start_writeback(fd: int, offset: int, size: int) -> None:
    sync = _sync_file_range()
    if sync is not None:
        sync(fd, offset, size, _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function
