"""Whether a write-ahead log belongs to the catalog beside it.

SQLite applies whatever log it finds to whatever database it finds. Where an older copy of the database alone was put
back, the result is a mixture: the last changes are there, and those before them are not. So each change records which
write-ahead log it saw and where the log of the registry stood when that one began; the database, read without its
write-ahead log, must not be older than this.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from registry.store import durable
from registry.store.errors import RegistryError

_SALTS = slice(16, 24)


def salts_of(path: Path) -> str:
    """What tells the write-ahead log beside a database from the one before it; empty if there is none.

    Source: https://www.sqlite.org/fileformat2.html#walformat
    """
    try:
        fd = durable.open_file(path.with_name(f"{path.name}-wal"), os.O_RDONLY)
    except FileNotFoundError:
        return ""
    try:
        return os.pread(fd, _SALTS.stop, 0)[_SALTS].hex()
    finally:
        os.close(fd)


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


def is_paired(path: Path, connection: sqlite3.Connection, alone: Alone) -> bool:
    """Whether a catalog is no older than its write-ahead log, and no newer; false also if that changes meanwhile.

    Args:
        connection: to the catalog with its write-ahead log.
        alone: as the file was before.
    """
    state = dict(connection.execute("SELECT key, value FROM state").fetchall())
    if salts_of(path) != alone.salts:
        return False
    if not alone.salts:
        return True
    try:
        base = int(state.get("base" if state.get("wal") == alone.salts else "before", "0"))
        seq, own = int(state["seq"]), int(alone.state.get("seq", "-1"))
    except (KeyError, ValueError):
        return False
    if own < 0:  # Everything is in the write-ahead log, as in that of a catalog just made.
        return base == 0
    return base <= own <= seq and (own < seq or alone.state.get("digest") == state.get("digest"))


def _state(connect: Callable[[], sqlite3.Connection]) -> dict[str, str]:
    """What a catalog says of itself; empty if it cannot be read."""
    with (
        contextlib.suppress(sqlite3.Error, UnicodeDecodeError, RegistryError),
        contextlib.closing(connect()) as connection,
    ):
        rows = connection.execute("SELECT key, value FROM state").fetchall()
        return {key: value for key, value in rows if isinstance(key, str) and isinstance(value, str)}
    return {}
