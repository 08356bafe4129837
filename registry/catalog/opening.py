"""Opening: from a registry's folder to a connection that shows what the log says, whatever state the catalog is in."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable
from typing import NamedTuple

from registry.catalog import pairing
from registry.catalog.copies import Material, is_behind, text_in
from registry.catalog.database import ALONE, Damaged, Database, in_memory, let_go
from registry.store.errors import Corrupt, StorageError, storage_errors

_ATTEMPTS = 3

_logger = logging.getLogger(__name__)


class Opened(NamedTuple):
    """A connection, and the identity of the file or log that it shows; see `Database.identity`."""

    connection: sqlite3.Connection
    identity: object


class Opening:
    """Opens a catalog as the log says it is.

    In this order: the catalog's file, once it has caught up; the file made anew; and where that cannot be written, the
    file as it is, a copy of it in memory with what it lacks, or a catalog made in memory from the log.

    Args:
        refold: makes the catalog's file anew, and is told what is wrong with the present one.
    """

    def __init__(self, database: Database, refold: Callable[[str], object]) -> None:
        self._database = database
        self._refold = refold

    def opened(self, *, writes: bool = False) -> Opened:
        """A connection to a catalog that shows what the log says, and its identity.

        Args:
            writes: whether it must be to the catalog's file, even if that is behind the log.

        Raises:
            NotFound: if the registry is not there any more.
            Corrupt: if the log and the catalog's copy of it tell different histories, or the disk does not keep what is
                written.
            StorageError: if it cannot be opened.
        """
        with storage_errors(self._database.root):
            return self._opened(writes=writes)

    def _opened(self, *, writes: bool) -> Opened:
        """See `opened`; the system's errors are raised as they are."""
        database = self._database
        database.check_is_there()
        if database.format == 1:
            return self._made_in_memory()
        if not database.is_writable:
            if database.shared is not None:
                _logger.warning(
                    "%s cannot be written, so that what other hosts add to %s is not seen",
                    database.root,
                    database.shared.url,
                )
            return self._opened_to_read("mode=ro", ALONE)
        for _ in range(_ATTEMPTS):
            identity = database.identity()
            try:
                found = None if identity is None else self._as_it_is(identity, writes)
            except StorageError as error:
                if identity != database.identity():
                    # It was deleted, or made anew, at this moment.
                    continue
                if writes:
                    raise
                # On a full disk SQLite opens nothing, not even to read it.
                _logger.warning("%s", error)
                return self._opened_to_read(ALONE)
            found = found or self._made_anew(identity, writes)
            if found is not None:
                return found
        raise Corrupt(f"{database.path}: the catalog does not stay as it is made", "check the disk")

    def _as_it_is(self, identity: object, writes: bool) -> Opened | None:
        """The catalog's file as it lies there, once it has caught up; None if it has to be made anew."""
        database = self._database
        connection = None
        try:
            alone = database.alone()
            connection = database.connect(database.path)
            with database.errors():
                found = self._caught_up(connection, identity, alone, writes=writes)
                if found is not None:
                    return found
        except Damaged as error:
            _logger.warning("%s", error)
        except BaseException:
            if connection is not None:
                self._let_go(connection, identity, is_whole=False)
            raise
        if connection is not None:
            self._let_go(connection, identity, is_whole=False)
        return None

    def _caught_up(
        self, connection: sqlite3.Connection, identity: object, alone: pairing.Alone, *, writes: bool
    ) -> Opened | None:
        """The catalog of a connection, or a copy in memory with what it lacks; None if it has to be made anew."""
        database = self._database
        if not database.is_sound(connection):
            return None
        self._check_pairing(connection, alone)
        if database.shared is not None and database.shared.is_due() and not writes:
            # Lazy: start-up.
            from registry.catalog.transactions import ask_others

            ask_others(database, connection, identity)
        if is_behind(connection, database.journal) and not writes:
            # Lazy: start-up.
            from registry.catalog.transactions import finish_interrupted

            is_done = finish_interrupted(database, connection, identity)
            if not is_done and is_behind(connection, database.journal):
                found = self._ahead_of(connection)
                self._let_go(connection, identity)
                return found
        return Opened(connection, identity) if identity == database.identity() else None

    def _let_go(self, connection: sqlite3.Connection, identity: object, *, is_whole: bool = True) -> None:
        path = self._database.path
        let_go(path, connection, identity=identity, pid=os.getpid(), is_whole=is_whole)

    def _made_anew(self, identity: object, writes: bool) -> Opened | None:
        """Make the catalog's file anew, to be opened again; where it cannot be written, a catalog in memory."""
        try:
            self._refold("missing" if identity is None else "damaged")
        except StorageError as error:
            if writes:
                raise
            # As on a full disk, where it can be read all the same.
            _logger.warning("%s", error)
            return self._made_in_memory()
        return None

    def _opened_to_read(self, *modes: str) -> Opened:
        """A connection where nothing can be written: to the file in the first mode that works, else in memory."""
        identities = {"mode=ro": self._database.identity(), ALONE: self._database.still()}
        for mode in modes:
            identity = identities[mode]
            found = None if identity is None else self._as_it_can_be_read(mode, identity)
            if found is not None:
                return found
        return self._made_in_memory()

    def _as_it_can_be_read(self, mode: str, identity: object) -> Opened | None:
        """The catalog's file, or a copy in memory with what it lacks; None if it cannot be opened, or is not whole."""
        database = self._database
        alone = database.alone()
        connection = database.connect(database.path, mode)
        try:
            with database.errors():
                if database.is_sound(connection) and identity == database.identity(identity):
                    self._check_pairing(connection, alone)
                    if not is_behind(connection, database.journal):
                        return Opened(connection, identity)
                    found = self._ahead_of(connection)
                    connection.close()
                    return found
        except (Damaged, StorageError) as error:
            # SQLite cannot make the files that a write-ahead log needs.
            _logger.debug("%s", error)
        except BaseException:
            connection.close()
            raise
        connection.close()
        return None

    def _check_pairing(self, connection: sqlite3.Connection, alone: pairing.Alone) -> None:
        """Check that the catalog's file and the write-ahead log beside it belong together.

        Args:
            alone: the catalog's file as it was before it was opened.

        Raises:
            Damaged: if they do not.
        """
        database = self._database
        for wait in (0.01, 0.1):
            if pairing.is_paired(database.path, connection, alone=alone, journal=database.journal):
                return
            # Another process may move changes from one to the other at this moment.
            time.sleep(wait)
            alone = database.alone()
        if not pairing.is_paired(database.path, connection, alone=alone, journal=database.journal):
            raise Damaged(
                f"{database.path}: may be incomplete, or not belong to the write-ahead log beside it"
            )

    def _ahead_of(self, connection: sqlite3.Connection) -> Opened:
        """A copy of the catalog in memory, with the entries that the file cannot take, as on a full disk."""
        # Lazy: start-up.
        from registry.catalog.change import Change
        from registry.catalog.transactions import catch_up

        database = self._database
        state = database.log_state()
        copy = in_memory()
        with storage_errors(database.root):
            connection.backup(copy)
            # Without this, the rows that belong to a removed version would stay.
            copy.execute("PRAGMA foreign_keys = ON")
            catch_up(database, Change(copy, Material(database.store, text_in(copy))), heals=False)
        copy.execute("PRAGMA query_only = ON")
        return Opened(copy, state)

    def _made_in_memory(self) -> Opened:
        """A catalog made from the log for this process alone, where the folder's own cannot be read or written."""
        # Lazy: start-up.
        from registry.catalog.change import Change
        from registry.catalog.old_format import OldFormat
        from registry.catalog.refolding import begin_copy, fill_anew, refold_in_place

        database = self._database
        state = database.old_state() if database.format == 1 else database.log_state()
        connection = in_memory()
        with database.errors(), storage_errors(database.root):
            change = Change(connection, Material(database.store))
            if database.format == 1:
                begin_copy(connection)
                fill_anew(database, change, OldFormat(database).ledger())
            else:
                refold_in_place(database, change, None, heals=False)
        connection.execute("PRAGMA query_only = ON")
        return Opened(connection, state)
