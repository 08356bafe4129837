"""The catalog: which checkpoints exist, what they are called, and where their tensors lie. Plain SQL.

A change is a short exclusive transaction that writes one journal line for each thing it does (see
`registry.journal`) and applies the same lines to the tables, so the tables never hold what the journal could not
bring back. Rollback journal with full sync: write-ahead logging is unsafe on network file systems.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry import schema
from registry.journal import Journal
from registry.store.errors import Corrupt, Invalid, NotFound, RegistryError, StorageError, Unsupported
from registry.store.text import quoted

if TYPE_CHECKING:
    from registry.change import Change
    from registry.store.location import Location
    from registry.store.pack import PackInfo
    from registry.store.store import Store

NAME = "catalog.sqlite"
BUSY_SECONDS = 60


class Catalog:
    """The catalog of one registry; safe to use from several threads and after a fork.

    Args:
        root: the registry's folder.
        store: gives the store, whose manifests and packs a change reads.
    """

    def __init__(self, root: Path, store: Callable[[], Store]) -> None:
        self.path = root / NAME
        self.journal = Journal(root / "manifests")
        self._store = store
        self._local = threading.local()

    # -- connections -------------------------------------------------------------------------------------

    def create(self) -> None:
        """Create an empty catalog, unless there is one, or another process makes it at this moment."""
        self._touch()
        connection = self._connect(create=True)
        with contextlib.closing(connection), self._errors(), _transaction(connection):
            if not connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
                schema.create(connection)

    def _touch(self) -> None:
        """Make an empty file unless there is one, by the umask; SQLite would keep a group from writing."""
        from registry.store import durable

        with durable.storage_errors(self.path):
            durable.append(self.path, b"")

    def connection(self) -> sqlite3.Connection:
        """This thread's connection in this process."""
        local = self._local
        if getattr(local, "pid", None) != os.getpid():
            local.connection = self._opened()
            local.pid = os.getpid()
            self._recover()
        return local.connection  # type: ignore[no-any-return]

    def _recover(self) -> None:
        """Finish a change that a crash interrupted; a folder that cannot be written is read as it is."""
        if os.access(self.path, os.W_OK) and self.behind():
            with contextlib.suppress(StorageError):
                self.catch_up()

    def close(self) -> None:
        """Close this thread's connection."""
        if getattr(self._local, "pid", None) == os.getpid():
            self._local.connection.close()
            del self._local.pid

    def _opened(self) -> sqlite3.Connection:
        if not self.path.exists():
            raise Corrupt(f"{self.path}: the catalog is missing; recreate it with: registry rebuild")
        connection = self._connect()
        try:
            with self._errors():
                version = self._schema(connection)
                if version is None:
                    raise Corrupt(f"{self.path}: tables are missing; recreate it with: registry rebuild")
                if version < schema.VERSION:
                    with _transaction(connection):
                        schema.migrate(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _connect(self, *, create: bool = False) -> sqlite3.Connection:
        writable = os.access(self.path.parent, os.W_OK) and (create or os.access(self.path, os.W_OK))
        mode = "rwc" if create else "rw" if writable else "ro"
        with self._errors():
            connection = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode={mode}",
                uri=True,
                timeout=BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,
            )
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA trusted_schema = OFF")
            if mode != "ro":  # another program may have left the file with a write-ahead log
                connection.execute("PRAGMA journal_mode = DELETE")
        return connection

    def _schema(self, connection: sqlite3.Connection) -> int | None:
        """The version of the schema; None if there are no tables to say it.

        Raises:
            Unsupported: if it is newer than this program.
        """
        version = schema.version(connection)
        if version is not None and version > schema.VERSION:
            raise Unsupported(
                f"{self.path} has schema {version}, this version knows up to {schema.VERSION}; upgrade with: "
                "pip install -U torch-registry"
            )
        return version

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Say what a failing database means and what to do."""
        try:
            yield
        except sqlite3.OperationalError as error:
            text = str(error)
            if "full" in text:
                raise StorageError(
                    f"{self.path}: no space left on the device; free some and repeat"
                ) from error
            if "readonly" in text or "unable to open" in text:
                raise StorageError(
                    f"{self.path}: cannot be written ({text}); ask its owner for access"
                ) from error
            if "locked" in text:
                raise StorageError(
                    f"{self.path}: another process has kept the catalog locked for {BUSY_SECONDS} s; repeat"
                ) from error
            if "no such" in text:
                raise Corrupt(f"{self.path}: {text}; recreate it with: registry rebuild") from error
            raise StorageError(f"{self.path}: {text}; check the disk") from error
        except UnicodeEncodeError as error:
            raise Invalid(f"{quoted(error.object)} is not valid Unicode text") from None
        except sqlite3.DatabaseError as error:
            raise Corrupt(f"{self.path}: {error}; recreate it with: registry rebuild") from error

    # -- changing ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def change(self) -> Iterator[Change]:
        """An exclusive transaction; what was done in it happens wholly or not at all."""
        from registry.change import Change
        from registry.store.durable import storage_errors

        connection = self.connection()
        with self._errors(), storage_errors(self.path):
            connection.execute("BEGIN IMMEDIATE")
            appended: tuple[int, int] | None = None
            try:
                change = Change(connection, self._store())
                self._catch_up(change)
                change.records.clear()
                yield change
                if change.records:
                    before = self.journal.size()
                    self.journal.append(change.records)
                    appended = before, self.journal.size()
                    self._set_applied(connection, appended[1])
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                if appended:
                    self._withdraw(*appended)
                raise

    def behind(self) -> bool:
        """Whether the journal holds changes that the catalog has not applied."""
        return self._applied(self.connection()) < self.journal.size()

    def catch_up(self) -> None:
        """Apply what the journal holds and the catalog does not: a change that a crash interrupted."""
        with self.change():
            pass

    def rebuild(self, packs: Iterable[PackInfo], adopted: Sequence[Mapping[str, Any]]) -> None:
        """Make the tables anew and fill them from packs, journal and manifests, in one transaction.

        What was in the file before does not matter, as long as SQLite can read it. A file without tables, which is left
        where this fails in place of a lost one, is no catalog. What cannot be applied is left out.

        Args:
            packs: every pack in the store.
            adopted: records for manifests that the journal does not know, to be journalled now.
        """
        from registry.change import Change
        from registry.store.durable import storage_errors

        self._touch()
        connection = self._connect(create=True)
        with (
            contextlib.closing(connection),
            self._errors(),
            storage_errors(self.path),
            _transaction(connection, "EXCLUSIVE"),
        ):
            self._schema(connection)
            schema.drop(connection)
            schema.create(connection)
            change = Change(connection, self._store())
            for pack in packs:
                change.add_pack(pack, replace=())
            self._catch_up(change, leave_out=(NotFound, Corrupt))
            if adopted:
                for record in adopted:
                    with contextlib.suppress(NotFound, Corrupt):
                        change.apply(record)
                self.journal.append(adopted)
                self._set_applied(connection, self.journal.size())

    def _catch_up(self, change: Change, leave_out: tuple[type[RegistryError], ...] = (NotFound,)) -> None:
        applied = self._applied(change.connection)
        size = self.journal.size()
        if size == applied:
            return
        if (
            size < applied
        ):  # the journal was lost or restored from a backup: write down what the catalog knows
            self.journal.append(list(self.dump(change.connection)))
        else:
            self.journal.drop_torn_end(applied)
            for line in self.journal.read(applied):
                if line.record is not None:
                    with contextlib.suppress(
                        *leave_out
                    ):  # its manifest is gone: rolled back, or removed later
                        change.apply(line.record)
        self._set_applied(change.connection, self.journal.size())

    def _withdraw(self, before: int, after: int) -> None:
        """Take a journal line back whose transaction failed, unless another process has applied it since."""
        connection = self.connection()
        with contextlib.suppress(sqlite3.Error, OSError):
            connection.execute("BEGIN IMMEDIATE")
            try:
                if self.journal.size() == after and self._applied(connection) <= before:
                    self.journal.truncate(before)
            finally:
                connection.execute("ROLLBACK")

    @staticmethod
    def _applied(connection: sqlite3.Connection) -> int:
        row = connection.execute("SELECT value FROM state WHERE key = 'journal'").fetchone()
        if row is None:
            raise Corrupt("the catalog does not say how much of the journal it holds; run: registry rebuild")
        return int(row[0])

    @staticmethod
    def _set_applied(connection: sqlite3.Connection, size: int) -> None:
        connection.execute("UPDATE state SET value = ? WHERE key = 'journal'", (size,))

    @staticmethod
    def dump(connection: sqlite3.Connection) -> Iterator[dict[str, Any]]:
        """Journal records that would bring back what the catalog holds."""
        rows = connection.execute
        for name, model, started, record in rows("SELECT name, model, started, record FROM runs"):
            yield {"op": "run", "name": name, "model": model, "at": started, "record": parsed(record)}
        for id, model, version in rows("SELECT id, model, version FROM versions ORDER BY model, version"):
            yield {"op": "publish", "id": id, "model": model, "version": version}
        for name, version in rows("SELECT name, next_version FROM models"):
            yield {"op": "next", "model": name, "version": version}
        for model, name, id in rows("SELECT model, name, id FROM aliases"):
            yield {"op": "alias", "model": model, "alias": name, "id": id}
        for id, name in rows("SELECT id, name FROM tags"):
            yield {"op": "tag", "id": id, "tag": name}
        for id, written, text in rows("SELECT id, written, text FROM notes"):
            yield {"op": "note", "id": id, "at": written, "text": text}
        for key, id, created, record in rows("SELECT key, id, created, record FROM artifacts"):
            yield {"op": "artifact", "key": key, "id": id, "at": created, "record": parsed(record)}

    # -- reading -----------------------------------------------------------------------------------------

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query that only reads."""
        with self._errors():
            return self.connection().execute(sql, parameters).fetchall()

    def locate(self, digests: Collection[str]) -> dict[str, Location]:
        """Where stored tensors lie (the store's index)."""
        from registry.change import locate

        with self._errors():
            return locate(self.connection(), digests)


def parsed(record: str) -> Any:
    """A record that a table holds as JSON.

    Raises:
        Corrupt: if it is damaged.
    """
    try:
        return json.loads(record)
    except ValueError as error:
        raise Corrupt(
            f"the catalog holds a damaged record ({error}); recreate it with: registry rebuild"
        ) from None


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    connection.execute(f"BEGIN {kind}")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise
