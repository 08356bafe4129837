"""Transactions: catching up with the log, and adding an entry to it and to the tables, wholly or not at all."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from typing import Any

from registry.catalog import pairing
from registry.catalog.change import Change
from registry.catalog.copies import Material, gaps_in, head, not_before, state, text_in
from registry.catalog.database import Damaged, Database, Held, Replaced
from registry.catalog.invariants import broken_by, takes_needed
from registry.catalog.refolding import refold_in_place
from registry.log import entries
from registry.log.entries import START, Entry, Record
from registry.log.history import End, Gap, walk
from registry.log.journal import BEGINNING, Position
from registry.log.ledger import Ledger
from registry.log.refusals import Refused
from registry.log.sharing import Shared, history_changed
from registry.store.errors import Corrupt, RegistryError, StorageError, Unsupported
from registry.store.locating import Location
from registry.store.store import Store

_logger = logging.getLogger(__name__)


class View:
    """The catalog inside a change: what is read here holds until the change is made.

    Attributes:
        store: the manifests and packs.
    """

    def __init__(self, change: Change, store: Store) -> None:
        self._change = change
        self.store = store

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query that only reads."""
        return self._change.query(sql, parameters)

    def locate(self, digests: Collection[str]) -> dict[str, Location]:
        """Where stored tensors lie."""
        return self._change.packs.locate(digests)

    def next_version(self, model: str) -> int:
        """The number of a model's next version.

        Raises:
            Damaged: if the catalog contradicts itself.
        """
        rows = self.query("SELECT next_version, next_again FROM models WHERE name = ?", [model])
        ((newest,),) = self.query("SELECT MAX(version) FROM versions WHERE model = ?", [model])
        number, again = rows[0] if rows else (1, 1)
        if type(number) is not int or number != again or (newest or 0) >= number:
            raise Damaged(f"the catalog does not know the next version of {model}", "run: registry rebuild")
        return number


@contextlib.contextmanager
def exclusive(
    database: Database, connection: sqlite3.Connection, identity: object, *, seconds: float = 60.0
) -> Iterator[Change]:
    """A transaction that no other writer has beside it, even one with another catalog.

    Args:
        identity: that of the catalog's file when it was opened; see `Database.identity`.
        seconds: how long to wait for other writers at most.

    Raises:
        Replaced: if the catalog's file is another one by now.
    """
    database.check_writable()
    with database.errors(), database.journal.locked(seconds=seconds):
        if identity != database.identity(identity):
            raise Replaced
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error:
            if identity != database.identity(identity):
                raise Replaced from None
            raise
        try:
            change = Change(connection, Material(database.store, text_in(connection)))
            change.beside = pairing.after(database.path, connection, database.alone)
            yield change
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            raise
        if connection.in_transaction:
            connection.execute("COMMIT")


def catch_up(database: Database, change: Change, *, heals: bool = True) -> None:
    """Apply what the log holds and the catalog does not.

    Args:
        heals: whether the folder's log may be put in order on the way.
    """
    connection, journal = change.connection, database.journal
    seq, digest, end = head(connection)
    if journal.ends_at(end, seq) and (not seq or journal.digest_before(end) == digest):
        return
    if heals:
        journal.sync()
    size = journal.size(end.segment) or 0
    if size < end.offset or (seq and journal.digest_before(end) != digest):
        refold_in_place(database, change, connection, heals=heals)
        return
    for item in walk(journal.read(end), seq, digest):
        if isinstance(item, End):
            if item.is_torn and heals:
                journal.cut(item.position)
            return
        if isinstance(item, Gap):
            refold_in_place(database, change, connection, heals=heals)
            return
        _apply(change, item.entry)
        if change.is_unsure:
            refold_in_place(database, change, connection, heals=heals)
            return
        change.keep(item.entry)
        assert item.end is not None
        change.set_head(item.entry, item.end)


def _apply(change: Change, entry: Entry) -> bool:
    """Apply an entry to the tables; false if it contradicts those before it, and so has no effect. verify names it."""
    change.connection.execute("SAVEPOINT entry")
    try:
        change.take(entry)
        return True
    except Refused:
        change.connection.execute("ROLLBACK TO entry")
        change.packs.forget()
        if any(record["op"] in ("adopt", "publish") for record in entry.records):
            change.is_unsure = True
        return False
    finally:
        change.connection.execute("RELEASE entry")


def follow(database: Database, change: Change) -> None:
    """Catch up with the folder's log, and with what other hosts have added to it.

    Raises:
        Corrupt: if the log that they share tells another history.
        StorageError: if it cannot be reached.
    """
    catch_up(database, change)
    _take_in_news(database, change)


def _take_in_news(database: Database, change: Change) -> None:
    if database.shared is None:
        return
    if state(change.connection, "gaps"):
        _take_anew(database, database.shared, change)
        return
    seq, digest, end = head(change.connection)
    news = _harmless(database.shared, change, database.shared.news(seq, digest))
    try:
        after = database.journal.append_all(news, end)
    finally:
        news.close()
    if after != end:
        catch_up(database, change)


def _harmless(shared: Shared, change: Change, news: Iterator[Entry]) -> Generator[Entry, None, None]:
    """Entries of other hosts, up to one that takes away packs which are needed.

    Such an entry, and all behind it, is not taken in by any host, so none deletes these packs.

    Raises:
        Corrupt: if there is one.
    """
    connection = change.connection
    waiting: list[Entry] = []
    connection.execute("SAVEPOINT news")
    try:
        for entry in news:
            waiting.append(entry)
            # Only these can do harm. What comes before one is applied once there is one.
            if any(record["op"] in ("doom", "replace") for record in entry.records):
                problem = _problem_of(change, waiting)
                waiting = []
                if problem:
                    raise Corrupt(
                        f"{shared.url}: entry {entry.seq} of the log is not sound: {problem}. A broken program wrote it. "
                        "Nothing is written",
                        "remove it and all behind it from journal/",
                    )
            yield entry
    finally:
        # What was taken in is applied from this host's copy of the log.
        connection.execute("ROLLBACK TO news")
        connection.execute("RELEASE news")
        change.packs.forget()


def _problem_of(change: Change, waiting: Sequence[Entry]) -> str | None:
    """What the last of some entries takes away although it is needed; None if it takes nothing, or nobody can tell."""
    has_effect = False
    for entry in waiting:
        has_effect = _apply(change, entry)
        change.keep(entry)
    with contextlib.suppress(RegistryError):
        return takes_needed(change) if has_effect and not change.is_unsure else None
    return None


def _take_anew(database: Database, shared: Shared, change: Change) -> None:
    """Write this host's copy of the log anew, which is damaged, from the log that hosts share.

    Raises:
        Corrupt: if that does not have the last entry that can be read here.
        StorageError: if it cannot be reached.
    """
    journal = database.journal
    seq, digest, _ = head(change.connection)
    found = list(shared.news(0, START))
    if seq and (len(found) < seq or found[seq - 1].digest != digest):
        raise history_changed(shared.url, f": entry {seq}, which this host has, is not there")
    if not found:
        raise Corrupt(f"{shared.url}: the log is gone; somebody has edited the bucket. Nothing is written")
    journal.remove(journal.segments())
    journal.append_all(found, BEGINNING)
    refold_in_place(database, change, None)
    _logger.warning("%s was damaged; it was written again from %s", journal.folder, shared.url)


def commit(database: Database, held: Held, compute: Callable[[View], Sequence[Record]]) -> Entry | None:
    """Make one change, once; see `registry.catalog.catalog.Catalog.commit`.

    Args:
        held: this thread's connection, to the catalog's file.

    Raises:
        Replaced: if the catalog's file is another one by now.
        Damaged: if the catalog contradicts itself, or the change does.
    """
    store = database.store
    is_shown = True
    with exclusive(database, held.connection, held.identity) as change:
        records = _worked_out(database, change, compute)
        if not records:
            return None
        for record in records:
            entries.check_record(record)
        seq, digest, end = head(change.connection)
        entry = entries.write(seq + 1, digest, records)
        try:
            change.take(entry)
        except Refused as error:
            raise Damaged(f"{database.path}: {error}", "run: registry rebuild") from None
        if problem := broken_by(change, entry, store):
            raise Damaged(f"{database.path}: {problem}", "run: registry rebuild")
        change.keep(entry)
        if database.shared is not None:
            database.shared.add(entry)
        else:
            end = database.journal.append(entry, end)
        try:
            if database.shared is not None:
                # It has happened, for all hosts.
                end = database.journal.append(entry, end)
            change.set_head(entry, end)
            change.connection.execute("COMMIT")
        except (sqlite3.Error, StorageError, OSError) as error:
            # The change has happened all the same: the log has the entry.
            is_shown = False
            with contextlib.suppress(sqlite3.Error):
                change.connection.execute("ROLLBACK")
            _logger.warning(
                "%s: %s; entry %d is in the log, and the catalog shows it once it can be written",
                database.path,
                error,
                entry.seq,
            )
    if not is_shown:
        database.close()
    return entry


def _worked_out(
    database: Database, change: Change, compute: Callable[[View], Sequence[Record]]
) -> list[dict[str, Any]]:
    """The records of a change, from a view that has caught up.

    Whether other hosts have added something is not asked where that is unlikely: if they have, the entry cannot be added, and
    the change is worked out again.
    """
    view = View(change, database.store)
    if database.shared is not None and database.shared.is_likely_last():
        catch_up(database, change)
        _refuse_gaps(database, change)
        # Nothing to do, and an error, may be due to what has not been seen.
        with contextlib.suppress(RegistryError):
            if found := compute(view):
                return [dict(record) for record in found]
    follow(database, change)
    _refuse_gaps(database, change)
    return [dict(record) for record in compute(view)]


def adopt(
    database: Database, held: Held, compute: Callable[[Ledger], Sequence[Record]], *, reason: str
) -> list[Record]:
    """Accept that what cannot be read in the log is lost, and go on behind it.

    Args:
        held: this thread's connection, to the catalog's file.
        compute: returns what else to record, from the ledger of the readable entries.
        reason: why, for those who read the log.

    Returns:
        What was recorded: in one entry, or in several where one would be too large.

    Raises:
        StorageError: if the folder cannot be written.
    """
    connection, journal = held.connection, database.journal
    with exclusive(database, connection, held.identity) as change:
        ledger = refold_in_place(database, change, connection).ledger
        gaps = [[gap.first, gap.last] for gap in ledger.gaps if gap.last >= gap.first]
        accepted = [{"op": "adopt", "gaps": gaps, "reason": reason}] if gaps else []
        # The losses are accepted last, and nothing takes their numbers: until then there is a gap, so that nothing is
        # changed or deleted, and an adoption that is interrupted is repeated.
        records = [*compute(ledger), *accepted]
        if not records:
            return []
        seq, digest = max([ledger.seq, *(last for _, last in gaps)]), ledger.digest
        end = ledger.end if ledger.end.offset else Position(seq + 1, 0)
        made: list[Entry] = []
        for part in entries.in_parts(records):
            made.append(entries.write(seq + 1, digest, part))
            seq, digest = made[-1].seq, made[-1].digest
        if (journal.size(end.segment) or 0) > end.offset:
            journal.cut(end)
        for entry in made:
            end = journal.append(entry, end)
        now = refold_in_place(database, change, connection).ledger
        if now.digest != digest or now.has_gaps:
            raise Corrupt(
                f"{journal.folder}: what was adopted does not follow from the log",
                "check the disk, and repeat",
            )
    return records


def finish_interrupted(database: Database, connection: sqlite3.Connection, identity: object) -> bool:
    """Finish a change that a crash interrupted; false if another process holds the log, or the disk is full."""
    # Where hosts share a log, whoever holds it here may be waiting for a network, and is catching up, too.
    seconds = 60.0 if database.shared is None else 0.0
    try:
        with exclusive(database, connection, identity, seconds=seconds) as change:
            catch_up(database, change)
    except StorageError as error:
        _logger.debug("the catalog is behind the log: %s", error)
        return False
    except Replaced:
        # `Opening` opens the new one.
        pass
    return True


def ask_others(database: Database, connection: sqlite3.Connection, identity: object) -> None:
    """Take in what other hosts have added to a shared log, for somebody who reads.

    Nobody waits for another process of this host, which is adding an entry or asking as well. Where the log cannot be
    reached, what this host has is read all the same, and a warning says so.
    """
    try:
        with exclusive(database, connection, identity, seconds=0.0) as change:
            catch_up(database, change)
            try:
                _take_in_news(database, change)
            except (StorageError, Corrupt, Unsupported) as error:
                since = database.shared.as_of() if database.shared else ""
                _logger.warning("%s; what is shown is as of %s", error, since)
    except (StorageError, Replaced) as error:
        _logger.debug("other hosts were not asked: %s", error)


def _refuse_gaps(database: Database, change: Change) -> None:
    """Refuse a change while entries of the log are lost, and nobody has accepted that."""
    gaps = state(change.connection, "gaps")
    if gaps:
        raise not_before(database.journal, gaps_in(gaps)[0])
