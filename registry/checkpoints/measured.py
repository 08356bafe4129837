"""Measured: statistics of tensors that were made before, by digest, in a file of the user's cache. No torch at the top.

A digest has the same statistics for ever, so every registry and every process of a user shares the file
`$XDG_CACHE_HOME/torch-registry/stats.sqlite`. It holds nothing that cannot be made again: what is damaged in it, or is not
what this module writes, is left out or removed, and without the file all is measured anew.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from registry.checkpoints.checkpoint import Checkpoint
    from registry.checkpoints.statistics import Statistics

T = TypeVar("T")

BINS = 64
"""Bins of a histogram; see `registry.checkpoints.statistics`."""

_MOST = 100_000
"""Tensors whose statistics are kept. Of more, the ones that were measured first go."""

_LONGEST = 8_192
"""Bytes of the statistics of a tensor."""

_LARGEST = 512 << 20
"""Bytes of a file that is read; a larger one was not written here."""

_PATIENCE_SECONDS = 2.0

_TABLE = "CREATE TABLE measured (number INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, text TEXT NOT NULL)"

_NUMBERS = ("norm", "mean", "std", "least", "most", "zeros")
_COUNTS = ("elements", "nonfinite")


def place() -> Path:
    """The file of the user's cache."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return folder / "torch-registry" / "stats.sqlite"


def known(digest: str) -> dict[str, Any] | None:
    """The statistics of a tensor with a digest, as the fields of `Statistics`; None if they are not kept."""

    def read(connection: sqlite3.Connection) -> dict[str, Any] | None:
        rows = connection.execute(
            "SELECT text FROM measured WHERE digest = ? AND length(text) <= ?", (digest, _LONGEST)
        ).fetchall()
        return _checked(rows[0][0]) if rows else None

    return _used(read)


def keep(digest: str, found: Mapping[str, Any]) -> None:
    """Keep the statistics of a tensor with a digest."""
    text = json.dumps(found)

    def write(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT OR REPLACE INTO measured (digest, text) VALUES (?, ?)", (digest, text))
        connection.execute(
            "DELETE FROM measured WHERE number <= (SELECT MAX(number) FROM measured) - ?", (_MOST,)
        )

    _used(write)


def measure(checkpoint: Checkpoint, paths: Collection[str]) -> Iterator[tuple[str, Statistics]]:
    """Path and statistics of some tensors of a checkpoint: those that are kept, and else measured; see `statistics`."""
    # Lazy: loads torch.
    from registry.checkpoints.statistics import Statistics, statistics

    digests = {path: digest for path, _, _, digest in checkpoint.parameters()}
    for path in paths:
        kept = known(digests[path]) if path in digests else None
        if kept is not None:
            yield path, Statistics(**{**kept, "histogram": tuple(kept["histogram"])})
            continue
        for _, found in statistics(checkpoint, [path]):
            keep(digests[path], found._asdict())
            yield path, found


def _used(work: Callable[[sqlite3.Connection], T]) -> T | None:
    """What a function does with the file; None where that is not possible. A file that is not ours is removed."""
    path = place()
    try:
        with contextlib.closing(_opened(path)) as connection:
            _prepare(connection)
            return work(connection)
    except (OSError, sqlite3.OperationalError):
        # Another process has it, the disk is full, or it may not be written.
        return None
    except (sqlite3.Error, ValueError, OverflowError):
        with contextlib.suppress(OSError):
            path.unlink()
        return None


def _opened(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
            path.unlink()
    return sqlite3.connect(path, timeout=_PATIENCE_SECONDS, isolation_level=None)


def _prepare(connection: sqlite3.Connection) -> None:
    """Make the table in a new file.

    Raises:
        DatabaseError: if the file holds anything else.
    """
    connection.execute("PRAGMA trusted_schema = OFF")
    # What a power cut damages is measured anew.
    connection.execute("PRAGMA synchronous = OFF")
    if not _tables(connection):
        connection.execute(_TABLE.replace("TABLE", "TABLE IF NOT EXISTS", 1))
    if _tables(connection) != [("table", "measured", _TABLE)]:
        raise sqlite3.DatabaseError("it is not what is written here")


def _tables(connection: sqlite3.Connection) -> list[tuple[str, str, str]]:
    """What a file holds beside the indexes that SQLite makes itself."""
    sql = "SELECT type, name, sql FROM sqlite_master WHERE name != 'sqlite_autoindex_measured_1' LIMIT 3"
    return connection.execute(sql).fetchall()


def _checked(text: Any) -> dict[str, Any] | None:
    """Statistics as they were kept; None if they are not what `Statistics` may hold."""
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None
    if not isinstance(found, dict) or set(found) != {*_NUMBERS, *_COUNTS, "histogram"}:
        return None
    bins = found["histogram"]
    counts = [*(found[name] for name in _COUNTS), *(bins if isinstance(bins, list | tuple) else [None])]
    is_right = (
        len(counts) == len(_COUNTS) + BINS
        and all(type(count) is int and 0 <= count < 2**63 for count in counts)
        and all(type(found[name]) in (int, float) for name in _NUMBERS)
        and all(abs(found[name]) <= 2**1023 or not math.isfinite(found[name]) for name in _NUMBERS)
    )
    return found if is_right else None
