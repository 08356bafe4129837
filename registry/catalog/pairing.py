"""Whether a catalog's file, and the write-ahead log beside it, are whole and belong together.

SQLite applies whatever log it finds to whatever database it finds. Where an older copy of the database alone was put
back, the result is a mixture: the last changes are there, and those before them are not. So each change records which
write-ahead log it saw and where the log of the registry stood when that one began; the database, read without its
write-ahead log, must not be older than this, and the log of the registry must have what it names last.

Where SQLite was killed while it moved changes into the file, the file alone is a mixture, too. So each change leaves a
stamp in the catalog; a program that closes it last, with all changes moved, puts the stamp into a file of its own, and
where there is no write-ahead log, only a catalog with that stamp counts. No other file has to be durable for this: one
that is missing or old costs no more than that the catalog is made anew.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from registry.catalog.journal import Journal, Position
from registry.store import durable
from registry.store.errors import RegistryError
from registry.store.places import is_local

WHOLE = "-whole"
"""What the name of the file with the stamp adds to that of the catalog."""

_SALTS = slice(16, 24)
_INDEX = struct.Struct("=16xI12x8s")
"""Of the index that SQLite keeps of a write-ahead log: how many frames are valid, and the log's salts.

Source: https://www.sqlite.org/walformat.html#the_wal_index_file_format
"""
_COUNTER = slice(24, 28)
_LONGEST = 64
"""Bytes of the file with the stamp that are read."""


def salts_of(path: Path) -> str:
    """What tells the write-ahead log beside a database from the one before it; empty if there is none.

    Source: https://www.sqlite.org/fileformat2.html#walformat
    """
    return _first_bytes(path.with_name(f"{path.name}-wal"), _SALTS.stop)[_SALTS].hex()


def new_stamp() -> str:
    """What tells the catalog after a change from itself at any other time."""
    return os.urandom(8).hex()


def close(path: Path, connection: sqlite3.Connection) -> None:
    """Close a connection to a catalog that was found whole; if it was the last one, say beside it that it still is.

    The stamp is read before: had another program changed the catalog since, it is not that of the file, and none counts.
    """
    stamp = None
    with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
        stamp = _state_in(connection).get("stamp")
    connection.close()
    with contextlib.suppress(OSError, RegistryError):
        if not stamp or _is_open(path):
            return
        mark = _mark(path, stamp)
        if mark != _noted(path) and not _is_open(path):  # Else another program may have begun to change it.
            durable.note(path.with_name(f"{path.name}{WHOLE}"), mark.encode(), folder=path.parent / "tmp")


def _is_open(path: Path) -> bool:
    """Whether a program has a catalog open, or was killed when it had."""
    return durable.status_of(path.with_name(f"{path.name}-wal")) is not None


def _mark(path: Path, stamp: str) -> str:
    """What is noted of a whole catalog.

    The stamp lies in one of the first pages; the very first has a counter of its own changes.
    Source: https://www.sqlite.org/fileformat2.html#file_change_counter
    """
    return f"{stamp} {_first_bytes(path, _COUNTER.stop)[_COUNTER].hex()}"


def _noted(path: Path) -> str:
    """What was noted of the last catalog that was closed whole; empty if there is none."""
    return _first_bytes(path.with_name(f"{path.name}{WHOLE}"), _LONGEST).decode("ascii", "replace")


def after(state: dict[str, str], salts: str) -> dict[str, str]:
    """What a change is to record, from the state before it and the write-ahead log that it found when it began.

    Returns:
        Rows of the table `state`: `wal`, that write-ahead log; `base`, the entry before it began, or an earlier one; and
        `before`, the entry before this change, for the case that it is the first in a new one.
    """
    began = state.get("base" if state.get("wal") == salts else "before", "0")
    return {"wal": salts, "base": began, "before": state.get("seq", "0")}


class Alone(NamedTuple):
    """A catalog's file as it is without its write-ahead log.

    Attributes:
        salts: of that write-ahead log; empty if there is none.
        state: what the catalog says of itself then; empty if it cannot be read.
    """

    salts: str
    state: Mapping[str, str]


def look(path: Path, connect: Callable[[], sqlite3.Connection]) -> Alone:
    """Look at a catalog's file, best before it is opened: SQLite keeps what is closed open beside another connection.

    Args:
        connect: gives a connection to the file alone.
    """
    salts = salts_of(path)
    return Alone(salts, _state(connect) if salts else {})


def is_paired(path: Path, connection: sqlite3.Connection, alone: Alone, journal: Journal) -> bool:
    """Whether a catalog is whole, and no older than its write-ahead log, and no newer; false also if that changes.

    Args:
        connection: to the catalog with its write-ahead log.
        alone: as the file was before.
        journal: the log that it follows from.
    """
    state = _state_in(connection)
    if salts_of(path) != alone.salts:
        return False
    if not _adds_something(path, alone.salts):
        return not is_local(path.parent) or _mark(path, state.get("stamp", "")) == _noted(path)
    try:
        base = int(state.get("base" if state.get("wal") == alone.salts else "before", "0"))
        seq, own = int(state["seq"]), int(alone.state.get("seq", "-1"))
    except (KeyError, ValueError):
        return False
    if own < 0:  # Everything is in the write-ahead log, as in that of a catalog just made.
        return base == 0
    if own == seq:
        return alone.state.get("digest") == state.get("digest")
    return base <= own < seq and _is_of(journal, alone.state)


def _adds_something(path: Path, salts: str) -> bool:
    """Whether SQLite takes changes from the write-ahead log, or has just moved all that it had into the file.

    Args:
        salts: of the write-ahead log.
    """
    index = _first_bytes(path.with_name(f"{path.name}-shm"), _INDEX.size)
    if not salts or len(index) < _INDEX.size:
        return False
    frames, known = _INDEX.unpack(index)
    if frames:
        return True
    # With the first salt one higher it is about to be begun again, which is only where everything was moved.
    return int.from_bytes(known[:4], "big") == (int(salts[:8], 16) + 1) % (1 << 32)


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
        fd = durable.open_file(path, os.O_RDONLY)
    except FileNotFoundError:
        return b""
    try:
        return os.pread(fd, count, 0)
    finally:
        os.close(fd)


def _state_in(connection: sqlite3.Connection) -> dict[str, str]:
    rows = connection.execute("SELECT key, value FROM state").fetchall()
    return {key: value for key, value in rows if isinstance(key, str) and isinstance(value, str)}


def _state(connect: Callable[[], sqlite3.Connection]) -> dict[str, str]:
    """What a catalog says of itself; empty if it cannot be read."""
    with (
        contextlib.suppress(sqlite3.Error, UnicodeDecodeError, RegistryError),
        contextlib.closing(connect()) as connection,
    ):
        return _state_in(connection)
    return {}
