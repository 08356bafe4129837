"""The catalog: what follows from the log, in plain SQL, with a copy of the log itself.

It is a view, and holds nothing of its own: a catalog that is missing, damaged, or of another program's making is made
anew from the log. A change is one entry of the log, computed and applied in one exclusive transaction.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.catalog.copies import gaps_in, is_behind, not_before, text_in
from registry.catalog.database import Damaged, Database, FileId, Held, LogState, Replaced, Still
from registry.catalog.lookups import locate, was_removed
from registry.catalog.opening import Opening
from registry.log.entries import manifest_text
from registry.log.sharing import Behind
from registry.store import places
from registry.store.errors import Corrupt, RegistryError, StorageError

if TYPE_CHECKING:
    from registry.catalog.mending import EntriesOf, Mended
    from registry.catalog.refolding import Refolded
    from registry.catalog.transactions import View
    from registry.log.entries import Entry, Record
    from registry.log.ledger import Ledger
    from registry.log.sharing import Shared
    from registry.store.locating import Location
    from registry.store.store import Store

_TRIES = 4

_LOOK_AGAIN = 1.0
"""Seconds after which a connection that stays open checks whether the log has entries that the catalog lacks."""

_BEHIND = 60.0
"""Seconds for which a change is worked out again, while other hosts add entries first."""

_logger = logging.getLogger(__name__)


class Catalog:
    """The catalog of one registry; safe to use from several threads and after a fork.

    Args:
        root: the registry's folder.
        store: gives the store, whose manifests and packs a change reads.
        shared: the log that other hosts add to as well; None where there are none.

    Attributes:
        path: of the database.
        journal: the log in the folder.
    """

    def __init__(self, root: Path, store: Callable[[], Store], shared: Shared | None = None) -> None:
        self._database = Database(root, store, shared)
        self._opening = Opening(self._database, lambda why: self.refold(why=why))
        self._local = threading.local()
        self.shared = shared
        self.path = self._database.path
        self.journal = self._database.journal

    @property
    def format(self) -> int:
        """The format that the registry has."""
        return self._database.format

    @format.setter
    def format(self, number: int) -> None:
        self._database.format = number

    def create(self, created_by: str) -> None:
        """Create the log and the catalog, unless they are there or another process is creating them.

        The log has a first entry before anything is saved, so that a lost log can be told from a new one.
        """
        # Lazy: start-up.
        from registry.catalog.refolding import refold_locked

        self.journal.create()
        with self.journal.locked():
            if places.status_of(self.path) is None:
                refold_locked(self._database)

        def begin(view: View) -> list[Record]:
            is_new = not view.query("SELECT 1 FROM log LIMIT 1")
            return [{"op": "begin", "by": created_by}] if is_new else []

        self.commit(begin)

    def connection(self, *, writes: bool = False) -> sqlite3.Connection:
        """This thread's connection in this process.

        Args:
            writes: whether it must be to the catalog's file, even if that is behind the log.

        Raises:
            NotFound: if the registry is not there any more.
            Corrupt: if the log and the catalog's copy of it tell different histories.
            StorageError: if it cannot be opened.
        """
        return self._held(writes=writes).connection

    def close(self) -> None:
        """Close this thread's connection."""
        self._database.close()

    @property
    def is_writable(self) -> bool:
        """Whether this process may change the catalog."""
        return self._database.is_writable

    def check_writable(self) -> None:
        """See `registry.catalog.database.Database.check_writable`."""
        self._database.check_writable()

    def migrate(self, *, chooses: bool = False) -> list[str]:
        """Take a registry of format 1 to the present one; see `registry.catalog.old_format.OldFormat.migrate`."""
        # Lazy: start-up.
        from registry.catalog.old_format import OldFormat

        return OldFormat(self._database).migrate(chooses=chooses)

    def commit(self, compute: Callable[[View], Sequence[Record]]) -> Entry | None:
        """Make one change: wholly, or not at all.

        Args:
            compute: returns the records, from what it reads in the view that it is given. It has no other effect, and
                may be called several times.

        Returns:
            The entry of the log; None if there was nothing to record.

        Raises:
            RegistryError: from `compute`, or saying why the change cannot be made. Nothing was changed then, unless a
                `StorageError` says that the log has the change.
        """
        # Lazy: start-up.
        from registry.catalog.transactions import commit

        if self.format == 1:
            self.migrate()
        until, behind, attempt = time.monotonic() + _BEHIND, 0, 0
        while attempt < 3:
            try:
                return commit(self._database, self._held(writes=True), compute)
            except Behind:
                if time.monotonic() > until:
                    raise StorageError(
                        f"{self.path}: other hosts have kept changing the registry for {_BEHIND:.0f} s",
                        "repeat",
                    ) from None
                # Somebody else got on; whoever waits longest is not to wait for ever.
                behind += 1
                time.sleep(random.uniform(0, min(0.6, 0.02 * 2**behind)))
                continue
            except Replaced:
                self.close()
            except StorageError:
                # The catalog may be behind the log.
                self.close()
                raise
            except Damaged as error:
                if attempt:
                    raise
                _logger.warning("%s", error)
                self.refold(why="damaged")
            attempt += 1
        raise Corrupt(f"{self.path}: the catalog does not stay as it is made", "check the disk")

    def adopt(self, compute: Callable[[Ledger], Sequence[Record]], reason: str) -> list[Record]:
        """Accept that what cannot be read in the log is lost; see `registry.catalog.transactions.adopt`."""
        # Lazy: start-up.
        from registry.catalog.transactions import adopt

        return adopt(self._database, self._held(writes=True), compute, reason=reason)

    def check_unbroken(self) -> None:
        """Check that changes are possible, before anything is written for one.

        Raises:
            Corrupt: if entries of the log are lost, and nobody has accepted that.
        """
        if gaps := self.gaps():
            if self.shared is not None:
                # Brings what is lost here from where hosts share it, or says why it cannot.
                self.commit(lambda view: [])
                return
            raise not_before(self.journal, gaps[0])

    def gaps(self) -> list[str]:
        """What is damaged both in the log and in its copy, in words. While anything is, no change is possible."""
        found = self.query("SELECT value FROM state WHERE key = 'gaps'")
        return gaps_in(found[0][0]) if found else []

    def refold(self, *, why: str = "") -> Refolded:
        """Make the catalog anew from the log, and migrate one of format 1; see `registry.catalog.refolding.refold`."""
        # Lazy: start-up.
        from registry.catalog.refolding import refold

        self.check_writable()
        problems = self.migrate(chooses=True) if self.format == 1 else []
        return refold(self._database, self.ledger, why=why)._replace(problems=problems)

    def mend(self, entries_of: EntriesOf, *, dry_run: bool = False) -> Mended:
        """Put back entries of the log from a second copy of it; see `registry.catalog.mending.mend`.

        Once it is mended, `refold` makes the catalog anew.
        """
        # Lazy: start-up.
        from registry.catalog.mending import mend

        return mend(self._database, self.connection(), entries_of, dry_run=dry_run)

    def problems(self) -> list[str]:
        """Where the log, the catalog's copy of it and the tables contradict one another, in words.

        See `registry.catalog.invariants.Comparison`.
        """
        # Lazy: start-up.
        from registry.catalog.invariants import Comparison

        if self.format == 1:
            # Lazy: start-up.
            from registry.catalog.old_format import OldFormat

            return OldFormat(self._database).problems()
        return Comparison(self._database, self.connection).problems()

    def ledger(self) -> Ledger:
        """What follows from the folder's log as it is now, read from the log itself.

        Raises:
            Corrupt: if the log is damaged, and the catalog's copy does not have what it has lost.
        """
        if self.format == 1:
            # Lazy: start-up.
            from registry.catalog.old_format import OldFormat

            return OldFormat(self._database).ledger()
        for heals in (True, False):
            known = self._followed()
            if not known.has_gaps:
                return known
            if heals and self.is_writable and not self.connection().in_transaction:
                # The catalog's copy may have what the log has lost.
                self.refold(why="damaged")
        gap = next(gap for gap in known.gaps if gap.last >= gap.first)
        raise not_before(self.journal, gap)

    def discard(self, packs: Collection[str]) -> None:
        """Remove the files of packs that were written for nothing.

        One that an entry names stays: a save takes effect although its commit fails, and `rebuild --adopt` takes in what
        it finds. Where the log cannot be read, gc decides later.
        """
        if not packs:
            return
        # An error on the way here may be about to be raised.
        with contextlib.suppress(RegistryError):
            # A long log is read before it is locked, so that nobody waits for that.
            self._followed()
            with self.journal.locked():
                ledger = self._followed()
                for pack in packs if not ledger.has_gaps else ():
                    if pack not in ledger.packs:
                        self._database.store.discard_pack(pack)

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query that only reads.

        Raises:
            Corrupt: if the catalog is damaged, and cannot be made anew.
            StorageError: if it cannot be read, or others keep changing it.
        """
        database = self._database
        for _ in range(_TRIES):
            try:
                with database.errors():
                    held = self._held()
                    rows = held.connection.execute(sql, parameters).fetchall()
                    if not isinstance(held.identity, Still) or held.identity == database.still():
                        return rows
            except Damaged as error:
                if not self.is_writable or self.connection().in_transaction:
                    raise
                _logger.warning("%s", error)
                self.refold(why="damaged")
            except StorageError:
                kept = database.held
                if kept is None or kept.connection.in_transaction:
                    raise
                with database.errors():
                    is_same = kept.identity == database.identity(kept.identity)
                if is_same:
                    raise
        raise StorageError(f"{self.path}: other processes keep changing the catalog", "repeat")

    def locate(self, digests: Collection[str]) -> dict[str, Location]:
        """Where stored tensors lie; as `registry.store.locating.Index` asks for it."""
        return locate(self.query, digests)

    def look_again(self) -> None:
        """Have the next query see whether the catalog is behind the log, or is another file by now."""
        if held := self._database.held:
            held.looked = -math.inf

    def manifest_text(self, manifest_id: str) -> bytes | None:
        """The text of a manifest that counts, from the log; None if the log does not have it."""
        try:
            with self._database.errors():
                return text_in(self.connection())(manifest_id)
        except RegistryError:
            return None

    def keeps(self, text: bytes) -> bool:
        """Whether the log carries a manifest with this text; as `registry.store.locating.Index` asks for it."""
        return self.format > 1 and bool(manifest_text(text))

    def was_removed(self, manifest_id: str) -> bool:
        """Whether a manifest counted once, and does not any more."""
        with contextlib.suppress(RegistryError):
            return was_removed(self.query, manifest_id)
        return False

    def _followed(self) -> Ledger:
        """What follows from the folder's log alone; it may have gaps."""
        # Lazy: start-up.
        from registry.log.history import walk
        from registry.log.ledger import Ledger

        known = getattr(self._local, "ledger", None) or Ledger()
        self._local.ledger = None
        if known.seq and self.journal.digest_before(known.end) != known.digest:
            known = Ledger()
        known.follow(walk(self.journal.read(known.end), known.seq, known.digest))
        if not known.has_gaps:
            self._local.ledger = known
        return known

    def _held(self, *, writes: bool = False) -> Held:
        """This thread's connection, opened again unless it shows what the log says; see `connection`."""
        database = self._database
        if database.format == 1:
            database.look_for_another_format()
        held = database.held
        if held is not None and held.pid != os.getpid():
            # They are the parent's.
            held = self._local.ledger = None
        if held is not None:
            if held.connection.in_transaction or self._is_current(held, writes):
                return held
            # The catalog was made anew, or it is open as if it never changed, and has changed.
            self.close()
        opened = self._opening.opened(writes=writes)
        held = database.hold(opened.connection, opened.identity)
        if writes:
            # It may be behind the log, so the next reader must look.
            held.looked = -math.inf
        return held

    def _is_current(self, held: Held, writes: bool) -> bool:
        """Whether a connection shows what the log says.

        The log itself is looked at only now and then. A catalog is behind it only after trouble, such as a full disk.
        """
        database = self._database
        if held.identity != database.identity(held.identity):
            return False
        if isinstance(held.identity, LogState | Still):
            return not (writes and database.is_writable)
        if not writes and database.shared is not None and database.shared.is_due():
            # Lazy: start-up.
            from registry.catalog.transactions import ask_others

            ask_others(database, held.connection, held.identity)
        if writes or held.looked + _LOOK_AGAIN > time.monotonic() or not isinstance(held.identity, FileId):
            return True
        held.looked = time.monotonic()
        with database.errors():
            return not is_behind(held.connection, database.journal)
