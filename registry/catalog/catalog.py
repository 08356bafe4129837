"""The catalog: what follows from the log, in plain SQL, with a copy of the log itself.

It is a view, and holds nothing of its own: a catalog that is missing, damaged, or of another program's making is made
anew from the log. A change is one entry of the log, computed and applied in one exclusive transaction.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sqlite3
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from registry.catalog import pairing, schema, settings
from registry.catalog.journal import BEGINNING, Journal, Position
from registry.catalog.lookups import locate
from registry.store import durable, places
from registry.store.errors import (
    Corrupt,
    Invalid,
    NotFound,
    RegistryError,
    StorageError,
    Unsupported,
    storage_errors,
)
from registry.store.places import is_local
from registry.store.text import printable, quoted

if TYPE_CHECKING:
    from registry.catalog import format1
    from registry.catalog.change import Change
    from registry.catalog.entries import Entry, Record
    from registry.catalog.history import End, Fork, Gap, Placed
    from registry.catalog.ledger import Ledger
    from registry.store.locating import Location
    from registry.store.manifest import Manifest
    from registry.store.pack import PackInfo
    from registry.store.store import Store

NAME = "catalog.sqlite"
OLD = "catalog.sqlite.format1"
"""What the catalog of format 1 is called once the present format has taken its place."""

BUSY_SECONDS = 60
_PARTS = ("", "-wal", "-shm", "-journal", pairing.WHOLE)
"""What is added to the name of the database for the files beside it; the last one is our own."""

_ALONE = "mode=ro&immutable=1"
"""How SQLite opens a database as if nobody else had it, without what lies beside it."""

_TRIES = 4
_UNREADABLE = (sqlite3.Error, UnicodeDecodeError)
"""What reading a damaged database raises; the second where its own message holds what is damaged."""

_LOOK_AGAIN = 1.0
"""Seconds after which a connection that stays open looks whether the log has what the catalog could not take."""

_LONGEST = 256 << 20
"""Bytes of a value that SQLite may make, so that a forged table cannot ask for more memory."""

_logger = logging.getLogger(__name__)


class Damaged(Corrupt):
    """The catalog contradicts itself; made anew, it will not."""


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


class View:
    """The catalog inside a change: what is read here holds until the change is made.

    Attributes:
        store: the manifests and packs.
    """

    def __init__(self, connection: sqlite3.Connection, store: Store) -> None:
        self._connection = connection
        self.store = store

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query that only reads."""
        return self._connection.execute(sql, parameters).fetchall()

    def locate(self, digests: Collection[str]) -> dict[str, Location]:
        """Where stored tensors lie."""
        return locate(self.query, digests)

    def next_version(self, model: str) -> int:
        """The number of a model's next version.

        Raises:
            Damaged: if the catalog contradicts itself.
        """
        rows = self.query("SELECT next_version, next_again FROM models WHERE name = ?", [model])
        ((newest,),) = self.query("SELECT MAX(version) FROM versions WHERE model = ?", [model])
        number, again = rows[0] if rows else (1, 1)
        if type(number) is not int or number != again or (newest or 0) >= number:
            raise Damaged(f"the catalog does not know the next version of {model}; run: registry rebuild")
        return number


class Catalog:
    """The catalog of one registry; safe to use from several threads and after a fork.

    Args:
        root: the registry's folder.
        store: gives the store, whose manifests and packs a change reads.
    """

    def __init__(self, root: Path, store: Callable[[], Store]) -> None:
        self.path = root / NAME
        self.format = settings.FORMAT
        self.journal = Journal(root)
        self._root = root
        self._store = store
        self._local = threading.local()

    # -- connections -------------------------------------------------------------------------------------

    def create(self, created_by: str) -> None:
        """Create a log and a catalog, unless there are some, or another process makes them at this moment.

        The log has a first entry before anything is saved, so that one that was lost can be told from one that is new.
        """
        self.journal.create()
        with self.journal.locked():
            if places.status_of(self.path) is None:
                self._refold("")

        def begin(view: View) -> list[Record]:
            is_new = not view.query("SELECT 1 FROM log LIMIT 1")
            return [{"op": "begin", "by": created_by}] if is_new else []

        self.commit(begin)

    def connection(self, *, writes: bool = False) -> sqlite3.Connection:
        """This thread's connection in this process.

        Args:
            writes: whether it must be to the catalog's file, even if that is behind the log.
        """
        if self.format == 1:
            self._look_for_another_format()
        local = self._local
        held: _Held | None = getattr(local, "held", None)
        if held is not None and held.pid != os.getpid():
            held = local.ledger = None
        if held is not None:
            if held.connection.in_transaction or self._is_current(held, writes):
                return held.connection
            self.close()  # It was made anew, or has changed where it is only read.
        local.held = held = _Held(self.path, *self._opened(writes))
        if writes:
            held.looked = -math.inf  # It may be behind the log, which a reader must notice.
        return held.connection

    def _is_current(self, held: _Held, writes: bool) -> bool:
        """Whether a connection shows what the log says; looked at again now and then, as a disk may have been full."""
        if held.identity != self._identity(held.identity):
            return False
        if isinstance(held.identity, _LogState | _Still):
            return not (writes and self.is_writable)
        if writes or held.looked + _LOOK_AGAIN > time.monotonic() or not isinstance(held.identity, _FileId):
            return True
        held.looked = time.monotonic()
        with self._errors():
            return not self._is_behind(held.connection)

    def close(self) -> None:
        """Close this thread's connection."""
        held: _Held | None = getattr(self._local, "held", None)
        if held is not None:
            held.close()
            self._local.held = None

    @property
    def is_writable(self) -> bool:
        """Whether this process may change the catalog."""
        return os.access(self._root, os.W_OK) and (
            os.access(self.path, os.W_OK) or not os.path.lexists(self.path)
        )

    def check_writable(self) -> None:
        """
        Raises:
            NotFound: if the registry is not there any more.
            StorageError: if this process may not change the catalog.
        """
        self._check_is_there()
        if not self.is_writable:
            raise StorageError(f"{self.path}: cannot be written; ask its owner for access")

    def _check_is_there(self) -> None:
        """
        Raises:
            NotFound: if the registry is not there any more.
        """
        if places.status_of(self.path) is None and not settings.are_there(self._root):
            raise NotFound(
                f"{self._root}: the registry was renamed or deleted meanwhile; open it by its new name"
            )

    def _identity(self, like: object = None) -> object:
        """What tells the catalog's file, or the log that one in memory was made from, from another that takes its place.

        Args:
            like: what was returned before.
        """
        if isinstance(like, _LogState):
            return self._log_state()
        if isinstance(like, _OldState):
            return self._old_state()
        if isinstance(like, _Still):
            return self._still()
        return _identity_of(self.path)

    def _still(self) -> _Still | None:
        """The state of a catalog that no process has open; None if one has, or may have."""
        status = places.status_of(self.path)
        if status is None or places.status_of(self.path.with_name(f"{NAME}-wal")) is not None:
            return None
        return _Still(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def _log_state(self) -> _LogState:
        segments = self.journal.segments()
        if not segments:
            return _LogState(0, 0, None)
        size = self.journal.size(segments[-1]) or 0
        return _LogState(segments[-1], size, self.journal.digest_before(Position(segments[-1], size)))

    def _opened(self, writes: bool = False) -> tuple[sqlite3.Connection, object]:
        """A connection to the catalog as the log says it is, and what tells its file.

        Args:
            writes: whether it must be to the catalog's file, even if that is behind the log.
        """
        self._check_is_there()
        if self.format == 1:
            return self._made_in_memory()
        if not self.is_writable:
            return self._opened_to_read("mode=ro", _ALONE)
        for _ in range(3):
            identity = self._identity()
            connection = None
            try:
                if identity is not None:
                    alone = self._alone()
                    connection = self._connect(self.path)
                    with self._errors():
                        if self._is_sound(connection):
                            self._check_pairing(connection, alone)
                            is_behind = self._is_behind(connection)
                            if is_behind and not writes and not self._caught_up(connection, identity):
                                found = self._ahead_of(connection)
                                _let_go(self.path, connection, identity, os.getpid())
                                return found
                            if identity == self._identity():
                                return connection, identity
            except Damaged as error:
                _logger.warning("%s", error)
            except BaseException as error:
                if connection is not None:
                    _let_go(self.path, connection, identity, os.getpid(), is_whole=False)
                if not isinstance(error, StorageError):
                    raise
                if identity != self._identity():
                    continue  # It was deleted, or made anew, at this moment.
                if writes:
                    raise
                _logger.warning("%s", error)  # On a full disk SQLite opens nothing, not even to read it.
                return self._opened_to_read(_ALONE)
            if connection is not None:
                _let_go(self.path, connection, identity, os.getpid(), is_whole=False)
            try:
                self.refold(why="missing" if identity is None else "damaged")
            except StorageError as error:
                if writes:
                    raise
                _logger.warning("%s", error)  # As on a full disk, where it can be read all the same.
                return self._made_in_memory()
        raise Corrupt(f"{self.path}: the catalog does not stay as it is made; check the disk")

    def _opened_to_read(self, *modes: str) -> tuple[sqlite3.Connection, object]:
        """A connection where nothing can be written: to the catalog in the first of some modes that works, else to one
        in memory."""
        identities = {"mode=ro": self._identity(), _ALONE: self._still()}
        for mode in modes:
            identity = identities[mode]
            if identity is None:
                continue
            alone = self._alone()
            connection = self._connect(self.path, mode)
            try:
                with self._errors():
                    if self._is_sound(connection) and identity == self._identity(identity):
                        self._check_pairing(connection, alone)
                        if not self._is_behind(connection):
                            return connection, identity
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
        return self._made_in_memory()

    def _alone(self) -> pairing.Alone:
        return pairing.look(self.path, lambda: self._connect(self.path, _ALONE))

    def _check_pairing(self, connection: sqlite3.Connection, alone: pairing.Alone) -> None:
        """
        Args:
            alone: the catalog's file as it was before it was opened.

        Raises:
            Damaged: if the catalog's file and the write-ahead log beside it do not belong together.
        """
        for wait in (0.01, 0.1):
            if pairing.is_paired(self.path, connection, alone, self.journal):
                return
            time.sleep(wait)  # Another process may move changes from one to the other at this moment.
            alone = self._alone()
        if not pairing.is_paired(self.path, connection, alone, self.journal):
            raise Damaged(f"{self.path}: may be incomplete, or not belong to the write-ahead log beside it")

    def _ahead_of(self, connection: sqlite3.Connection) -> tuple[sqlite3.Connection, object]:
        """A copy in memory with what the log has and the catalog cannot take, as on a full disk."""
        from registry.catalog.change import Change

        state = self._log_state()
        copy = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        with storage_errors(self._root):
            connection.backup(copy)
            self._catch_up(Change(copy, _Material(self._store(), self._text_in(copy))), heals=False)
        copy.execute("PRAGMA query_only = ON")
        return copy, state

    def _made_in_memory(self) -> tuple[sqlite3.Connection, object]:
        """A catalog made from the log for this process alone, where the folder's own cannot be read or written."""
        from registry.catalog.change import Change

        state = self._old_state() if self.format == 1 else self._log_state()
        connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        with self._errors(), storage_errors(self._root):
            change = Change(connection, _Material(self._store(), lambda _: None))
            if self.format == 1:
                connection.execute("CREATE TEMP TABLE history (seq INTEGER PRIMARY KEY, entry BLOB NOT NULL)")
                self._fill(change, self._old_ledger())
            else:
                self._refold_in_place(change, None, heals=False)
        connection.execute("PRAGMA query_only = ON")
        return connection, state

    # -- format 1 ----------------------------------------------------------------------------------------

    def _look_for_another_format(self) -> None:
        """Notice that another process has taken the registry to the present format."""
        self.format = settings.read_format(self._root)
        if self.format != 1:
            self.close()

    def _old_state(self) -> _OldState:
        """What shows that a registry of format 1 has changed."""
        from registry.catalog.format1 import journal_path

        found = (places.status_of(journal_path(self._root), inner=1), places.status_of(self.path))
        return _OldState(
            *(status and (status.st_size, status.st_mtime_ns, status.st_ino) for status in found)
        )

    def _old_catalog(self) -> sqlite3.Connection | None:
        """A connection to a catalog of format 1; None if it is lost or cannot be read."""
        if places.status_of(self.path) is None:
            return None
        try:
            connection = self._connect(self.path, "mode=rw" if self.is_writable else "mode=ro", is_ours=False)
        except Damaged:
            return None
        with contextlib.suppress(*_UNREADABLE):
            is_whole = connection.execute("PRAGMA integrity_check(1)").fetchone() == ("ok",)
            odd = "SELECT 1 FROM sqlite_master WHERE type IN ('view', 'trigger')"
            if is_whole and not connection.execute(odd).fetchone() and schema.version(connection) is not None:
                return connection
        connection.close()
        return None

    def _read_old(self, connection: sqlite3.Connection | None) -> format1.Found:
        from registry.catalog import format1

        self._refuse_newer(None)
        found = format1.read(self._root, self._store(), connection)
        self._refuse_newer(found.state.versions)
        return found

    def _refuse_newer(self, known: Collection[str] | None) -> None:
        """See that the log is at most what an interrupted change of format has left.

        Args:
            known: ids of the versions that the old journal and catalog know; if None, it is only seen
                whether the log has what such a change never writes.

        Raises:
            Corrupt: if the registry has had the present format already.
        """
        from registry.catalog.format1 import WRITTEN

        for line in self.journal.read():
            for record in line.entry.records if line.entry else ():
                is_unknown = known is not None and record["op"] == "publish" and record["id"] not in known
                if record["op"] not in WRITTEN or is_unknown:
                    raise Corrupt(
                        f"{self._root / settings.NAME}: says format 1, but the log has had format {settings.FORMAT}, as "
                        f"when an old copy of that file was put back; write format = {settings.FORMAT} there"
                    )

    def _old_ledger(self) -> Ledger:
        """What a registry of format 1 would say in the present format."""
        from registry.catalog import entries, format1
        from registry.catalog.ledger import Ledger

        connection = self._old_catalog()
        try:
            found = self._read_old(connection)
        finally:
            if connection is not None:
                connection.close()
        for problem in found.problems:
            _logger.warning("%s: %s", self._root, problem)
        ledger = Ledger()
        for records in format1.entries_of(self._store(), found.state):
            ledger.take(entries.write(ledger.seq + 1, ledger.digest, records))
        return ledger

    def migrate(self, *, chooses: bool = False) -> list[str]:
        """Take a registry of format 1 to the present format, wholly or not at all; old files stay until the next gc.

        Args:
            chooses: go by the journal where it and the catalog differ.

        Returns:
            Where they differed.

        Raises:
            Corrupt: if they differ; nothing was changed.
            StorageError: if the folder cannot be written.
        """
        self.check_writable()
        with storage_errors(self._root):
            self.journal.create()
            with self.journal.locked():
                self._look_for_another_format()
                return self._migrate(chooses) if self.format == 1 else []

    def _migrate(self, chooses: bool) -> list[str]:
        from registry.catalog import entries, format1
        from registry.catalog.change import Change
        from registry.catalog.ledger import Ledger

        self.close()
        _logger.info("%s: has format 1, and gets format %d", self._root, settings.FORMAT)
        old = self._old_catalog()
        try:
            with self._errors():
                if old is not None:
                    durable.unlink(self.path.with_name(OLD))
                    with contextlib.closing(sqlite3.connect(self.path.with_name(OLD))) as copy:
                        old.backup(copy)
                    old.execute("BEGIN EXCLUSIVE")
                found = self._read_old(old)
                if found.problems and not chooses:
                    raise Corrupt(
                        f"{self._root}: {found.problems[0]}; nothing was changed, registry rebuild goes by the journal"
                    )
                self.journal.remove(self.journal.segments())  # What an interrupted try has left.
                if old is not None:
                    old.execute("CREATE TEMP TABLE history (seq INTEGER PRIMARY KEY, entry BLOB NOT NULL)")
                ledger, end = Ledger(), BEGINNING
                for records in format1.entries_of(self._store(), found.state):
                    entry = entries.write(ledger.seq + 1, ledger.digest, records)
                    ledger.take(entry)
                    if old is not None:
                        row = (entry.seq, zlib.compress(entry.line, 1))
                        old.execute("INSERT INTO temp.history VALUES (?, ?)", row)
                    end = ledger.end = self.journal.append(entry, end)
                if ledger.voids:
                    raise Corrupt(f"{self._root}: {ledger.voids[0].problem}; nothing was changed")
                settings.switch_format(self._root)
                self.format = settings.FORMAT
                if old is not None:  # In its place, so that old programs that have it open refuse it.
                    self._fill(Change(old, _Material(self._store(), lambda _: None)), ledger)
                    old.execute("COMMIT")
                    pairing.close(self.path, old)
        finally:
            if old is not None:
                old.close()
            if self.format == 1:
                durable.unlink(self.path.with_name(OLD))
        return found.problems

    def _connect(self, path: Path, mode: str = "mode=rw", *, is_ours: bool = True) -> sqlite3.Connection:
        for part in _PARTS:
            beside = path.with_name(path.name + part)
            status = places.status_of(beside)
            if status is not None:
                places.refuse_odd(status, beside)
        with self._errors():
            connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?{mode}",
                uri=True,
                timeout=BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,
            )
            try:
                connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
                connection.execute("PRAGMA trusted_schema = OFF")
                connection.execute("PRAGMA foreign_keys = ON")
                if mode == "mode=rw" and is_ours:
                    self._set_mode(connection)
            except BaseException:
                connection.close()
                raise
        return connection

    def _set_mode(self, connection: sqlite3.Connection) -> None:
        """Let readers and a writer work side by side where the file system allows it.

        Either way a power cut leaves a consistent catalog. That it may have forgotten the last changes does no harm, as
        the log has them.
        """
        local = is_local(self._root)  # elsewhere SQLite's write-ahead log does not work
        mode = "wal" if local else "delete"
        end = time.monotonic() + BUSY_SECONDS
        while connection.execute("PRAGMA journal_mode").fetchone() != (mode,):
            try:
                connection.execute(f"PRAGMA journal_mode = {mode}")
            except sqlite3.OperationalError as error:  # SQLite does not wait for others here.
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(0.01)
        connection.execute(f"PRAGMA synchronous = {'NORMAL' if local else 'FULL'}")

    def _is_sound(self, connection: sqlite3.Connection) -> bool:
        """Whether the tables are those that this program makes.

        Raises:
            Unsupported: if a newer program made them.
        """
        version = schema.version(connection)
        if version is not None and version > schema.VERSION:
            raise Unsupported(
                f"{self.path} has schema {version}, this version knows up to {schema.VERSION}; upgrade with: "
                "pip install -U torch-registry"
            )
        return version == schema.VERSION and schema.is_ours(connection)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Say what a failing database means and what to do."""
        try:
            yield
        except sqlite3.OperationalError as error:
            text = printable(str(error))
            code = getattr(error, "sqlite_errorcode", None)
            if code == sqlite3.SQLITE_IOERR_SHORT_READ:
                # As where the write-ahead log was deleted under a program that has it open.
                raise Damaged(f"{self.path}: it, or what SQLite keeps beside it, was cut short") from error
            if "full" in text or code == sqlite3.SQLITE_IOERR_SHMSIZE:
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
            if "no such" in text or "decode" in text:
                raise Damaged(f"{self.path}: {text}; recreate it with: registry rebuild") from error
            limit = ", and what limits the size of files" if code == sqlite3.SQLITE_IOERR_WRITE else ""
            raise StorageError(f"{self.path}: {text}; check the disk{limit}") from error
        except UnicodeEncodeError as error:
            raise Invalid(f"{quoted(error.object)} is not valid Unicode text") from None
        except (sqlite3.DatabaseError, OverflowError, UnicodeDecodeError) as error:
            text = printable(str(error))
            raise Damaged(f"{self.path}: {text}; recreate it with: registry rebuild") from error

    # -- changing ----------------------------------------------------------------------------------------

    def commit(self, compute: Callable[[View], Sequence[Record]]) -> Entry | None:
        """Make one change: wholly, or not at all.

        Args:
            compute: says what is to be recorded, from what it reads in the view that it is given. It has no effect on
                anything else, and may be called several times.

        Returns:
            The entry of the log; None if there was nothing to record.

        Raises:
            RegistryError: from `compute`, or why the change cannot be made; nothing was changed then, but for a
                `StorageError` which says that the log has it.
        """
        if self.format == 1:
            self.migrate()
        for attempt in range(3):
            try:
                return self._commit(compute)
            except Replaced:
                self.close()
            except StorageError:
                self.close()  # The catalog may be behind the log.
                raise
            except Damaged as error:
                if attempt:
                    raise
                _logger.warning("%s", error)
                self.refold(why="damaged")
        raise Corrupt(f"{self.path}: the catalog does not stay as it is made; check the disk")

    def _commit(self, compute: Callable[[View], Sequence[Record]]) -> Entry | None:
        from registry.catalog import entries
        from registry.catalog.invariants import broken_by
        from registry.catalog.ledger import Refused

        store = self._store()
        entry: Entry | None = None
        connection = self.connection(writes=True)
        is_shown = True
        with self._exclusive(connection, self._local.held.identity) as change:
            self._catch_up(change)
            self._refuse_gaps(change)
            records = [dict(record) for record in compute(View(change.connection, store))]
            if not records:
                return None
            for record in records:
                entries.check_record(record)
            seq, digest, end = _head(change.connection)
            entry = entries.write(seq + 1, digest, records)
            try:
                change.take(entry)
            except Refused as error:
                raise Damaged(f"{self.path}: {error}; run: registry rebuild") from None
            if problem := broken_by(change, entry, store):
                raise Damaged(f"{self.path}: {problem}; run: registry rebuild")
            change.keep(entry)
            end = self.journal.append(entry, end)
            try:
                _set_head(change, entry, end)
                change.connection.execute("COMMIT")
            except sqlite3.Error as error:  # It has happened all the same: the log has it.
                is_shown = False
                with contextlib.suppress(sqlite3.Error):
                    change.connection.execute("ROLLBACK")
                _logger.warning(
                    "%s: %s; entry %d is in the log, and the catalog shows it once it can be written",
                    *(self.path, error, entry.seq),
                )
        if not is_shown:
            self.close()
        return entry

    @contextlib.contextmanager
    def _exclusive(self, connection: sqlite3.Connection, identity: object) -> Iterator[Change]:
        """A transaction that no other writer has beside it, even one with another catalog.

        Raises:
            Replaced: if the catalog's file is another one by now.
        """
        from registry.catalog.change import Change

        self.check_writable()
        with self._errors(), storage_errors(self.path), self.journal.locked():
            if identity != self._identity(identity):
                raise Replaced
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.Error:
                if identity != self._identity(identity):
                    raise Replaced from None
                raise
            try:
                change = Change(connection, _Material(self._store(), self._text_in(connection)))
                change.beside = pairing.after(self.path, connection, self._alone)
                yield change
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                raise
            if connection.in_transaction:
                connection.execute("COMMIT")

    def _refuse_gaps(self, change: Change) -> None:
        gaps = _state(change.connection, "gaps")
        if gaps:
            raise self._not_before(_gaps_in(gaps)[0])

    def adopt(self, compute: Callable[[Ledger], Sequence[Record]], reason: str) -> Entry | None:
        """Accept that what cannot be read in the log is lost, and go on behind it.

        Args:
            compute: says what else is to be recorded, from what follows from the readable entries.
            reason: why, for those who read the log.

        Returns:
            The entry of the log; None if there was nothing to record.

        Raises:
            StorageError: if the folder cannot be written.
        """
        from registry.catalog import entries

        connection = self.connection(writes=True)
        with self._exclusive(connection, self._local.held.identity) as change:
            ledger = self._refold_in_place(change, connection).ledger
            gaps = [[gap.first, gap.last] for gap in ledger.gaps if gap.last >= gap.first]
            accepted = [{"op": "adopt", "gaps": gaps, "reason": reason}] if gaps else []
            records = [*accepted, *compute(ledger)]
            if not records:
                return None
            for record in records:
                entries.check_record(record)
            entry = entries.write(ledger.seq + 1, ledger.digest, records)
            if (self.journal.size(ledger.end.segment) or 0) > ledger.end.offset:
                self.journal.cut(ledger.end)
            self.journal.append(entry, ledger.end)
            self._refold_in_place(change, connection)
        return entry

    def check_unbroken(self) -> None:
        """See that changes are possible, before anything is written for one.

        Raises:
            Corrupt: if entries of the log are lost, and nobody has accepted that.
        """
        if gaps := self.gaps():
            raise self._not_before(gaps[0])

    def _not_before(self, gap: object) -> Corrupt:
        advice = "nothing can be changed before: registry rebuild --adopt"
        return Corrupt(f"{self.journal.folder}: {gap}; {advice}")

    def gaps(self) -> list[str]:
        """What is damaged in the log and in the catalog's copy of it, in words; nothing can be changed then."""
        found = self.query("SELECT value FROM state WHERE key = 'gaps'")
        return _gaps_in(found[0][0]) if found else []

    # -- catching up -------------------------------------------------------------------------------------

    def _is_behind(self, connection: sqlite3.Connection) -> bool:
        """Whether the log has entries that the catalog has not, or is not the one that the catalog knows."""
        seq, digest, end = _head(connection)
        if not self.journal.ends_at(end, seq):
            return True
        return seq > 0 and self.journal.digest_before(end) != digest

    def _caught_up(self, connection: sqlite3.Connection, identity: object) -> bool:
        """Finish a change that a crash interrupted, unless another process is at it or the disk is full; false then."""
        try:
            with self._exclusive(connection, identity) as change:
                self._catch_up(change)
        except StorageError as error:
            _logger.debug("the catalog is behind the log: %s", error)
            return False
        except Replaced:
            pass  # It is opened again.
        return True

    def _catch_up(self, change: Change, *, heals: bool = True) -> None:
        """Apply what the log holds and the catalog does not.

        Args:
            heals: whether the folder's log may be put in order on the way.
        """
        from registry.catalog.history import End, Gap, walk
        from registry.catalog.ledger import Refused

        seq, digest, end = _head(change.connection)
        if self.journal.ends_at(end, seq) and (not seq or self.journal.digest_before(end) == digest):
            return
        if heals:
            self.journal.sync()
        size = self.journal.size(end.segment) or 0
        if size < end.offset or (seq and self.journal.digest_before(end) != digest):
            self._refold_in_place(change, change.connection, heals=heals)
            return
        for item in walk(self.journal.read(end), seq, digest):
            if isinstance(item, End):
                if item.is_torn and heals:
                    self.journal.cut(item.position)
                return
            if isinstance(item, Gap):
                self._refold_in_place(change, change.connection, heals=heals)
                return
            change.connection.execute("SAVEPOINT entry")
            try:
                change.take(item.entry)
            except Refused:  # It contradicts those before it, and has no effect; verify names it.
                change.connection.execute("ROLLBACK TO entry")
                if any(record["op"] in ("adopt", "publish") for record in item.entry.records):
                    change.is_unsure = True
            change.connection.execute("RELEASE entry")
            if change.is_unsure:
                self._refold_in_place(change, change.connection, heals=heals)
                return
            change.keep(item.entry)
            assert item.end is not None
            _set_head(change, item.entry, item.end)

    # -- making it anew ----------------------------------------------------------------------------------

    def refold(self, *, why: str = "") -> Refolded:
        """Make the catalog anew from the log; what is lost in the log comes from the catalog's copy of it.

        Args:
            why: what is wrong with the present one; unless given, it is made anew in any case.

        Raises:
            NotFound: if the registry is not there any more.
            Corrupt: if the log and the copy tell different histories.
            StorageError: if the folder cannot be written.
        """
        self.check_writable()
        problems = self.migrate(chooses=True) if self.format == 1 else []
        with storage_errors(self._root):
            self.journal.create()
            tries = 0
            while True:
                try:
                    with self.journal.locked():
                        return self._refold(why)._replace(problems=problems)
                except StorageError as error:  # SQLite fails oddly where its files are deleted under it.
                    tries += 1
                    if tries == _TRIES or not isinstance(error.__cause__, sqlite3.Error):
                        raise
                    _logger.debug("%s; once more", error)

    def _refold(self, why: str) -> Refolded:
        from registry.catalog.change import Change

        self.close()
        usable = self._usable()
        if usable is not None and why == "missing":  # Another process has just made it.
            usable.close()
            return Refolded(self.ledger())
        if why:
            _logger.warning("%s is %s; it is made anew from the log", self.path, why)
        # A process may have been killed that was making it, or taking it to the present format.
        durable.sync_folder(self._root)
        with contextlib.ExitStack() as stack:
            set_aside, copies = None, usable
            if usable is None:
                set_aside = self._set_aside()
                copies = self._copies_in(set_aside)
                self._touch()
                usable = self._connect(self.path)
            stack.callback(usable.close)
            if copies is not None:
                stack.callback(copies.close)
            with self._errors():
                usable.execute("PRAGMA foreign_keys = OFF")
                usable.execute("BEGIN EXCLUSIVE")
                try:
                    change = Change(usable, _Material(self._store(), lambda _: None))
                    refolded = self._refold_in_place(change, copies)
                    usable.execute("COMMIT")
                except BaseException:
                    with contextlib.suppress(sqlite3.Error):
                        usable.execute("ROLLBACK")
                    raise
            pairing.close(self.path, usable)
        return refolded._replace(set_aside=set_aside)

    def _usable(self) -> sqlite3.Connection | None:
        """A connection to the present catalog, if SQLite can read it from end to end and nothing odd is in it.

        Raises:
            Unsupported: if a newer program made it.
        """
        if places.status_of(self.path) is None:
            return None
        connection = None
        try:
            connection = self._connect(self.path)
            with self._errors():
                self._is_sound(connection)
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

    def _copies_in(self, name: str | None) -> sqlite3.Connection | None:
        """A connection to a catalog that was set aside, if it may have copies of entries."""
        if name is None:
            return None
        try:
            connection = self._connect(self.path.with_name(name))
        except RegistryError:
            return None
        with contextlib.suppress(*_UNREADABLE):
            if schema.is_ours(connection):
                return connection
        connection.close()
        return None

    def _touch(self) -> None:
        """Make an empty file by the umask; SQLite would keep a group from writing."""
        for part in _PARTS[1:]:  # Those of a file that was removed would be taken for its own.
            durable.unlink(self.path.with_name(NAME + part))
        with contextlib.suppress(FileExistsError):
            os.close(places.open_file(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL))

    def _set_aside(self) -> str | None:
        """Give a catalog that cannot be read another name; None if there is none."""
        status = places.status_of(self.path)
        if status is None:
            return None
        places.refuse_odd(status, self.path)
        name = f"{NAME}.damaged-{int(time.time())}"
        for part in reversed(_PARTS):
            path = self.path.with_name(NAME + part)
            if places.status_of(path) is not None:
                durable.rename(path, path.with_name(name + part))
        return name

    def _refold_in_place(
        self, change: Change, copies: sqlite3.Connection | None, *, heals: bool = True
    ) -> Refolded:
        """Empty the tables and fill them from the log, inside a transaction that excludes everybody else.

        Args:
            copies: the catalog that has a copy of the log.
            heals: whether the folder's log gets back what the copy has.
        """
        from registry.catalog.history import End, Fork, Gap, Placed, heal
        from registry.catalog.ledger import Ledger
        from registry.catalog.strays import use_strays

        connection = change.connection
        ledger = Ledger()
        if heals:
            self.journal.sync()
        connection.execute("DROP TABLE IF EXISTS temp.history")
        connection.execute("CREATE TEMP TABLE history (seq INTEGER PRIMARY KEY, entry BLOB NOT NULL)")
        is_whole = True
        for item in self._history(copies):
            if isinstance(item, Fork):
                raise Corrupt(f"{self._root}: {item}; put the newer one back, or remove the other")
            # Behind a gap it stays: without it, what is damaged before it would seem to be cut short, too.
            if isinstance(item, End) and item.is_torn and heals and not ledger.has_gaps:
                self.journal.cut(item.position)
            if isinstance(item, Placed):
                blob = zlib.compress(item.entry.line, 1)
                connection.execute("INSERT INTO temp.history VALUES (?, ?)", (item.entry.seq, blob))
                is_whole = is_whole and item.start is not None
            ledger.follow([item])
        if heals and not (is_whole and all(gap.last >= gap.first for gap in ledger.gaps)):
            segments, healed = heal(self.journal, self._history(copies))
            if segments:
                _logger.warning(
                    "%s is damaged: %s was written again from the catalog's copy, with %d entries that it had lost",
                    *(
                        self.journal.folder,
                        ", ".join(self.journal.path(one).name for one in segments),
                        len(healed),
                    ),
                )
                again = self._refold_in_place(change, copies, heals=False)
                return again._replace(healed=healed)
        if not ledger.seq and not ledger.gaps and next(iter(self._store()), None):
            ledger.gaps.append(Gap(1, 1, "the log is gone, while there are manifests"))
        if ledger.has_gaps:
            use_strays(self._store(), ledger)
        return self._fill(change, ledger)

    def _fill(self, change: Change, ledger: Ledger) -> Refolded:
        from registry.catalog.change import Change

        connection = change.connection
        change.beside = {}
        schema.drop(connection)
        schema.create(connection)
        connection.execute("INSERT INTO log SELECT seq, entry FROM temp.history")
        connection.execute("DROP TABLE temp.history")
        anew = Change(connection, _Material(self._store(), self._text_in(connection, ledger)))
        anew.fill(ledger)
        if ledger.has_gaps:
            anew.set_state("gaps", json.dumps([str(gap) for gap in ledger.gaps if gap.last >= gap.first]))
        anew.set_state("wal", pairing.ANEW)
        _set_head(anew, ledger, ledger.end)
        return Refolded(ledger)

    def _history(self, connection: sqlite3.Connection | None) -> Iterator[Placed | Gap | End | Fork]:
        """All entries, from the folder's log and from the catalog's copy."""
        from registry.catalog.history import merge, walk

        return merge(walk(self.journal.read()), _copies(connection) if connection is not None else ())

    def _text_in(
        self, connection: sqlite3.Connection, ledger: Ledger | None = None
    ) -> Callable[[str], bytes | None]:
        """What gives the text of a manifest from the catalog's copy of the log."""

        def text(manifest_id: str) -> bytes | None:
            if ledger is not None:
                seq, _ = ledger.texts.get(manifest_id, (None, None))
            else:
                rows = connection.execute(
                    "SELECT entry FROM manifests WHERE id = ?", (manifest_id,)
                ).fetchall()
                seq = rows[0][0] if rows else None
            row = connection.execute("SELECT entry FROM log WHERE seq = ?", (seq,)).fetchone()
            return _text_of(row[0], manifest_id) if row else None

        return text

    # -- checking ----------------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """What of the log, the catalog's copy of it and the tables does not fit together, in words."""
        if self.format == 1:
            with contextlib.closing(self._old_catalog() or sqlite3.connect(":memory:")) as old:
                return self._read_old(old if schema.version(old) else None).problems
        for _ in range(_TRIES):
            before = self._log_state()
            found = list(self._problems())
            if not found or before == self._log_state():
                return found
        if not self.is_writable:
            return found
        with self.journal.locked():  # Others keep changing what is compared.
            return list(self._problems())

    def _problems(self) -> Iterator[str]:
        from registry.catalog.history import Fork, Placed
        from registry.catalog.ledger import Ledger

        with self._errors(), self._snapshot() as connection:
            for (text,) in connection.execute("PRAGMA integrity_check"):
                if text != "ok":
                    yield f"{self.path}: {text}; run: registry rebuild"
            seq, _, _ = _head(connection)
            ledger = Ledger()
            for item in self._history(connection):
                if isinstance(item, Placed):
                    if item.entry.seq > seq:
                        break
                    if item.start is None:
                        yield f"{self.journal.folder}: entry {item.entry.seq} is damaged; registry rebuild puts it back"
                    elif not item.in_copy:
                        yield f"{self.path}: its copy of entry {item.entry.seq} is damaged; run: registry rebuild"
                elif isinstance(item, Fork):
                    yield f"{self.journal.folder}: {item}"
                ledger.follow([item])
            yield from (f"{self.journal.folder}: {gap}; run: registry rebuild" for gap in ledger.gaps)
            yield from (f"{self.journal.folder}: {void}" for void in ledger.voids)
            if not ledger.seq and any(True for _ in self._store()):
                yield f"{self.journal.folder}: the log is gone, and so is the catalog's copy; registry rebuild --adopt takes in what lies in manifests/"
            if ledger.seq < seq:
                yield f"{self.journal.folder}: the log ends at entry {ledger.seq}, the catalog has {seq}"
                return
            yield from self._differences_from(connection, ledger)

    def _differences_from(self, connection: sqlite3.Connection, ledger: Ledger) -> Iterator[str]:
        """Where the tables are not what follows from the log."""
        from registry.catalog.change import Change

        with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as fresh:
            schema.create(fresh)
            material = _Material(self._store(), self._text_in(connection, ledger))
            Change(fresh, material).fill(ledger)
            empty = "SELECT 1 FROM packs WHERE number NOT IN (SELECT pack FROM tensors) LIMIT 1"
            has_unreadable = fresh.execute(empty).fetchone() is not None
            for table in schema.DERIVED:
                if has_unreadable and table in ("tensors", "uses"):  # verify names the packs.
                    continue
                found, expected = (
                    {tuple(row) for row in one.execute(f"SELECT * FROM {table}")}
                    for one in (connection, fresh)
                )
                if found != expected:
                    odd = len(found ^ expected)
                    rows = "1 row" if odd == 1 else f"{odd} rows"
                    yield f"{self.path}: {rows} of the table {table} do not follow from the log; run: registry rebuild"

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[sqlite3.Connection]:
        """The catalog as it is at one moment; where readers do not hold up writers, for as long as it takes."""
        connection = self.connection()
        held = connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        if held:
            connection.execute("BEGIN")
        try:
            yield connection
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    # -- the ledger --------------------------------------------------------------------------------------

    def ledger(self) -> Ledger:
        """What follows from the folder's log as it is now, read from the log itself.

        Raises:
            Corrupt: if the log is damaged, and the catalog's copy does not have what it has lost.
        """
        from registry.catalog.history import walk
        from registry.catalog.ledger import Ledger

        if self.format == 1:
            return self._old_ledger()
        for heals in (True, False):
            known = getattr(self._local, "ledger", None) or Ledger()
            self._local.ledger = None
            if known.seq and self.journal.digest_before(known.end) != known.digest:
                known = Ledger()
            known.follow(walk(self.journal.read(known.end), known.seq, known.digest))
            if not known.has_gaps:
                self._local.ledger = known
                return known
            if heals and self.is_writable and not self.connection().in_transaction:
                self.refold(why="damaged")  # The catalog's copy may have what the log has lost.
        gap = next(gap for gap in known.gaps if gap.last >= gap.first)
        raise self._not_before(gap)

    # -- reading -----------------------------------------------------------------------------------------

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query that only reads."""
        for _ in range(_TRIES):
            try:
                with self._errors(), storage_errors(self.path):
                    connection = self.connection()
                    rows = connection.execute(sql, parameters).fetchall()
                    identity = self._local.held.identity
                    if not isinstance(identity, _Still) or identity == self._still():
                        return rows
            except Damaged as error:
                if not self.is_writable or self.connection().in_transaction:
                    raise
                _logger.warning("%s", error)
                self.refold(why="damaged")
            except StorageError:
                held: _Held | None = getattr(self._local, "held", None)
                if held is None or held.connection.in_transaction:
                    raise
                if held.identity == self._identity(held.identity):
                    raise
        raise StorageError(f"{self.path}: other processes keep changing the catalog; repeat")

    def locate(self, digests: Collection[str]) -> dict[str, Location]:
        """Where stored tensors lie; as the next two, for the store."""
        return locate(self.query, digests)

    def manifest_text(self, manifest_id: str) -> bytes | None:
        """The text of a manifest that counts, from the log; None if the log does not have it."""
        try:
            with self._errors():
                return self._text_in(self.connection())(manifest_id)
        except RegistryError:
            return None

    def was_removed(self, manifest_id: str) -> bool:
        """Whether a manifest counted once, and does not any more."""
        gone = "SELECT id FROM released UNION ALL SELECT digest FROM doomed"
        live = "SELECT id FROM manifests"
        try:
            return bool(
                self.query(
                    f"SELECT 1 FROM ({gone}) WHERE id = ? AND ? NOT IN ({live} WHERE id = ?)",
                    [manifest_id] * 3,
                )
            )
        except RegistryError:
            return False


class Replaced(RegistryError):
    """The catalog's file is another one by now. Never reaches users."""


class _FileId(NamedTuple):
    """Device and inode."""

    device: int
    inode: int


class _OldState(NamedTuple):
    """Size, time and inode of the journal and the catalog of a registry of format 1."""

    journal: object
    catalog: object


class _Still(NamedTuple):
    """What shows whether a catalog that is read as if it never changed has changed all the same."""

    device: int
    inode: int
    size: int
    changed: int


class _LogState(NamedTuple):
    """The last segment of the log, its size, and the digest at its end."""

    segment: int
    size: int
    digest: str | None


class _Material:
    """Manifests and packs for a change: from their files, and manifests also from the log.

    Args:
        text_of: gives the text of a manifest that the log has.
    """

    def __init__(self, store: Store, text_of: Callable[[str], bytes | None]) -> None:
        self._store = store
        self._text_of = text_of

    def knows(self, manifest_id: str) -> bool:
        return self._store.just_written(manifest_id) is not None

    def manifest(self, manifest_id: str) -> Manifest:
        found = self._store.just_written(manifest_id)
        return found or self._store.manifest(manifest_id, text_of=self._text_of)

    def tensors_of(self, manifest_id: str) -> Collection[str]:
        return self._store.tensors_of(manifest_id, text_of=self._text_of)

    def pack_info(self, digest: str) -> PackInfo:
        return self._store.pack_info(digest)


def _copies(connection: sqlite3.Connection) -> Iterator[Entry]:
    """The entries that a catalog has a copy of, as far as it can be read."""
    from registry.catalog import entries

    last = 0
    while True:
        try:
            rows = connection.execute(
                "SELECT seq, entry FROM main.log WHERE seq > ? ORDER BY seq LIMIT 64", (last,)
            ).fetchall()
        except _UNREADABLE:
            return
        if not rows:
            return
        for seq, blob in rows:
            if type(seq) is not int or seq <= last:
                return
            last = seq
            with contextlib.suppress(Corrupt):
                entry = entries.parse(_unpacked(blob))
                if entry.seq == seq:
                    yield entry


def _unpacked(blob: Any) -> bytes:
    from registry.catalog.entries import MAX_LINE

    if not isinstance(blob, bytes):
        raise Corrupt("it is not what was written")
    try:
        return zlib.decompressobj().decompress(blob, MAX_LINE)
    except zlib.error:
        raise Corrupt("it is not what was written") from None


def _text_of(blob: Any, manifest_id: str) -> bytes | None:
    """The text of a manifest in the copy of an entry."""
    from registry.catalog import entries

    try:
        records: Iterable[Record] = entries.parse(_unpacked(blob)).records
    except Corrupt:
        return None
    for record in records:
        if record.get("id") == manifest_id and isinstance(record.get("manifest"), str):
            return str(record["manifest"]).encode()
    return None


def _state(connection: sqlite3.Connection, key: str) -> str | None:
    row = connection.execute("SELECT value FROM state WHERE key = ?", (key,)).fetchone()
    return None if row is None else str(row[0])


def _gaps_in(text: Any) -> list[str]:
    """What the catalog says to be lost of the log.

    Raises:
        Damaged: if that makes no sense.
    """
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        found = None
    if not isinstance(found, list) or not found or not all(isinstance(gap, str) for gap in found):
        raise Damaged("the catalog does not say what is lost of the log; run: registry rebuild")
    return found


def _head(connection: sqlite3.Connection) -> tuple[int, str, Position]:
    """Number and digest of the last entry that the catalog has, and where the log ends behind it.

    Raises:
        Damaged: if the catalog does not say.
    """
    found = dict(connection.execute("SELECT key, value FROM state").fetchall())
    try:
        end = Position(int(found["segment"]), int(found["offset"]))
        if int(found["seq"]) < 0 or end.segment < 1 or end.offset < 0:
            raise ValueError
        return int(found["seq"]), found["digest"], end
    except (KeyError, ValueError, TypeError):
        raise Damaged(
            "the catalog does not say how much of the log it holds; run: registry rebuild"
        ) from None


def _set_head(change: Change, last: Entry | Ledger, end: Position) -> None:
    for key, value in change.beside.items():
        change.set_state(key, value)
    change.beside = {}
    pairing.stamp(change.connection)
    change.set_state("seq", last.seq)
    change.set_state("digest", last.digest)
    change.set_state("segment", end.segment)
    change.set_state("offset", end.offset)


class _Held:
    """A thread's connection, closed when the thread or the process ends.

    SQLite removes the write-ahead log by its name when the last connection is closed. So one to a file that has been
    replaced stays open until the process ends, and so does one that a child process has from its parent: closing it
    would take away what belongs to others.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, identity: object) -> None:
        self.connection = connection
        self.identity = identity
        self.looked = time.monotonic()
        self.pid = os.getpid()
        self.close = weakref.finalize(self, _let_go, path, connection, identity, self.pid)


def _let_go(
    path: Path, connection: sqlite3.Connection, identity: object, pid: int, *, is_whole: bool = True
) -> None:
    """
    Args:
        is_whole: whether the catalog's file was seen to be whole when it was opened.
    """
    now = _identity_of(path)
    is_gone = now is None and not path.parent.exists()  # Nobody makes another one there.
    is_another = isinstance(identity, _FileId) and identity != now and not is_gone
    if pid == os.getpid() and not is_another:
        if isinstance(identity, _FileId) and is_whole:
            pairing.close(path, connection)
        else:
            connection.close()
        return
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


def _identity_of(path: Path) -> _FileId | None:
    """What tells a file from another one that gets its name."""
    status = places.status_of(path)
    return None if status is None else _FileId(status.st_dev, status.st_ino)
