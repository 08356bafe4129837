"""Refolding: making a catalog anew from the log, inside a transaction or in a new file.

Entries that the folder's log has lost come from the catalog's copy, and the other way round.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from registry.catalog import pairing, schema
from registry.catalog.change import Change
from registry.catalog.copies import Material, copies, packed, text_in
from registry.catalog.database import NAME, PARTS, UNREADABLE, Damaged, Database
from registry.catalog.tables import fill
from registry.log.entries import Entry
from registry.log.history import End, Fork, Gap, Placed, heal, merge, walk
from registry.log.journal import Journal
from registry.log.ledger import Ledger
from registry.log.strays import use_strays
from registry.store import durable, places
from registry.store.errors import Corrupt, RegistryError, StorageError, storage_errors

_TRIES = 4

_logger = logging.getLogger(__name__)


class Refolded(NamedTuple):
    """What making a catalog anew from the log found.

    Attributes:
        ledger: what follows from the log.
        healed: numbers of the entries that the folder's log had lost, and the catalog's copy had not.
        set_aside: the name that an unreadable catalog has now.
        problems: where journal and catalog differed, if it had format 1.
    """

    ledger: Ledger
    healed: Sequence[int] = ()
    set_aside: str | None = None
    problems: Sequence[str] = ()


def history(journal: Journal, connection: sqlite3.Connection | None) -> Iterator[Placed | Gap | End | Fork]:
    """All entries, from the folder's log and from the catalog's copy.

    Args:
        connection: to the catalog; None if there is no copy.
    """
    return merge(walk(journal.read()), copies(connection) if connection is not None else ())


def begin_copy(connection: sqlite3.Connection) -> None:
    """Make a table, outside the catalog's file, for the copies of entries until the other tables are made anew."""
    connection.execute("CREATE TEMP TABLE history (seq INTEGER PRIMARY KEY, entry BLOB NOT NULL)")


def add_copy(connection: sqlite3.Connection, entry: Entry) -> None:
    """Keep the copy of an entry until the tables are made anew."""
    connection.execute("INSERT INTO temp.history VALUES (?, ?)", (entry.seq, packed(entry)))


def refold_in_place(
    database: Database, change: Change, copy: sqlite3.Connection | None, *, heals: bool = True
) -> Refolded:
    """Empty the tables and fill them from the log, inside a transaction that excludes everybody else.

    Args:
        copy: the catalog that has a copy of the log.
        heals: whether the folder's log gets back what the copy has.

    Raises:
        Corrupt: if the log and the copy tell different histories.
    """
    connection, journal = change.connection, database.journal
    ledger = Ledger()
    if heals:
        journal.sync()
    connection.execute("DROP TABLE IF EXISTS temp.history")
    begin_copy(connection)
    is_whole = True
    for item in history(journal, copy):
        if isinstance(item, Fork):
            raise _forked(database, item)
        # Behind a gap a torn line stays. Without it, the damage before it would look like a torn line, too.
        if isinstance(item, End) and item.is_torn and heals and not ledger.has_gaps:
            journal.cut(item.position)
        if isinstance(item, Placed):
            add_copy(connection, item.entry)
            is_whole = is_whole and item.start is not None
        ledger.follow([item])
    if heals and not (is_whole and all(gap.last >= gap.first for gap in ledger.gaps)):
        healed = _healed(journal, copy, ledger.accepted)
        if healed is not None:
            again = refold_in_place(database, change, copy, heals=False)
            return again._replace(healed=healed)
    if not ledger.seq and not ledger.gaps and next(iter(database.store), None):
        ledger.gaps.append(Gap(1, 1, "the log is gone, while there are manifests"))
    if ledger.has_gaps:
        use_strays(database.store, ledger)
    return fill_anew(database, change, ledger)


def fill_anew(database: Database, change: Change, ledger: Ledger) -> Refolded:
    """Empty the tables and fill them with what follows from the log, whose copy `add_copy` has kept."""
    connection = change.connection
    change.beside = {}
    change.packs.forget()
    schema.drop(connection)
    schema.create(connection)
    connection.execute("INSERT INTO log SELECT seq, entry FROM temp.history")
    connection.execute("DROP TABLE temp.history")
    material = Material(database.store, text_in(connection, ledger))
    fill(connection, ledger, material)
    anew = Change(connection, material)
    if ledger.has_gaps:
        gaps = json.dumps([str(gap) for gap in ledger.gaps if gap.last >= gap.first])
        anew.rows.set_state("gaps", gaps)
    anew.rows.set_state("wal", pairing.ANEW)
    anew.set_head(ledger, ledger.end)
    return Refolded(ledger)


def refold(database: Database, ledger: Callable[[], Ledger], *, why: str = "") -> Refolded:
    """Make the catalog's file anew from the log. Entries that the log has lost come from the catalog's copy.

    Args:
        ledger: reads what follows from the log; called if another process has just made the catalog.
        why: what is wrong with the catalog, in one word; empty if nothing is. If it is `missing`, a catalog that is
            there by now stays.

    Raises:
        Corrupt: if the log and the copy tell different histories.
        StorageError: if the folder cannot be written.
    """
    with storage_errors(database.root):
        database.journal.create()
        tries = 0
        while True:
            try:
                with database.journal.locked():
                    refolded = refold_locked(database, why=why)
                return refolded or Refolded(ledger())
            except StorageError as error:
                # SQLite fails oddly where its files are deleted under it.
                tries += 1
                if tries == _TRIES or not isinstance(error.__cause__, sqlite3.Error):
                    raise
                _logger.debug("%s; once more", error)


def refold_locked(database: Database, *, why: str = "") -> Refolded | None:
    """See `refold`; the caller has locked the log. None if another process has just made a catalog that was missing."""
    database.close()
    usable = _usable(database)
    if usable is not None and why == "missing":
        usable.close()
        return None
    if why:
        _logger.warning("%s is %s; it is made anew from the log", database.path, why)
    # The process that was making or migrating it may have been killed.
    durable.sync_folder(database.root)
    with contextlib.ExitStack() as stack:
        set_aside, copy, rescued = None, usable, list[int]()
        if usable is None:
            rescued = _rescued(database)
            set_aside = _set_aside(database)
            copy = _copy_in(database, set_aside)
            _touch(database)
            usable = database.connect(database.path)
        stack.callback(usable.close)
        if copy is not None:
            stack.callback(copy.close)
        with database.errors():
            usable.execute("PRAGMA foreign_keys = OFF")
            usable.execute("BEGIN EXCLUSIVE")
            try:
                refolded = refold_in_place(database, Change(usable, Material(database.store)), copy)
                usable.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    usable.execute("ROLLBACK")
                raise
        pairing.close_made(database.path, usable)
    return refolded._replace(set_aside=set_aside, healed=[*rescued, *refolded.healed])


def _rescued(database: Database) -> list[int]:
    """Give the folder's log what only the copy in an unusable catalog has, before that catalog gets another name.

    Nobody would look for it there after a crash.

    Returns:
        The numbers of the entries.

    Raises:
        Corrupt: if the log and the copy tell different histories.
    """
    copy = _copy_in(database, NAME)
    if copy is None:
        return []
    journal, lacks = database.journal, False
    with contextlib.closing(copy):
        for item in history(journal, copy):
            if isinstance(item, Fork):
                # It keeps its name, so that the next program refuses it as well.
                raise _forked(database, item)
            lacks = lacks or (isinstance(item, Placed) and item.start is None)
        if not lacks:
            return []
        journal.sync()
        return _healed(journal, copy) or []


def _forked(database: Database, fork: Fork) -> Corrupt:
    return Corrupt(f"{database.root}: {fork}", "put the newer one back, or remove the other")


def _healed(
    journal: Journal, copy: sqlite3.Connection | None, accepted: Sequence[range] = ()
) -> list[int] | None:
    """Write segments of the folder's log anew that lack what the catalog's copy has, or hold what is no entry.

    Args:
        accepted: numbers of entries that were accepted as lost.

    Returns:
        The numbers of the entries that were brought back; None if no segment was written.
    """
    segments, healed = heal(journal, history(journal, copy), accepted)
    if not segments:
        return None
    _logger.warning(
        "%s is damaged: %s was written again from the catalog's copy, with %d entries that it had lost",
        journal.folder,
        ", ".join(journal.path(one).name for one in segments),
        len(healed),
    )
    return healed


def _usable(database: Database) -> sqlite3.Connection | None:
    """A connection to the present catalog, if SQLite can read it from end to end and nothing odd is in it.

    Raises:
        Unsupported: if a newer program made it.
    """
    if places.status_of(database.path) is None:
        return None
    connection = None
    try:
        connection = database.connect(database.path)
        with database.errors():
            database.is_sound(connection)
            check = "PRAGMA integrity_check(1)"
            if schema.is_plain(connection) and connection.execute(check).fetchone() == ("ok",):
                return connection
    except Damaged:
        pass
    except BaseException:
        if connection is not None:
            connection.close()
        raise
    if connection is not None:
        connection.close()
    return None


def _copy_in(database: Database, name: str | None) -> sqlite3.Connection | None:
    """A connection to a catalog that cannot be used, under its name or another, if it may have copies of entries."""
    if name is None:
        return None
    try:
        connection = database.connect(database.path.with_name(name))
    except RegistryError:
        return None
    with contextlib.suppress(*UNREADABLE):
        if schema.is_ours(connection):
            return connection
    connection.close()
    return None


def _touch(database: Database) -> None:
    """Make an empty file with the mode that the umask gives; SQLite would keep a group from writing."""
    # SQLite would take files that are left beside a removed catalog for those of the new one.
    for part in PARTS[1:]:
        durable.unlink(database.path.with_name(NAME + part))
    with contextlib.suppress(FileExistsError):
        os.close(places.open_file(database.path, os.O_RDWR | os.O_CREAT | os.O_EXCL))


def _set_aside(database: Database) -> str | None:
    """Give a catalog that cannot be read another name; None if there is none."""
    status = places.status_of(database.path)
    if status is None:
        return None
    places.refuse_odd(status, database.path)
    name = f"{NAME}.damaged-{time.time_ns()}"
    for part in reversed(PARTS):
        path = database.path.with_name(NAME + part)
        if places.status_of(path) is not None:
            durable.rename(path, path.with_name(name + part))
    return name
