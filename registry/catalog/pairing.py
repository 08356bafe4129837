"""Whether a catalog's file, and the write-ahead log beside it, are whole and belong together.

SQLite applies whatever log it finds to whatever database it finds. Where an older copy of the database alone was put
back, the result is a mixture: the last changes are there, and those before them are not. So each change records which
write-ahead log it saw, and which entry of the registry's log was the last when that one began. The database, read
without its write-ahead log, must not be older than that entry, and the registry's log must have the last entry that the
database names. Where a catalog was made anew, all of it is in the write-ahead log, and what the database was before
does not matter until SQLite has moved the changes into it.

Where SQLite was killed while it moved changes into the file, the file alone is a mixture, too. So each change leaves a
*stamp* in the file's first page, which SQLite moves first. The program that closes the catalog last, with all changes
moved, notes the stamp in a file beside it. Where a write-ahead log adds nothing, only a catalog with the noted stamp
counts. If the note is missing or old, the catalog is made anew, and nothing else is lost.

Nothing here opens the database or its index but SQLite itself: by the rules of POSIX, whoever closes a file gives up all
locks that its process has on it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from registry.log.journal import Journal, Position
from registry.store import durable, places
from registry.store.errors import RegistryError
from registry.store.places import is_local

WHOLE = "-whole"
"""What the name of the file with the noted stamp adds to that of the catalog."""

ANEW = "anew"
"""Stands in the place of a write-ahead log's salts: the last change made the whole catalog anew."""

_SALTS = slice(16, 24)
"""Where the salts stand in the header of a write-ahead log. Each new one has other salts."""

_HEADER = 32
_FRAME = 24
"""Bytes of the header of a write-ahead log, and of that of each frame in it."""

_LONGEST = 64
"""Bytes of the file with the noted stamp that are read at most."""


class Alone(NamedTuple):
    """A catalog's file as it is without its write-ahead log.

    Attributes:
        salts: of that write-ahead log; empty if there is none.
        stamp: of the catalog; empty if it cannot be read, or if there is no write-ahead log.
        state: the rows of its table `state`; empty likewise.
    """

    salts: str
    stamp: str = ""
    state: Mapping[str, str] = MappingProxyType({})


def salts_of(path: Path) -> str:
    """The salts that tell the write-ahead log beside a database from the one before it; empty if there is none.

    Source: https://www.sqlite.org/fileformat2.html#walformat
    """
    return _first_bytes(path.with_name(f"{path.name}-wal"), _SALTS.stop)[_SALTS].hex()


def stamp(connection: sqlite3.Connection) -> None:
    """Put a new stamp into a catalog, as a part of a change.

    Source: https://www.sqlite.org/pragma.html#pragma_user_version
    """
    connection.execute(f"PRAGMA user_version = {int.from_bytes(os.urandom(4), 'big', signed=True)}")


def close(path: Path, connection: sqlite3.Connection) -> None:
    """Close a connection to a catalog that was found whole. If it was the last connection, note the catalog's stamp.

    A note that cannot be written costs no more than that the catalog is made anew.
    """
    with contextlib.suppress(OSError, RegistryError, durable.Moved):
        close_made(path, connection)


def close_made(path: Path, connection: sqlite3.Connection) -> None:
    """See `close`, for a catalog that has just been made: without the note, it would be made anew whenever it is opened.

    The stamp is read before the connection is closed. If another program changes the catalog in between, the note does
    not fit, and does not count.

    Raises:
        OSError, RegistryError, durable.Moved: if the stamp cannot be noted.
    """
    found = None
    with contextlib.suppress(sqlite3.Error):
        found = _stamp_in(connection)
    connection.close()
    is_open = places.status_of(path.with_name(f"{path.name}-wal")) is not None
    if found is not None and not is_open and found != _noted(path):
        note = path.with_name(f"{path.name}{WHOLE}")
        durable.note(note, found.encode(), folder=path.parent / "tmp", like=path)


def after(path: Path, connection: sqlite3.Connection, look: Callable[[], Alone]) -> dict[str, str]:
    """What a change that begins now must record about the write-ahead log that it finds.

    Args:
        look: looks at the catalog's file alone.

    Returns:
        Rows of the table `state`. `wal` has the salts of that write-ahead log. `base` is the last entry before it
        began, or an earlier one; it is 0 where the whole catalog is in it. `before` is the last entry before this
        change: the base in case that the change begins a new write-ahead log.
    """
    salts, state = salts_of(path), _state_in(connection)
    now = state.get("seq", "0")
    if state.get("wal") == ANEW:
        is_moved = not salts or look().state.get("seq") == now
        began = now if is_moved else "0"
    else:
        began = state.get("base" if state.get("wal") == salts else "before", "0")
    return {"wal": salts, "base": began, "before": now}


def look(path: Path, connect: Callable[[], sqlite3.Connection]) -> Alone:
    """Look at a catalog's file alone, best before it is opened: beside another connection SQLite keeps it open.

    Args:
        connect: gives a connection to the file alone.
    """
    salts = salts_of(path)
    if salts:
        with (
            contextlib.suppress(sqlite3.Error, UnicodeDecodeError, RegistryError),
            contextlib.closing(connect()) as connection,
        ):
            return Alone(salts, _stamp_in(connection), _state_in(connection))
    return Alone(salts)


def is_paired(path: Path, connection: sqlite3.Connection, *, alone: Alone, journal: Journal) -> bool:
    """Whether a catalog's file is whole and belongs to the write-ahead log; false also if another one has begun.

    Args:
        connection: to the catalog with its write-ahead log.
        alone: the file as it was before the connection was opened.
        journal: the log that the catalog follows from.
    """
    now, state = _stamp_in(connection), _state_in(connection)
    if salts_of(path) != alone.salts:
        return False
    if not alone.salts or now == alone.stamp:
        if now == _noted(path) or not is_local(path.parent):
            return True
        if not alone.salts or not _holds_a_change(path):
            return False
    if state.get("wal") == ANEW:
        return True
    try:
        base = int(state.get("base" if state.get("wal") == alone.salts else "before", "0"))
        seq, own = int(state["seq"]), int(alone.state.get("seq", "-1"))
    except (KeyError, ValueError):
        return False
    # The whole catalog is in the write-ahead log.
    if base == 0:
        return True
    if own == seq:
        return alone.state.get("digest") == state.get("digest")
    return base <= own < seq and _is_of(journal, alone.state)


def _stamp_in(connection: sqlite3.Connection) -> str:
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    return str(found)


def _noted(path: Path) -> str:
    """The noted stamp; empty if there is none, or if it cannot be read."""
    with contextlib.suppress(PermissionError):
        return _first_bytes(path.with_name(f"{path.name}{WHOLE}"), _LONGEST).decode("ascii", "replace")
    return ""


def _holds_a_change(path: Path) -> bool:
    """Whether the write-ahead log beside a database begins with a whole change, so that SQLite reads it.

    Source: https://www.sqlite.org/fileformat2.html#walformat
    """
    try:
        fd = places.open_file(path.with_name(f"{path.name}-wal"), os.O_RDONLY)
    except FileNotFoundError:
        return False
    with os.fdopen(fd, "rb") as log:
        header = log.read(_HEADER)
        if len(header) < _HEADER:
            return False
        order = ">" if header[3] & 1 else "<"
        size = int.from_bytes(header[8:12], "big")
        sums = _sums((0, 0), header[:24], order)
        if sums != struct.unpack(">2I", header[24:]) or not 512 <= size <= 65536:
            return False
        while len(frame := log.read(_FRAME + size)) == _FRAME + size:
            sums = _sums(sums, frame[:8] + frame[_FRAME:], order)
            if frame[8:16] != header[_SALTS] or sums != struct.unpack(">2I", frame[16:_FRAME]):
                return False
            # The last frame of a change says how large the database is then.
            if any(frame[4:8]):
                return True
    return False


def _sums(before: tuple[int, int], data: bytes, order: str) -> tuple[int, int]:
    """The running checksums of a write-ahead log."""
    first, second = before
    words = iter(struct.unpack(f"{order}{len(data) // 4}I", data))
    for word in words:
        first = (first + word + second) & 0xFFFFFFFF
        second = (second + next(words) + first) & 0xFFFFFFFF
    return first, second


def _is_of(journal: Journal, state: Mapping[str, str]) -> bool:
    """Whether the log has the last entry that a catalog says it holds; true if the log does not reach so far."""
    try:
        end = Position(int(state["segment"]), int(state["offset"]))
        if int(state["seq"]) == 0 or (journal.size(end.segment) or 0) < end.offset:
            return True
        return journal.digest_before(end) == state["digest"]
    except (KeyError, ValueError, OverflowError):
        return False


def _first_bytes(path: Path, count: int) -> bytes:
    """The first bytes of a file; none if there is none."""
    try:
        fd = places.open_file(path, os.O_RDONLY)
    except FileNotFoundError:
        return b""
    try:
        return os.pread(fd, count, 0)
    finally:
        os.close(fd)


def _state_in(connection: sqlite3.Connection) -> dict[str, str]:
    rows = connection.execute("SELECT key, value FROM state").fetchall()
    return {key: value for key, value in rows if isinstance(key, str) and isinstance(value, str)}
