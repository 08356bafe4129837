"""An outgoing file or folder: written for other programs, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from registry.progress import Progress, silent
from registry.store.durable import (
    Buffer,
    NewFile,
    host,
    is_gone,
    make_folder,
    remove_tree,
    rename,
    try_lock,
)
from registry.store.errors import Conflict, Corrupt, Invalid, NotFound, fix, storage_errors
from registry.store.places import opened_folder, refuse_inside
from registry.store.text import printable, quoted

Write = Callable[[Buffer], None]
"""Takes the next bytes of a file."""

_HEAD = 64
"""Bytes at the start of a file that are read back, to check that the disk has kept them."""


class Outgoing:
    """A file that is about to be written.

    Args:
        path: where it is to be; a symbolic link there is followed.
        force: replace a file that is there.
        progress: called with the bytes of tensors that are written, and of all.

    Raises:
        Conflict: if there is a file and `force` is false, or something at `path` that is no file.
        NotFound: if the folder does not exist.
        Invalid: if the path cannot be one, or belongs to a registry.
        StorageError: if the system refuses.
    """

    def __init__(self, path: Path, *, force: bool = False, progress: Progress = silent) -> None:
        self._path = path
        self._force = force
        self._progress = progress
        self._check()

    @contextlib.contextmanager
    def opened(self, total: int) -> Iterator[Write]:
        """Make the file beside its target. It takes the target's name when the block ends well; else it is deleted.

        Check before whatever may be refused, so that nothing is written in vain.

        Args:
            total: bytes of the tensors that the file will hold.

        Yields:
            A function that takes the next bytes.

        Raises:
            Conflict: if somebody made a file there meanwhile and `force` is false.
            StorageError: if the system refuses; nothing is left behind.
        """
        target = Path(os.path.realpath(self._path))
        with storage_errors(self._path):
            try:
                file = NewFile(target.parent, inner=0)
            except OSError as error:
                # The folder refuses. The user does not know the temporary name of the file.
                error.filename = str(target.parent)
                raise
            try:
                output = _Output(file, total, self._progress)
                yield output.write
                self._check()
                file.sync(output.head, read_only=False)
                file.publish(target, inner=0)
            except BaseException:
                file.discard()
                raise

    def _check(self) -> None:
        shown = printable(str(self._path))
        try:
            with storage_errors(self._path):
                target = Path(os.path.realpath(self._path))
                refuse_inside(target)
                try:
                    status = os.stat(target)
                except (FileNotFoundError, NotADirectoryError):
                    if not target.parent.is_dir():
                        missing = printable(str(target.parent))
                        raise NotFound(f"{missing}: there is no such folder") from None
                    return
        except ValueError:
            raise Invalid(f"{shown}: a path cannot hold this character") from None
        if not stat.S_ISREG(status.st_mode):
            raise Conflict(f"{shown}: there is something that is not a regular file", "choose another name")
        if not self._force:
            overwrite = fix("or overwrite it", force=True)
            raise Conflict(f"{shown}: the file exists", "choose another name", overwrite)


class OutgoingFolder:
    """A folder that is about to be written.

    Args:
        path: where it is to be; it must not be there, or be empty.
        progress: called with the bytes of tensors that are written, and of all.

    Raises:
        Conflict: if there is a folder that is not empty, or something else.
        NotFound: if the folder that it is to be in does not exist.
        Invalid: if the path cannot be one, or belongs to a registry.
        StorageError: if the system refuses.
    """

    def __init__(self, path: Path, *, progress: Progress = silent) -> None:
        self._path = path
        self._progress = progress
        self._check()

    @contextlib.contextmanager
    def opened(self, total: int) -> Iterator[Callable[[str], contextlib.AbstractContextManager[Write]]]:
        """Make the folder beside its target. It takes the target's name when the block ends well; else it is deleted.

        What processes of this machine that were killed left there of the same target is removed first.

        Args:
            total: bytes of the tensors that the folder will hold.

        Yields:
            A function that opens a file in it by its name, as a context that gives the function to write with.

        Raises:
            Conflict: if somebody made a folder there meanwhile.
            StorageError: if the system refuses; nothing is left behind.
        """
        target = Path(os.path.realpath(self._path))
        beside = target.parent / f"{_hidden(target)}{os.getpid()}-{os.urandom(8).hex()}"
        done = 0

        @contextlib.contextmanager
        def file(name: str) -> Iterator[Write]:
            nonlocal done
            path = beside / check_relative(name)
            make_folder(path.parent)
            new = NewFile(path.parent, inner=0)
            try:
                output = _Output(new, total, self._progress, done=done)
                yield output.write
                done = output.done
                new.sync(output.head, read_only=False)
                new.publish(path, inner=0)
            except BaseException:
                new.discard()
                raise

        with storage_errors(self._path):
            try:
                _remove_leftovers(target)
                make_folder(beside)
                with opened_folder(beside) as held:
                    try_lock(held)
                    yield file
                    self._check()
                    rename(beside, target)
            except OSError as error:
                # The user does not know the temporary name of the folder.
                error.filename = str(self._path)
                raise
            finally:
                if beside.is_dir():
                    remove_tree(beside)

    def _check(self) -> None:
        shown = printable(str(self._path))
        try:
            with storage_errors(self._path):
                target = Path(os.path.realpath(self._path))
                refuse_inside(target)
                if not target.parent.is_dir():
                    raise NotFound(f"{printable(str(target.parent))}: there is no such folder")
                if not os.path.lexists(target):
                    return
                if not target.is_dir():
                    raise Conflict(f"{shown}: there is something that is not a folder", "choose another name")
                if any(os.scandir(target)):
                    raise Conflict(
                        f"{shown}: the folder is not empty, and a folder is never overwritten",
                        "choose another name",
                    )
        except ValueError:
            raise Invalid(f"{shown}: a path cannot hold this character") from None


def _hidden(target: Path) -> str:
    """What the names of folders begin with that are written for a target on this machine."""
    return f".{target.name[:100]}-{host()}-"


def _remove_leftovers(target: Path) -> None:
    """Remove folders that were being written for a target when their process was killed."""
    leftover = re.compile(rf"{re.escape(_hidden(target))}([0-9]+)-[0-9a-f]{{16}}\Z", re.ASCII)
    for name in os.listdir(target.parent):
        found = leftover.match(name)
        path = target.parent / name
        if found and is_gone(host(), found[1]) and path.is_dir() and not path.is_symlink():
            # A process in another container may have the same machine name. It holds the lock while it lives.
            with contextlib.suppress(OSError), opened_folder(path) as held:
                if try_lock(held):
                    remove_tree(path)


def check_relative(name: str) -> str:
    """The name of a file below a folder, which somebody else may have chosen.

    Raises:
        Corrupt: if it could lead out of the folder, or cannot be a name.
    """
    parts = name.split("/")
    if (
        not all(0 < len(os.fsencode(part)) <= 255 and part not in (".", "..") for part in parts)
        or len(parts) > 64
        or not printable(name) == name
    ):
        raise Corrupt(f"a file called {quoted(name)} cannot be written below a folder")
    return name


class _Output:
    """A new file that keeps its first bytes, to check them on the disk, and reports how far it is."""

    def __init__(self, file: NewFile, total: int, progress: Progress, *, done: int = 0) -> None:
        self._file = file
        self._total = total
        self._progress = progress
        self.done = done
        self.head = b""

    def write(self, data: Buffer) -> None:
        self.head += bytes(memoryview(data).cast("B")[: max(_HEAD - len(self.head), 0)])
        self._file.write(data)
        self.done += memoryview(data).nbytes
        self._progress(min(self.done, self._total), self._total)
