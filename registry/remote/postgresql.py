"""The log in PostgreSQL: one row of a table for each entry, which is inserted if there is none of its number.

A user needs the rights to INSERT and SELECT. Who the user is, and the password, come from the environment, as every client
of PostgreSQL takes them: `PGUSER`, `PGPASSWORD`, `PGPASSFILE`, `PGSERVICE`. They are never read here.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import psycopg
from psycopg import pq, sql
from psycopg.abc import PQGen

from registry.remote.bucket import Denied, Unreachable, too_large
from registry.remote.urls import parse_log_place
from registry.store.errors import StorageError
from registry.store.text import printable

_CONNECT = 5
"""Seconds for a connection, unless `PGCONNECT_TIMEOUT` says otherwise."""
_ANSWER = 20.0
"""Seconds for an answer."""
_AT_ONCE = 64
"""Entries that are read at a time."""
_FOR_LATER = ("starting up", "shutting down", "not accepting", "slots", "too many")
"""What a server says that will let somebody in later."""
_NOT_DONE = ("40001", "40P01")
"""SQLSTATEs of statements that are to be repeated."""
_IS_THERE = ("42P07", "23505")
"""SQLSTATEs where somebody else has made the table at the same moment."""

_Result = TypeVar("_Result")


class _Lost(Exception):
    """The connection ended, so what was asked may have happened. Never reaches users."""


class _Connection(psycopg.Connection[tuple[Any, ...]]):
    """A connection that does not wait for ever."""

    def wait(self, gen: PQGen[_Result], interval: float = 0.1, timeout: float | None = None) -> _Result:
        return super().wait(gen, interval, _ANSWER if timeout is None else timeout)

    def __del__(self, _: Any = None, /) -> None:
        """It ends with the registry that has it, and psycopg need not warn."""


class PostgresJournal:
    """The log in a table; a `registry.remote.journal.Journal`.

    Args:
        place: see `registry.remote.urls.log_place`.

    Raises:
        Unsupported: if it is malformed.
    """

    def __init__(self, place: str) -> None:
        self._url, self._name = parse_log_place(place)
        self._table = sql.Identifier(self._name)
        self._own: tuple[int, threading.Lock, list[_Connection]] = (0, threading.Lock(), [])

    def __repr__(self) -> str:
        return f"PostgresJournal({self.url!r})"

    @property
    def url(self) -> str:
        """Database and table, without keys."""
        return f"{self._url}#{self._name}"

    def name(self, seq: int) -> str:
        """What to call a row in an error."""
        return f"{self.url}: entry {seq}"

    def make(self) -> None:
        """Make the table, unless it is there. This needs the right to CREATE."""
        self._read(
            "CREATE TABLE IF NOT EXISTS {} "
            "(seq bigint PRIMARY KEY, at timestamptz NOT NULL DEFAULT now(), body bytea NOT NULL)"
        )

    def create(self, seq: int, data: bytes) -> bool:
        """Insert a row if there is none of this number; False where it is not known."""
        try:
            found = self._ask(
                "INSERT INTO {} (seq, body) VALUES (%s, %b) ON CONFLICT (seq) DO NOTHING RETURNING seq",
                [seq, data],
            )
        except _Lost:
            return False
        return bool(found)

    def get(self, seq: int, limit: int) -> bytes | None:
        """A row's bytes; None if it is not there."""
        found = self._rows("seq = %s", seq, limit)
        return found[0][1] if found else None

    def put(self, seq: int, data: bytes) -> None:
        """Make a row in the place of a damaged one, which needs the right to UPDATE."""
        self._read(
            "WITH done AS (UPDATE {} SET body = %s WHERE seq = %s RETURNING 1) SELECT 1 FROM done",
            [data, seq],
        )

    def last(self, behind: int = 0) -> int:
        """The highest number; the one that is given if there is none behind it."""
        return (
            int(self._read("SELECT coalesce(max(seq), 0) FROM {} WHERE seq > %s", [behind])[0][0]) or behind
        )

    def behind(self, seq: int, limit: int) -> Iterator[tuple[int, bytes]]:
        """The rows behind a number, in order."""
        while found := self._rows("seq > %s", seq, limit):
            yield from found
            seq = found[-1][0]

    def _rows(self, condition: str, seq: int, limit: int) -> list[tuple[int, bytes]]:
        found = self._read(
            "SELECT seq, CASE WHEN octet_length(body) <= %s THEN body END FROM {} "
            f"WHERE {condition} ORDER BY seq LIMIT {_AT_ONCE}",
            [limit, seq],
        )
        for number, data in found:
            if data is None:
                raise too_large(self.url, str(number), limit)
        return found

    def _read(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        """The rows of a statement that may be repeated."""
        # The first connection may be an old one, which the server has ended since.
        with contextlib.suppress(_Lost):
            return self._ask(statement, values)
        try:
            return self._ask(statement, values)
        except _Lost as error:
            raise Unreachable(f"{self._url}: the server does not answer ({error})", "repeat") from None

    def _ask(self, statement: str, values: Sequence[Any]) -> list[Any]:
        """The rows of one statement, which is a transaction of its own.

        Raises:
            _Lost: if the connection ends, or the statement is to be repeated.
        """
        pid, lock, kept = self._own
        if pid != os.getpid():
            # A connection belongs to the process that opened it. A thread that was not forked may have had the lock.
            lock, kept = threading.Lock(), []
            self._own = (os.getpid(), lock, kept)
        with lock:
            connection = kept.pop() if kept else self._connect()
            try:
                cursor = connection.execute(sql.SQL(statement).format(self._table), values, binary=True)
                found = cursor.fetchall() if cursor.description else []
            except psycopg.Error as error:
                if error.sqlstate in _IS_THERE:
                    found = []
                else:
                    if connection.closed or error.sqlstate is None or error.sqlstate in _NOT_DONE:
                        connection.close()
                        raise _Lost(_told(error)) from None
                    kept.append(connection)
                    raise self._refusal(error, connection) from None
            except BaseException:
                # It may be in the middle of an answer.
                connection.close()
                raise
            kept.append(connection)
            return found

    def _connect(self) -> _Connection:
        options: dict[str, Any] = {"fallback_application_name": "torch-registry"}
        if not os.environ.get("PGCONNECT_TIMEOUT"):
            options["connect_timeout"] = _CONNECT
        if not os.environ.get("PGREQUIREAUTH") and pq.version() >= 160000:
            # The bucket names the server, and no server is told a password that it does not know.
            options["require_auth"] = "!password"
        try:
            # Statements are not prepared, as poolers of connections may not know them.
            return _Connection.connect(self._url, autocommit=True, prepare_threshold=None, **options)
        except psycopg.Error as error:
            reason = _told(error)
            is_refused = "FATAL" in str(error) or "password" in reason or "authentication" in reason
            if is_refused and not any(sign in reason for sign in _FOR_LATER):
                raise Denied(
                    f"{self._url}: the server does not let this user in ({reason})",
                    "if that is meant, set PGREQUIREAUTH=password" if "cleartext" in reason else "",
                    "check the database's name, PGUSER, and PGPASSWORD, PGPASSFILE or PGSERVICE",
                ) from None
            raise Unreachable(
                f"{self._url}: the server does not answer ({reason})",
                "repeat, or check its address, PGHOST and PGSERVICE",
            ) from None

    def _refusal(self, error: psycopg.Error, connection: _Connection) -> StorageError:
        reason = _told(error)
        if error.sqlstate == "42501":
            return Denied(
                f"{self._url}: the user {printable(connection.info.user)} lacks a right ({reason})",
                "the owner runs: GRANT "
                f"SELECT, INSERT ON {self._name} TO ... (to make a registry: GRANT CREATE ON SCHEMA public TO ...)",
            )
        if error.sqlstate == "25006":
            return Denied(
                f"{self._url}: the server takes no writes ({reason})",
                "name the one that does, or set PGTARGETSESSIONATTRS=read-write",
            )
        if error.sqlstate == "42P01":
            return StorageError(
                f"{self._url}: there is no table {self._name}",
                "it was dropped, or PGHOST, PGSERVICE or the search path name another place",
            )
        return StorageError(f"{self._url}: the server refuses ({reason})", "see to it, and repeat")


def _told(error: psycopg.Error) -> str:
    """What the server or the client's library says, in one line."""
    text = error.diag.message_primary or str(error).partition("\n")[0]
    return printable(text.rpartition("failed: ")[2].removeprefix("FATAL:").strip())
