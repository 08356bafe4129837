"""An outgoing file: written for other programs, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from registry.progress import Progress, silent
from registry.store.durable import Buffer, NewFile
from registry.store.errors import Conflict, Invalid, NotFound, fix, storage_errors
from registry.store.places import refuse_inside
from registry.store.text import printable

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
            raise Conflict(f"{shown}: there is something that is not a regular file; choose another name")
        if not self._force:
            overwrite = fix("or overwrite it", force=True)
            raise Conflict(f"{shown}: the file exists; choose another name", overwrite)


class _Output:
    """A new file that keeps its first bytes, to check them on the disk, and reports how far it is."""

    def __init__(self, file: NewFile, total: int, progress: Progress) -> None:
        self._file = file
        self._total = total
        self._progress = progress
        self._done = 0
        self.head = b""

    def write(self, data: Buffer) -> None:
        self.head += bytes(memoryview(data).cast("B")[: max(_HEAD - len(self.head), 0)])
        self._file.write(data)
        self._done += memoryview(data).nbytes
        self._progress(min(self._done, self._total), self._total)
