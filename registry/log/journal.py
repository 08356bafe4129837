"""The log of a registry in a folder: files of lines, one line for each entry.

A file of the log, a *segment*, is named by the number of its first entry. The last one grows until it is large enough,
then the next begins. What is read is not trusted: a line is an entry only if its digest fits.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from registry.log.entries import MAX_LINE, Entry, digest_of_line, parse
from registry.log.forking import no_fork, only_here
from registry.store import durable, places
from registry.store.errors import Corrupt, StorageError, Unsupported

FOLDER = "journal"
SEGMENT = 16 << 20
"""Bytes from which on a segment is full: the next entry begins another."""

_AT_A_TIME = 4 << 20
"""Bytes of entries that are appended at a time, where they come from elsewhere."""

_LOCK = "lock"
_LARGEST = SEGMENT + MAX_LINE
"""Bytes of the largest segment: its last entry may be as long as any."""

_BLOCK = 4096
"""Bytes that a disk reads at once, or not at all."""

_NAME = re.compile(r"([0-9]{16})\.log\Z")
_TAIL = 66
"""Bytes at the end of a line: a tab, the digest, a line feed."""
_END = re.compile(rb"\t[0-9a-f]{64}\n\Z")


class Position(NamedTuple):
    """A place in the log: its segment, by the number of the first entry, and how many bytes of that stand before it."""

    segment: int
    offset: int


BEGINNING = Position(1, 0)


class Line(NamedTuple):
    """One line of the log.

    Attributes:
        entry: None if it is damaged.
        problem: what is wrong with it then.
        start: where it begins.
        end: where the next one begins.
        is_torn: whether it is the last one and its digest does not fit: a crash cut it short.
        has_end: whether a damaged line ends like an entry, with a digest; of one line that a crash cut short, only the
            last piece may.
    """

    entry: Entry | None
    problem: str
    start: Position
    end: Position
    is_torn: bool = False
    has_end: bool = False


class Journal:
    """The files of the log.

    Args:
        root: the registry's folder.
    """

    def __init__(self, root: Path) -> None:
        self.folder = root / FOLDER
        self._tmp = root / "tmp"

    def path(self, segment: int) -> Path:
        """The file of a segment."""
        return self.folder / f"{segment:016d}.log"

    def create(self) -> None:
        """Make the folder, and the file that is locked."""
        durable.make_folder(self.folder, inner=1)
        with contextlib.suppress(FileExistsError):
            os.close(places.open_file(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, inner=1))

    @contextlib.contextmanager
    def locked(self, *, seconds: float = 60.0) -> Iterator[None]:
        """Keep other writers out, even those that use another catalog.

        Args:
            seconds: how long to wait for another process at most.

        Raises:
            StorageError: if another process keeps the log locked for so long.
        """
        try:
            fd = places.open_file(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, inner=1)
        except FileNotFoundError:
            self.create()
            fd = places.open_file(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, inner=1)
        try:
            with only_here(fd):
                if not durable.lock(fd, seconds=seconds):
                    raise StorageError(
                        f"{self.folder}: another process has kept the log locked for {seconds:.0f} s",
                        "repeat",
                    )
                with no_fork():
                    try:
                        yield
                    finally:
                        durable.unlock(fd)
        finally:
            os.close(fd)

    def segments(self) -> list[int]:
        """The numbers of the segments, sorted.

        Raises:
            Corrupt: if something else stands in the place of the folder.
        """
        matches = map(_NAME.match, places.names_in(self.folder, inner=1))
        return [int(match[1]) for match in matches if match and int(match[1])]

    def size(self, segment: int) -> int | None:
        """Bytes of a segment; None if it is not there."""
        status = places.status_of(self.path(segment), inner=1)
        return None if status is None else status.st_size

    def ends_at(self, position: Position, seq: int) -> bool:
        """Whether the log ends at a place, right behind the entry `seq`."""
        size = self.size(position.segment)
        if (size or 0) != position.offset or (size is None and seq):
            return False
        return max(self.segments(), default=0) <= position.segment

    def digest_before(self, position: Position) -> str | None:
        """The digest that the line before a place ends with; None if there is no line, or the segment is gone."""
        if position.offset < _TAIL:
            return None
        try:
            with self._opened(position.segment) as fd:
                tail = os.pread(fd, _TAIL, position.offset - _TAIL)
        except FileNotFoundError:
            return None
        whole = len(tail) == _TAIL and tail[:1] == b"\t" and tail[-1:] == b"\n"
        return tail[1:-1].decode("ascii", "replace") if whole else None

    def line_at(self, position: Position) -> bytes:
        """The line that begins at a place; empty if there is none."""
        with self._opened(position.segment) as fd, os.fdopen(os.dup(fd), "rb") as file:
            file.seek(position.offset)
            return file.readline(MAX_LINE + 1)

    def read(self, since: Position = BEGINNING) -> Iterator[Line]:
        """The lines from a place on; damaged ones are marked, not raised.

        Raises:
            Unsupported: if a newer version of this package wrote one.
        """
        segments = [number for number in self.segments() if number >= since.segment]
        for segment in segments:
            first = since.offset if segment == since.segment else 0
            yield from self._read_segment(segment, first, is_last=segment == segments[-1])

    def append(self, entry: Entry, end: Position) -> Position:
        """Add an entry behind the last one, durably; on an error the log is as before.

        Args:
            end: where the log ends.

        Returns:
            Where it ends now.
        """
        if end.offset >= SEGMENT:
            end = Position(entry.seq, 0)
        durable.again_on_trouble(lambda: durable.make_folder(self.folder, inner=1))
        durable.append(self.path(end.segment), entry.line, inner=1)
        if not end.offset:
            # Another process may have made the file, and been killed before it synced the folder.
            durable.sync_folder(self.folder, inner=1)
        return end._replace(offset=end.offset + len(entry.line))

    def append_all(self, entries: Iterable[Entry], end: Position) -> Position:
        """As `append`, for entries that others have durably: many are written at a time.

        If no more can be had, those before are written all the same.
        """
        waiting: list[Entry] = []
        size = 0
        try:
            for entry in entries:
                if waiting and (size >= _AT_A_TIME or end.offset + size >= SEGMENT):
                    end, waiting, size = self._append_lines(waiting, end), [], 0
                waiting.append(entry)
                size += len(entry.line)
        finally:
            end = self._append_lines(waiting, end)
        return end

    def _append_lines(self, entries: Sequence[Entry], end: Position) -> Position:
        """Add entries to one segment, durably."""
        if not entries:
            return end
        return self.append(entries[0]._replace(line=b"".join(entry.line for entry in entries)), end)

    def sync(self) -> None:
        """Make durable what a process may have written before it was killed."""
        for segment in self.segments()[-1:]:
            with self._opened(segment) as fd:
                durable.disk.sync(fd, self.path(segment))
        durable.sync_folder(self.folder, inner=1)

    def cut(self, end: Position) -> None:
        """Remove what stands behind a place of the last segment, durably."""
        durable.truncate(self.path(end.segment), end.offset, inner=1)

    def rewrite(self, segment: int, entries: Iterable[Entry]) -> None:
        """Write a segment anew, whole or not at all."""
        file = durable.NewFile(self._tmp)
        try:
            for entry in entries:
                file.write(entry.line)
            file.sync(b"", read_only=False)
            file.publish(self.path(segment), inner=1)
        except BaseException:
            file.discard()
            raise

    def remove(self, segments: Sequence[int]) -> None:
        """Remove whole segments, the last ones first."""
        for segment in sorted(segments, reverse=True):
            durable.unlink(self.path(segment), inner=1)
        durable.sync_folder(self.folder, inner=1)

    def _read_segment(self, segment: int, offset: int, *, is_last: bool) -> Iterator[Line]:
        """The lines of a segment from an offset on. Where a block of the disk cannot be read, its lines are damaged."""
        size = self.size(segment) or 0
        with contextlib.ExitStack() as stack:
            file: BinaryIO | None = None
            unreadable: list[range] = []
            problem = ""
            while offset < size:
                start = Position(segment, offset)
                try:
                    if file is None:
                        file = stack.enter_context(self._reader(segment, offset))
                    raw = file.readline(MAX_LINE + 1) if offset < _LARGEST else b""
                except OSError as error:
                    problem = f"it cannot be read ({error.strerror})"
                    try:
                        file, unreadable = self._salvaged(segment, offset, size)
                    except OSError:
                        yield Line(None, problem=problem, start=start, end=Position(segment, size))
                        return
                    continue
                offset += len(raw)
                if not raw.endswith(b"\n") and offset < size:
                    problem = problem or f"it is longer than the {MAX_LINE} bytes that an entry may have"
                    yield Line(None, problem=problem, start=start, end=Position(segment, size))
                    return
                end = Position(segment, offset)
                if any(start.offset < part.stop and part.start < offset for part in unreadable):
                    yield Line(None, problem=problem, start=start, end=end)
                else:
                    yield _line(raw, start, end, is_last=is_last and offset >= size)

    @contextlib.contextmanager
    def _reader(self, segment: int, offset: int) -> Iterator[BinaryIO]:
        with self._opened(segment) as fd, os.fdopen(os.dup(fd), "rb") as file:
            file.seek(offset)
            yield file

    def _salvaged(self, segment: int, offset: int, size: int) -> tuple[BinaryIO, list[range]]:
        """The rest of a segment, block by block, and the blocks that cannot be read; these are zero."""
        size = max(offset, min(size, _LARGEST))
        data = bytearray(size - offset)
        unreadable = []
        with self._opened(segment) as fd:
            for start in range(offset - offset % _BLOCK, size, _BLOCK):
                part = range(max(start, offset), min(start + _BLOCK, size))
                try:
                    found = os.pread(fd, len(part), part.start)
                except OSError:
                    found = b""
                data[part.start - offset : part.start - offset + len(found)] = found
                if len(found) < len(part):
                    unreadable.append(part)
        return io.BytesIO(data), unreadable

    @contextlib.contextmanager
    def _opened(self, segment: int) -> Iterator[int]:
        fd = places.open_file(self.path(segment), os.O_RDONLY, inner=1)
        try:
            yield fd
        finally:
            os.close(fd)


def _line(raw: bytes, start: Position, end: Position, *, is_last: bool) -> Line:
    try:
        return Line(parse(raw), problem="", start=start, end=end)
    except Unsupported:
        raise
    except Corrupt as error:
        is_torn = is_last and digest_of_line(raw) is None
        has_end = _END.search(raw, max(0, len(raw) - _TAIL)) is not None
        return Line(None, problem=str(error), start=start, end=end, is_torn=is_torn, has_end=has_end)
