"""The database of a catalog: its file, a thread's connection to it, and its identity.

Nothing but SQLite opens the file or its index: by the rules of POSIX, whoever closes a file gives up all locks that its
process has on it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from registry.catalog import pairing, schema
from registry.log import settings
from registry.log.forking import no_fork
from registry.log.journal import Journal, Position
from registry.store import places
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
    from registry.log.sharing import Shared
    from registry.store.store import Store

NAME = "catalog.sqlite"
OLD = "catalog.sqlite.format1"
"""What the catalog of format 1 is called once the present format has taken its place."""

BUSY_SECONDS = 60
"""Seconds that SQLite waits for a lock of another process."""

PARTS = ("", "-wal", "-shm", "-journal", pairing.WHOLE)
"""What is added to the name of the database for the files beside it; the last one is our own."""

ALONE = "mode=ro&immutable=1"
"""How SQLite opens a database as if it never changed, without the files beside it."""

_FILES = 4
"""Files that SQLite opens for a database: itself, the write-ahead log, its index, and the folder."""

UNREADABLE = (sqlite3.Error, UnicodeDecodeError)
"""What reading a damaged database raises; the second where SQLite's message quotes damaged bytes."""

_LONGEST = 256 << 20
"""Bytes of a value that SQLite may make, so that a forged table cannot ask for more memory."""


class Damaged(Corrupt):
    """The catalog is damaged or contradicts itself, and can be made anew from the log."""


class Replaced(RegistryError):
    """The catalog's file is another one by now. Never reaches users."""


class FileId(NamedTuple):
    """Device and inode."""

    device: int
    inode: int


class OldState(NamedTuple):
    """Size, time and inode of the journal and the catalog of a registry of format 1."""

    journal: object
    catalog: object


class Still(NamedTuple):
    """Shows whether a catalog that SQLite reads as if it never changed has changed all the same."""

    device: int
    inode: int
    size: int
    changed: int


class LogState(NamedTuple):
    """The last segment of the log, its size, and the digest at its end."""

    segment: int
    size: int
    digest: str | None


class Database:
    """The database of a registry's catalog, and the log that it follows from.

    Args:
        root: the registry's folder.
        store: gives the store, whose manifests and packs a change reads.
        shared: the log that other hosts add to as well; None where there are none.

    Attributes:
        path: of the database.
        journal: the log in the folder.
        format: the format that the registry has.
    """

    def __init__(self, root: Path, store: Callable[[], Store], shared: Shared | None = None) -> None:
        self.root = root
        self.path = root / NAME
        self.journal = Journal(root)
        self.shared = shared
        self.format = settings.FORMAT
        self._store = store
        self._local = threading.local()
        _databases.add(self)

    @property
    def store(self) -> Store:
        """The registry's manifests and packs."""
        return self._store()

    @property
    def held(self) -> Held | None:
        """This thread's connection; after a fork it may be that of the parent."""
        return getattr(self._local, "held", None)

    def hold(self, connection: sqlite3.Connection, identity: object) -> Held:
        """Keep a connection for this thread, and let go of the one before.

        Args:
            identity: tells its file from another one; see `identity`.
        """
        self._local.held = held = Held(self.path, connection, identity)
        return held

    def close(self) -> None:
        """Close this thread's connection."""
        held = self.held
        if held is not None:
            held.close()
            self._local.held = None

    def look_for_another_format(self) -> None:
        """Notice that another process has taken the registry to the present format."""
        self.format = settings.read_format(self.root)
        if self.format != 1:
            self.close()

    @property
    def is_writable(self) -> bool:
        """Whether this process may change the catalog."""
        return os.access(self.root, os.W_OK) and (
            os.access(self.path, os.W_OK) or not os.path.lexists(self.path)
        )

    def check_writable(self) -> None:
        """Check that this process may change the catalog.

        Raises:
            NotFound: if the registry is not there any more.
            StorageError: if this process may not change the catalog.
        """
        self.check_is_there()
        if self.is_writable:
            return
        with storage_errors(self.path):
            if os.statvfs(self.root).f_flag & os.ST_RDONLY:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        raise StorageError(f"{self.path}: cannot be written", "ask its owner for access")

    def check_is_there(self) -> None:
        """Check that the registry is still in its folder.

        Raises:
            NotFound: if the registry is not there any more.
        """
        if places.status_of(self.path) is None and not settings.are_there(self.root):
            raise NotFound(
                f"{self.root}: the registry was renamed or deleted meanwhile", "open it by its new name"
            )

    def identity(self, like: object = None) -> object:
        """What changes when another catalog takes the place of this one.

        For a catalog in the file this tells the file. For one in memory it tells the log that it was made from.

        Args:
            like: an earlier result; the new one is of the same kind.
        """
        if isinstance(like, LogState):
            return self.log_state()
        if isinstance(like, OldState):
            return self.old_state()
        if isinstance(like, Still):
            return self.still()
        return _identity_of(self.path)

    def still(self) -> Still | None:
        """The state of a catalog that no process has open; None if one has, or may have."""
        status = places.status_of(self.path)
        if status is None or places.status_of(self.path.with_name(f"{NAME}-wal")) is not None:
            return None
        return Still(
            device=status.st_dev, inode=status.st_ino, size=status.st_size, changed=status.st_mtime_ns
        )

    def log_state(self) -> LogState:
        """What shows that the log has changed."""
        segments = self.journal.segments()
        if not segments:
            return LogState(0, 0, None)
        size = self.journal.size(segments[-1]) or 0
        return LogState(segments[-1], size, self.journal.digest_before(Position(segments[-1], size)))

    def old_state(self) -> OldState:
        """What shows that a registry of format 1 has changed."""
        # Lazy: start-up.
        from registry.log.format1 import journal_path

        journal, catalog = (
            status and (status.st_size, status.st_mtime_ns, status.st_ino)
            for status in (places.status_of(journal_path(self.root), inner=1), places.status_of(self.path))
        )
        return OldState(journal=journal, catalog=catalog)

    def connect(self, path: Path, mode: str = "mode=rw", *, is_ours: bool = True) -> sqlite3.Connection:
        """Connect to the catalog's file, or to one that was set aside.

        Args:
            mode: how SQLite opens it.
            is_ours: whether the file has the present format.

        Raises:
            Corrupt: if the file, or one beside it, is a link or no regular file.
            Damaged: if SQLite finds it damaged.
            StorageError: if it cannot be opened.
        """
        for part in PARTS:
            beside = path.with_name(path.name + part)
            status = places.status_of(beside)
            if status is not None:
                places.refuse_odd(status, beside)
        with self.errors():
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

    def alone(self) -> pairing.Alone:
        """The catalog's file as it is without what lies beside it."""
        with self.errors():
            return pairing.look(self.path, lambda: self.connect(self.path, ALONE))

    def is_sound(self, connection: sqlite3.Connection) -> bool:
        """Whether the tables are those that this program makes.

        Raises:
            Unsupported: if a newer program made them.
        """
        version = schema.version(connection)
        if version is not None and version > schema.VERSION:
            raise Unsupported(
                f"{self.path} has schema {version}, this version knows up to {schema.VERSION}",
                "upgrade with: pip install -U torch-registry",
            )
        return version == schema.VERSION and schema.is_ours(connection)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Say what a failing database means and what to do.

        Raises:
            Damaged: if the database is damaged.
            StorageError: if the system refuses, or another process keeps it locked.
            Invalid: if a text is not valid Unicode.
        """
        try:
            with storage_errors(self.path):
                yield
        except sqlite3.OperationalError as error:
            raise self._meaning(error) from error
        except UnicodeEncodeError as error:
            raise Invalid(f"{quoted(error.object)} is not valid Unicode text") from None
        except (sqlite3.DatabaseError, OverflowError, UnicodeDecodeError) as error:
            text = printable(str(error))
            raise Damaged(f"{self.path}: {text}", "recreate it with: registry rebuild") from error

    def _set_mode(self, connection: sqlite3.Connection) -> None:
        """Let readers and a writer work side by side where the file system allows it.

        Either way a power cut leaves a consistent catalog. That it may have forgotten the last changes does no harm, as
        the log has them.
        """
        # On other file systems SQLite's write-ahead log does not work.
        local = is_local(self.root)
        mode = "wal" if local else "delete"
        end = time.monotonic() + BUSY_SECONDS
        while connection.execute("PRAGMA journal_mode").fetchone() != (mode,):
            try:
                connection.execute(f"PRAGMA journal_mode = {mode}")
            except sqlite3.OperationalError as error:
                # SQLite does not wait for others here.
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(0.01)
        connection.execute(f"PRAGMA synchronous = {'NORMAL' if local else 'FULL'}")

    def _meaning(self, error: sqlite3.OperationalError) -> RegistryError:
        """The error that says what an SQLite error means and what to do."""
        text = printable(str(error))
        code = getattr(error, "sqlite_errorcode", None)
        if code == sqlite3.SQLITE_IOERR_SHORT_READ:
            # For example, the write-ahead log was deleted while a program had it open.
            return Damaged(f"{self.path}: it, or what SQLite keeps beside it, was cut short")
        if "full" in text or code == sqlite3.SQLITE_IOERR_SHMSIZE:
            return StorageError(f"{self.path}: no space left on the device", "free some and repeat")
        if "unable to open" in text and not _can_open_files():
            return StorageError(f"{self.path}: too many open files", "raise the limit (ulimit -n) and repeat")
        if "readonly" in text or "unable to open" in text:
            return StorageError(f"{self.path}: cannot be written ({text})", "ask its owner for access")
        if "locked" in text:
            return StorageError(
                f"{self.path}: another process has kept the catalog locked for {BUSY_SECONDS} s", "repeat"
            )
        if "no such" in text or "decode" in text:
            return Damaged(f"{self.path}: {text}", "recreate it with: registry rebuild")
        limit = ", and what limits the size of files" if code == sqlite3.SQLITE_IOERR_WRITE else ""
        return StorageError(f"{self.path}: {text}", f"check the disk{limit}")


def _can_open_files() -> bool:
    """Whether this process may open as many files more as SQLite needs at a time."""
    with contextlib.ExitStack() as opened:
        try:
            for _ in range(_FILES):
                opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        except OSError:
            return False
    return True


def in_memory() -> sqlite3.Connection:
    """A connection to an empty database in memory."""
    return sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)


_databases: weakref.WeakSet[Database] = weakref.WeakSet()
"""State of the process: all that were opened and are still in use."""


def _close_before_fork() -> None:
    """Close what the thread that forks has open: SQLite would take the locks of its process for those of the child."""
    for database in list(_databases):
        held = database.held
        if held is not None and held.pid == os.getpid() and not held.connection.in_transaction:
            with contextlib.suppress(sqlite3.Error, RegistryError, OSError):
                database.close()


# Of two functions the one that was registered last is called first: here before the gate of `forking` is closed.
os.register_at_fork(before=_close_before_fork)


class Held:
    """A thread's connection, closed when the thread or the process ends.

    SQLite removes the write-ahead log by its name when the last connection is closed. So one to a file that has been
    replaced stays open until the process ends, and so does one that a child process has from its parent: closing it
    would take away what belongs to others.

    Attributes:
        identity: tells its file from another one; see `Database.identity`.
        looked: when it was last seen to show all that the log has, by the monotonic clock.
        pid: the process that opened it.
        close: closes it, once.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, identity: object) -> None:
        self.connection = connection
        self.identity = identity
        self.looked = time.monotonic()
        self.pid = os.getpid()
        self.close = weakref.finalize(self, let_go, path, connection, identity=identity, pid=self.pid)


def let_go(
    path: Path, connection: sqlite3.Connection, *, identity: object, pid: int, is_whole: bool = True
) -> None:
    """Close a connection, unless that would take away what belongs to others; see `Held`.

    Args:
        identity: that of its file when it was opened; see `Database.identity`.
        pid: the process that opened it.
        is_whole: whether the catalog's file was seen to be whole when it was opened.
    """
    now = _identity_of(path)
    # Where the folder is gone, no other file has taken the place.
    is_gone = now is None and not path.parent.exists()
    is_another = isinstance(identity, FileId) and identity != now and not is_gone
    if pid == os.getpid() and not is_another:
        with no_fork():
            if isinstance(identity, FileId) and is_whole:
                pairing.close(path, connection)
            else:
                connection.close()
        return
    # Lazy: start-up.
    import ctypes

    # A reference that nobody gives back keeps the connection open.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


def _identity_of(path: Path) -> FileId | None:
    """Tells a file from another one that gets its name."""
    status = places.status_of(path)
    return None if status is None else FileId(status.st_dev, status.st_ino)
