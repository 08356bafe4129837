"""Every step that must survive a power cut: write, fsync, rename, unlink, mkdir.

Nothing else in this package changes a file of the store. The steps go through the module's `disk`, so that a
test can record them, fail one of them, or rebuild the state that a crash after any of them would leave. As in
`registry.store.places`, `inner` says how many of the last folders of a path belong to the registry.

The steps stand in one file, so that a test can see that no other module changes files.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from registry.store.errors import Corrupt, StorageError, storage_errors
from registry.store.places import names_in, open_file, opened_folder, refuse_inside, status_of

Buffer = bytes | bytearray | memoryview

WRITEBACK = 4 << 20
"""Bytes after which a long write asks the kernel to start writing back, so that the final fsync is short."""

_CHUNK = 4 << 20
_SYNC_FILE_RANGE_WRITE = 2
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class Disk:
    """The durable steps, as the operating system offers them.

    `path` and its like say what a step is about. `folder` is the open folder that the file is in, where there is one.
    """

    @functools.cached_property
    def safe_folders(self) -> set[tuple[int, int]]:
        """Device and inode of the folders whose names this process has made durable."""
        return set()

    def write(self, fd: int, path: Path, data: memoryview) -> int:
        """Write some of the bytes at the file's position, and return how many."""
        return os.write(fd, data)

    def write_at(self, fd: int, path: Path, data: memoryview, offset: int) -> int:
        """Write some of the bytes at an offset, and return how many."""
        return os.pwrite(fd, data, offset)

    def sync(self, fd: int, path: Path) -> None:
        """Make a file's bytes durable."""
        os.fsync(fd)

    def sync_folder(self, path: Path, folder: int) -> None:
        """Make the names in a folder durable."""
        os.fsync(folder)

    def rename(self, source: Path, target: Path, source_folder: int, target_folder: int) -> None:
        """Give a file another name; what has that name is replaced."""
        os.replace(source.name, target.name, src_dir_fd=source_folder, dst_dir_fd=target_folder)

    def link(self, source: Path, target: Path, source_folder: int, target_folder: int) -> None:
        """Give a file a second name, which no file has yet."""
        os.link(source.name, target.name, src_dir_fd=source_folder, dst_dir_fd=target_folder)

    def unlink(self, path: Path, folder: int) -> None:
        """Remove a file."""
        os.unlink(path.name, dir_fd=folder)

    def mkdir(self, path: Path, folder: int) -> None:
        """Create a folder."""
        os.mkdir(path.name, dir_fd=folder)

    def truncate(self, fd: int, path: Path, size: int) -> None:
        """Cut an open file back to `size` bytes."""
        os.ftruncate(fd, size)


disk = Disk()
"""State of the process: what the steps go through, and with it the folders that are known to be durable. Tests put a
`Disk` of their own in its place."""


class Moved(Exception):
    """A file that was being written is not under its name any more. Never reaches users."""


class NewFile:
    """A file that is being written and does not exist under its own name yet.

    While it is written it is locked, so that others can tell that its writer lives. Either `publish` or `discard` ends
    it; after an error from any method only `discard` may follow.

    Args:
        folder: where it lies meanwhile.
        inner: how many of the last folders of that path belong to the registry.
    """

    def __init__(self, folder: Path, *, inner: int = 1) -> None:
        self._inner = inner
        while True:
            self.path = folder / f"{host()}-{os.getpid()}-{os.urandom(16).hex()}"
            try:
                self.fd = open_file(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, inner=inner)
            except FileNotFoundError:
                # A copy of a registry may lack the folder, where it was empty.
                if not inner or status_of(folder, inner=inner - 1) is not None:
                    raise
                with opened_folder(folder.parent, inner - 1) as above, contextlib.suppress(FileExistsError):
                    disk.mkdir(folder, above)
                continue
            lock(self.fd)
            # Nobody took it for a dead writer's before it was locked.
            if self._is_there():
                break
            os.close(self.fd)
        self._position = 0
        self._written_back = 0
        self._dirty = 0

    def share(self, like: Path) -> None:
        """Give the file the mode of another one, and its owner where that is allowed, whatever the umask."""
        status = status_of(like)
        if status is None:
            return
        with contextlib.suppress(PermissionError):
            os.fchmod(self.fd, stat.S_IMODE(status.st_mode) & 0o666)
            if os.geteuid() == 0:
                os.fchown(self.fd, status.st_uid, status.st_gid)

    def skip_to(self, offset: int) -> None:
        """Leave the bytes before `offset` for a later `write_at`."""
        self._position = self._written_back = os.lseek(self.fd, offset, os.SEEK_SET)

    def write(self, data: Buffer) -> None:
        """Write behind what was written before."""
        rest = memoryview(data).cast("B")
        while rest:
            count = disk.write(self.fd, self.path, rest[:_CHUNK])
            rest = rest[count:]
            self._position += count
            if self._position - self._written_back >= WRITEBACK:
                _start_writeback(self.fd, self._written_back, self._position - self._written_back)
                self._written_back = self._position

    def write_at(self, data: Buffer, offset: int) -> None:
        """Write at an offset; several threads may, each in a place of its own. `skip_to` says where the file ends."""
        rest = memoryview(data).cast("B")
        while rest:
            count = disk.write_at(self.fd, self.path, rest[:_CHUNK], offset)
            rest = rest[count:]
            offset += count
            self._dirty += count
            if self._dirty >= WRITEBACK:
                self._dirty = 0
                _start_writeback(self.fd, 0, 0)

    def sync(self, head: Buffer, *, read_only: bool = True) -> None:
        """Make the bytes durable.

        The size and the first bytes are read back first: a disk that claims to have written and has not is
        found here, while the data is still in memory.

        Raises:
            StorageError: if the file does not hold what was written.
        """
        self.finish(head, read_only=read_only)
        disk.sync(self.fd, self.path)

    def finish(self, head: Buffer, *, read_only: bool) -> None:
        """As `sync`, but a power cut may still take the bytes."""
        status = os.fstat(self.fd)
        if status.st_size != self._position or os.pread(self.fd, len(head), 0) != bytes(head):
            raise StorageError(
                f"{self.path}: the disk reports success but did not keep what was written "
                f"({status.st_size} of {self._position} bytes)",
                "check the disk, nothing was saved",
            )
        if read_only:
            os.fchmod(self.fd, stat.S_IMODE(status.st_mode) & ~0o222)

    def publish(self, target: Path, *, inner: int = 2, is_durable: bool = True) -> None:
        """Give the file its final name, in the place of a file that has it.

        Args:
            inner: how many of the last folders of the target's path belong to the registry.
            is_durable: whether its name is made durable.

        Raises:
            Moved: if another process has removed the file meanwhile.
        """
        make_folder(target.parent, inner=inner, is_durable=is_durable)
        with (
            opened_folder(self.path.parent, self._inner) as source_folder,
            opened_folder(target.parent, inner) as target_folder,
        ):
            if not self._is_there():
                raise Moved
            try:
                disk.rename(self.path, target, source_folder, target_folder)
            except FileNotFoundError:
                raise Moved from None
            if is_durable:
                disk.sync_folder(target.parent, target_folder)
        os.close(self.fd)
        self.fd = -1

    def publish_new(self, target: Path, *, inner: int = 2) -> bool:
        """Give the file its final name, durably, unless a file has it: then false, and only `discard` may follow.

        Args:
            inner: how many of the last folders of the target's path belong to the registry.
        """
        make_folder(target.parent, inner=inner)
        with (
            opened_folder(self.path.parent, self._inner) as source_folder,
            opened_folder(target.parent, inner) as target_folder,
        ):
            try:
                disk.link(self.path, target, source_folder, target_folder)
            except FileExistsError:
                return False
            disk.sync_folder(target.parent, target_folder)
        return True

    def discard(self) -> None:
        """Remove the file; what `publish_new` made stays."""
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                if self._is_there():
                    unlink(self.path, inner=self._inner)
            os.close(self.fd)
            self.fd = -1

    def _is_there(self) -> bool:
        status, own = status_of(self.path, inner=self._inner), os.fstat(self.fd)
        return status is not None and (status.st_dev, status.st_ino) == (own.st_dev, own.st_ino)


def lock(fd: int, *, seconds: float = 60.0) -> bool:
    """Lock an open file for this process; closing it ends the lock.

    Locks spare work and guard against a second catalog; what is promised does not rest on them, as some network file
    systems have none.

    Args:
        seconds: how long to wait for another process at most.

    Returns:
        Whether it is locked now, or locks are not supported there.
    """
    end = time.monotonic() + seconds
    pause = 0.000_5
    while True:
        if try_lock(fd):
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def unlock(fd: int) -> None:
    """End a lock, also where a process that was forked meanwhile has the file open, as a worker of a loader may."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)


@contextlib.contextmanager
def alone(path: Path, *, seconds: float, inner: int = 1) -> Iterator[None]:
    """Keep other processes from the same work, which a file of the registry stands for; it is removed behind the block.

    Args:
        seconds: how long to wait for another process at most. The work is done all the same then.
        inner: how many of the last folders that the file is in belong to the registry.
    """
    fd = open_file(path, os.O_RDWR | os.O_CREAT, inner=inner)
    try:
        lock(fd, seconds=seconds)
        try:
            yield
        finally:
            unlink(path, inner=inner)
            unlock(fd)
    finally:
        os.close(fd)


def try_lock(fd: int) -> bool:
    """Lock an open file, unless another process has locked it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        return error.errno not in _HELD


def locks_work(path: Path, *, inner: int = 0) -> bool:
    """Whether a lock on a file that is locked here keeps others out; on some network file systems none does."""
    try:
        fd = open_file(path, os.O_RDONLY, inner=inner)
    except FileNotFoundError:
        return True
    try:
        return not try_lock(fd)
    finally:
        os.close(fd)


def left_behind(folder: Path, *, inner: int = 1) -> Iterator[tuple[Path, os.stat_result]]:
    """The files in a folder that no writer holds. Each is locked until the next one is asked for.

    Args:
        inner: how many of the last folders of the path belong to the registry.
    """
    for name in names_in(folder, inner=inner):
        path = folder / name
        status = status_of(path, inner=inner)
        if status is None:
            continue
        try:
            fd = open_file(path, os.O_RDONLY, inner=inner)
        except (FileNotFoundError, Corrupt):
            continue
        try:
            if try_lock(fd):
                yield path, status
        finally:
            os.close(fd)


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


def make_folder(path: Path, *, inner: int = 0, is_durable: bool = True) -> None:
    """Create a folder unless it is there, and make its name durable.

    Another process may have made it and be about to sync its parent, or have been killed before it could. So the
    parents within the registry, and the one of the registry's own folder, are synced once in each process. That makes the
    folders that lie beside it durable as well.

    Args:
        inner: how many of the last parts of the path belong to the registry.
        is_durable: whether its name is made durable.
    """
    is_there = False
    with contextlib.suppress(FileNotFoundError), opened_folder(path, inner) as folder:
        if not is_durable or _identity(folder) in disk.safe_folders:
            return
        is_there = True
    above = max(inner - 1, 0)
    if inner or not is_there:
        make_folder(path.parent, inner=above, is_durable=is_durable)
    beside: set[tuple[int, int]] = set()
    try:
        with opened_folder(path.parent, above) as folder:
            if not is_there:
                with contextlib.suppress(FileExistsError):
                    disk.mkdir(path, folder)
            if not is_durable:
                with opened_folder(path, inner) as made:
                    # It may have the number of one that was removed.
                    disk.safe_folders.discard(_identity(made))
                return
            if inner and is_there:
                beside = _folders_in(folder)
            disk.sync_folder(path.parent, folder)
    except PermissionError:
        # Only the folder that the registry lies in may be somebody else's.
        if inner or not is_there:
            raise
    with opened_folder(path, inner) as folder:
        disk.safe_folders |= beside | {_identity(folder)}


def write_file(
    path: Path,
    data: bytes,
    *,
    folder: Path | None = None,
    inner: int = 0,
    read_only: bool = False,
    is_durable: bool = True,
) -> None:
    """Write a small file whole or not at all; its mode follows the umask.

    Args:
        folder: a folder of the registry, where the file lies until it is complete. Without it the file is a user's
            own: it lies beside its target meanwhile, and a symbolic link at `path` is followed, not replaced.
        inner: how many of the last folders that it is in belong to the registry.
        is_durable: false where the bytes are safe elsewhere: a power cut may take the file back, or damage it.

    Raises:
        StorageError: if the system refuses, with the earlier file untouched.
    """
    target = path if folder else Path(os.path.realpath(path))
    if not folder:
        refuse_inside(target)

    def write() -> None:
        file = NewFile(folder or target.parent, inner=1 if folder else 0)
        try:
            file.write(data)
            if is_durable:
                file.sync(data, read_only=read_only)
            else:
                file.finish(data, read_only=read_only)
            file.publish(target, inner=inner, is_durable=is_durable)
        except BaseException:
            file.discard()
            raise

    with storage_errors(path):
        again_on_trouble(write)


def note(path: Path, data: bytes, *, folder: Path, like: Path | None = None, inner: int = 0) -> None:
    """Write a small file whole or not at all, such as for other programs; a power cut may take it back, or damage it.

    Args:
        folder: a folder of the registry, where the file lies until it is complete.
        like: a file whose mode and owner this one gets, so that the same users can read it.
        inner: how many of the last folders that it is in belong to the registry.
    """
    file = NewFile(folder)
    try:
        if like is not None:
            file.share(like)
        file.write(data)
        file.publish(path, inner=inner, is_durable=False)
    except BaseException:
        file.discard()
        raise


def append(path: Path, data: bytes, *, inner: int = 0) -> None:
    """Add one record to the end of a file, durably; on an error the file is as long as before."""
    fresh = status_of(path, inner=inner) is None
    fd = open_file(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, inner=inner)
    try:
        before = os.fstat(fd).st_size
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[disk.write(fd, path, rest) :]
            if os.fstat(fd).st_size != before + len(data) or os.pread(fd, len(data), before) != data:
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
        sync_folder(path.parent, inner=inner)


def extend(path: Path, lines: bytes, *, inner: int = 0) -> None:
    """Add whole lines to the end of a file, which is made if need be. They survive the process, not a power cut.

    Where a line was torn before, the new ones begin on a line of their own.
    """
    fd = open_file(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, inner=inner)
    try:
        end = os.fstat(fd).st_size
        if end and os.pread(fd, 1, end - 1) != b"\n":
            lines = b"\n" + lines
        rest = memoryview(lines)
        while rest:
            rest = rest[disk.write(fd, path, rest) :]
    finally:
        os.close(fd)


def truncate(path: Path, size: int, *, inner: int = 0) -> None:
    """Cut a file back to `size` bytes, durably."""
    fd = open_file(path, os.O_RDWR, inner=inner)
    try:
        disk.truncate(fd, path, size)
        disk.sync(fd, path)
    finally:
        os.close(fd)


def rename(source: Path, target: Path, *, inner: int = 0) -> None:
    """Give a file another name in its folder, durably."""
    with opened_folder(source.parent, inner) as folder:
        disk.rename(source, target, folder, folder)
        disk.sync_folder(source.parent, folder)


def sync_folder(path: Path, *, inner: int = 0) -> None:
    """Make the names in a folder durable."""
    with opened_folder(path, inner) as folder:
        disk.sync_folder(path, folder)


def mark_used(path: Path, *, inner: int = 0) -> None:
    """Set a file's times to now, which tell how long ago it was used."""
    with contextlib.suppress(OSError), opened_folder(path.parent, inner) as folder:
        os.utime(path.name, dir_fd=folder, follow_symlinks=False)


def unlink(path: Path, *, inner: int = 0) -> bool:
    """Remove a file; false if it was not there."""
    try:
        with opened_folder(path.parent, inner) as folder:
            disk.unlink(path, folder)
    except FileNotFoundError:
        return False
    return True


def remove_tree(path: Path) -> None:
    """Remove a folder of a user that this program has made, with all that is in it; links are not followed."""
    shutil.rmtree(path, ignore_errors=True)


def again_on_trouble(step: Callable[[], None]) -> None:
    """Run a step that writes a whole file, and once more from memory if the disk reports an I/O error.

    The kernel drops dirty pages after a failed fsync, so the same descriptor must not be synced again. A file that
    another process removes while it is written, as may happen where locks do nothing, is written again, too.
    """
    try:
        step()
    except Moved:
        _last_try(step)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        _last_try(step)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _folders_in(fd: int) -> set[tuple[int, int]]:
    """The identities of the folders in an open folder."""
    device = os.fstat(fd).st_dev
    with os.scandir(fd) as found:
        return {(device, one.inode()) for one in found if one.is_dir(follow_symlinks=False)}


def _last_try(step: Callable[[], None]) -> None:
    try:
        step()
    except Moved:
        raise StorageError(
            "another program removes temporary files while they are written", "stop it, and repeat"
        ) from None


def _start_writeback(fd: int, offset: int, size: int) -> None:
    sync = _sync_file_range()
    if sync is not None:
        sync(fd, offset, size, _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    # Lazy: start-up.
    import ctypes

    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function
