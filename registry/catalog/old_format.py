"""Leaving format 1: reading the catalog and the journal of version 0.1, and taking a registry to the present format."""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
from collections.abc import Collection

from registry.catalog import pairing, schema
from registry.catalog.change import Change
from registry.catalog.copies import Material
from registry.catalog.database import OLD, UNREADABLE, Damaged, Database
from registry.catalog.refolding import add_copy, begin_copy, fill_anew
from registry.log import entries, format1, settings
from registry.log.journal import BEGINNING
from registry.log.ledger import Ledger
from registry.store import durable, places
from registry.store.errors import Corrupt, storage_errors

_logger = logging.getLogger(__name__)


class OldFormat:
    """A registry of format 1."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def ledger(self) -> Ledger:
        """What would follow from the log if the registry had the present format."""
        database = self._database
        connection = self._catalog()
        try:
            found = self._read(connection)
        finally:
            if connection is not None:
                connection.close()
        for problem in found.problems:
            _logger.warning("%s: %s", database.root, problem)
        ledger = Ledger()
        for records in format1.entries_of(database.store, found.state):
            ledger.take(entries.write(ledger.seq + 1, ledger.digest, records))
        return ledger

    def problems(self) -> list[str]:
        """Where the journal and the catalog differ, in words."""
        with contextlib.closing(self._catalog() or sqlite3.connect(":memory:")) as old:
            return self._read(old if schema.version(old) else None).problems

    def migrate(self, *, chooses: bool = False) -> list[str]:
        """Take the registry to the present format, wholly or not at all; old files stay until the next gc.

        Args:
            chooses: go by the journal where it and the catalog differ.

        Returns:
            Where they differed, in words.

        Raises:
            Corrupt: if they differ; nothing was changed.
            StorageError: if the folder cannot be written.
        """
        database = self._database
        database.check_writable()
        with storage_errors(database.root):
            database.journal.create()
            with database.journal.locked():
                database.look_for_another_format()
                return self._migrate(chooses) if database.format == 1 else []

    def _migrate(self, chooses: bool) -> list[str]:
        """See `migrate`; the caller has locked the log."""
        database = self._database
        database.close()
        _logger.info("%s: has format 1, and gets format %d", database.root, settings.FORMAT)
        old = self._catalog()
        try:
            with database.errors():
                if old is not None:
                    durable.unlink(database.path.with_name(OLD))
                    with contextlib.closing(sqlite3.connect(database.path.with_name(OLD))) as copy:
                        old.backup(copy)
                    old.execute("BEGIN EXCLUSIVE")
                found = self._read(old)
                if found.problems and not chooses:
                    raise Corrupt(
                        f"{database.root}: {found.problems[0]}",
                        "nothing was changed, registry rebuild goes by the journal",
                    )
                ledger = self._written(found.state, old)
                settings.switch_format(database.root)
                database.format = settings.FORMAT
                if old is not None:
                    # In its place, so that old programs that have it open refuse it.
                    fill_anew(database, Change(old, Material(database.store)), ledger)
                    old.execute("COMMIT")
                    pairing.close(database.path, old)
        finally:
            if old is not None:
                old.close()
            if database.format == 1:
                durable.unlink(database.path.with_name(OLD))
        return found.problems

    def _written(self, state: format1.State, old: sqlite3.Connection | None) -> Ledger:
        """Write the log of the present format, and return what follows from it.

        Args:
            old: the catalog, which gets the copies.
        """
        database, journal = self._database, self._database.journal
        # An interrupted migration may have left some.
        journal.remove(journal.segments())
        if old is not None:
            begin_copy(old)
        ledger, end = Ledger(), BEGINNING
        for records in format1.entries_of(database.store, state):
            entry = entries.write(ledger.seq + 1, ledger.digest, records)
            ledger.take(entry)
            if old is not None:
                add_copy(old, entry)
            end = ledger.end = journal.append(entry, end)
        if ledger.voids:
            raise Corrupt(f"{database.root}: {ledger.voids[0].problem}; nothing was changed")
        return ledger

    def _catalog(self) -> sqlite3.Connection | None:
        """A connection to the catalog; None if it is lost or cannot be read."""
        database = self._database
        if places.status_of(database.path) is None:
            return None
        mode = "mode=rw" if database.is_writable else "mode=ro"
        try:
            connection = database.connect(database.path, mode, is_ours=False)
        except Damaged:
            return None
        with contextlib.suppress(*UNREADABLE):
            is_whole = connection.execute("PRAGMA integrity_check(1)").fetchone() == ("ok",)
            odd = "SELECT 1 FROM sqlite_master WHERE type IN ('view', 'trigger')"
            if is_whole and not connection.execute(odd).fetchone() and schema.version(connection) is not None:
                return connection
        connection.close()
        return None

    def _read(self, connection: sqlite3.Connection | None) -> format1.Found:
        """The journal and the catalog, compared.

        Args:
            connection: to the catalog; None if it is lost.
        """
        database = self._database
        self._refuse_newer(None)
        catalog = None if connection is None else lambda: _tables(connection)
        found = format1.read(database.root, database.store, catalog)
        self._refuse_newer(found.state.versions)
        return found

    def _refuse_newer(self, known: Collection[str] | None) -> None:
        """Check that the log holds no more than an interrupted migration leaves.

        Args:
            known: ids of the versions that the old journal and catalog know. If None, only the operations are checked:
                a migration writes few of them.

        Raises:
            Corrupt: if the registry has had the present format already.
        """
        database = self._database
        for line in database.journal.read():
            for record in line.entry.records if line.entry else ():
                is_unknown = known is not None and record["op"] == "publish" and record["id"] not in known
                if record["op"] not in format1.WRITTEN or is_unknown:
                    raise Corrupt(
                        f"{database.root / settings.NAME}: says format 1, but the log has had format "
                        f"{settings.FORMAT}, as when an old copy of that file was put back",
                        f"write format = {settings.FORMAT} there",
                    )


def _tables(connection: sqlite3.Connection) -> format1.Catalog:
    """What the catalog of format 1 says.

    Raises:
        Corrupt: if it does not have the tables of format 1.
    """
    state = format1.State()
    rows = connection.execute
    try:
        state.versions = {row[0]: row[1:] for row in rows("SELECT id, model, version FROM versions")}
        state.next = dict(rows("SELECT name, next_version FROM models").fetchall())
        state.aliases = {row[:2]: row[2] for row in rows("SELECT model, name, id FROM aliases")}
        state.tags = {tuple(row) for row in rows("SELECT id, name FROM tags")}
        state.notes = {tuple(row) for row in rows("SELECT id, written, text FROM notes")}
        runs = rows("SELECT name, model, started, record FROM runs").fetchall()
        state.runs = {name: (model, at, json.loads(record)) for name, model, at, record in runs}
        artifacts = rows("SELECT key, id, created, record FROM artifacts").fetchall()
        state.artifacts = {key: (found, at, json.loads(record)) for key, found, at, record in artifacts}
        used = "SELECT digest FROM packs WHERE number IN (SELECT pack FROM uses) ORDER BY number"
        state.packs = [row[0] for row in rows(used)]
        ((applied,),) = rows("SELECT value FROM state WHERE key = 'journal'")
        return format1.Catalog(state, int(applied))
    except (sqlite3.Error, ValueError, TypeError) as error:
        raise Corrupt(f"the catalog of format 1 cannot be read: {error}") from None
