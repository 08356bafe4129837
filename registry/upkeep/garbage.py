"""Garbage collection: free what no checkpoint, artifact or running save needs.

Packs and manifests that nothing needs are doomed by an entry of the log (see `registry.upkeep.dooming`), and their names are
never used again. Files go after the entry, once readers have had time.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from registry.catalog.attached import drop_orphans
from registry.catalog.database import OLD
from registry.log import settings
from registry.log.entries import Record
from registry.log.format1 import journal_path
from registry.store import durable, places
from registry.store.errors import NotFound, RegistryError, storage_errors
from registry.store.folder_index import Elsewhere, names_of
from registry.store.pack import INNER
from registry.upkeep.dooming import Dooming, doom_unnamed

if TYPE_CHECKING:
    from registry.catalog.catalog import Catalog
    from registry.catalog.transactions import View
    from registry.store.store import Store

_logger = logging.getLogger(__name__)

_UNNAMED = 86_400.0
"""Seconds that a pack of a shared registry is left alone while no entry names it."""

GRACE = 3_600.0
"""Seconds that a file is left alone after nothing needs it any more, for those who read it."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What gc removed, or would remove, and what waits for its grace period."""

    packs: int
    manifests: int
    temporary: int
    bytes: int
    waiting: int
    waiting_bytes: int
    wait_seconds: float


def collect_garbage(
    catalog: Catalog,
    store: Store,
    *,
    grace: float = GRACE,
    dry_run: bool = False,
    tell: Callable[[Path, int], None] | None = None,
    now: float | None = None,
) -> Collected:
    """Remove what no checkpoint, artifact or running save needs.

    Args:
        grace: seconds that a file is left alone after nothing needs it any more. With 0 nothing is lost either: a save
            finds in its commit what is gone and writes it again, a reader looks where it lies now.
        dry_run: report what would be removed, and remove nothing.
        tell: called with the path and the bytes of each file that goes.
        now: the time, for tests.

    Raises:
        Corrupt: if the log is damaged, or something else stands in the place of a folder; nothing is removed then.
    """
    now = time.time() if now is None else now
    return _Sweep(catalog, store, grace=grace, dry_run=dry_run, tell=tell, now=now).run()


class _Sweep:
    """One garbage collection, and the counts of what it removes."""

    def __init__(
        self,
        catalog: Catalog,
        store: Store,
        grace: float,
        dry_run: bool,
        tell: Callable[[Path, int], None] | None,
        now: float,
    ) -> None:
        self._catalog = catalog
        self._store = store
        self._grace = grace
        self._dry_run = dry_run
        self._tell = tell
        self._now = now
        self._counts = {"packs": 0, "manifests": 0, "temporary": 0}
        self._bytes = self._waiting = self._waiting_bytes = 0
        self._wait = 0.0

    def run(self) -> Collected:
        """Doom what nothing needs, and remove the files that have waited long enough."""
        with storage_errors(self._store.root):
            if not self._dry_run:
                self._catalog.check_writable()
                if self._catalog.format == 1:
                    self._catalog.migrate()
                self._catalog.check_unbroken()
            self._check_folders()
            if not self._dry_run:
                drop_orphans(self._catalog)
            dead = Dooming(self._catalog, self._store).doom(dry_run=self._dry_run)
            if self._is_unnamed_garbage():
                self._sweep("packs", self._store.packs, suffix=".safetensors", dead=dead)
                self._sweep("manifests", self._store.manifests, suffix=".json", dead=dead)
            if self._store.elsewhere is not None:
                self._sweep_elsewhere(self._store.elsewhere)
            self._sweep_temporary()
            if self._catalog.format != 1:
                self._sweep_old_format()
        return Collected(
            **self._counts,
            bytes=self._bytes,
            waiting=self._waiting,
            waiting_bytes=self._waiting_bytes,
            wait_seconds=self._wait,
        )

    def _check_folders(self) -> None:
        """Check that every folder is a folder and every file a regular file, before the first file goes."""
        store = self._store
        places.names_in(self._catalog.journal.folder, inner=1)
        paths = [(store.tmp / name, 1) for name in places.names_in(store.tmp, inner=1)]
        for folder, suffix in ((store.packs, ".safetensors"), (store.manifests, ".json")):
            paths += [
                (folder / digest[:2] / f"{digest}{suffix}", INNER) for digest in names_of(folder, suffix)
            ]
        for path, inner in paths:
            status = places.status_of(path, inner=inner)
            if status is not None:
                places.refuse_odd(status, path)

    def _is_unnamed_garbage(self) -> bool:
        """Whether files that the log does not name are certain to be garbage.

        They are not if the log has never named a pack or a manifest, while there are several of one kind: an old copy of
        the log may have taken its place. (A first save that was killed leaves one.)
        """
        ledger = self._catalog.ledger()
        if ledger.pack_count or ledger.texts or ledger.doomed or ledger.is_any_live:
            return True
        manifests, packs = sum(1 for _ in self._store), sum(1 for _ in self._store.pack_digests())
        if max(manifests, packs) < 2:
            return True
        _logger.warning(
            "%s names no checkpoint, while manifests/ has %d, and packs/ %d: they are kept, as an old copy of the log may "
            "have been put back; registry rebuild --adopt takes them in where there are manifests",
            self._catalog.journal.folder,
            manifests,
            packs,
        )
        return False

    def _sweep(self, kind: str, folder: Path, suffix: str, dead: Collection[str]) -> None:
        """Remove files of what is doomed, and files that no entry names, once they have waited."""
        ledger = self._catalog.ledger()
        for digest in names_of(folder, suffix):
            path = folder / digest[:2] / f"{digest}{suffix}"
            status = places.status_of(path, inner=INNER)
            if status is None:
                continue
            if digest in dead:
                since = self._now
            elif (
                digest in ledger.packs
                or ledger.is_live(digest)
                or digest in ledger.released
                or (digest not in ledger.doomed and self._is_of_a_void(kind, digest, ledger.ids_of_voids()))
            ):
                continue
            else:
                since = _seconds(ledger.doomed[digest]) if digest in ledger.doomed else status.st_mtime
            if self._is_due(since, status.st_size) and self._remove(kind, digest, path):
                self._count(kind, path, status.st_size)

    def _sweep_elsewhere(self, elsewhere: Elsewhere) -> None:
        """Remove packs that the hosts share, once an entry has doomed them and they have waited.

        One that no entry names is doomed first: a save that is about to name it finds that, and writes it anew.
        """
        found = elsewhere.ages()
        ledger = self._catalog.ledger()
        unnamed = [digest for digest in found if digest not in ledger.packs and digest not in ledger.doomed]
        late = [
            digest
            for digest in unnamed
            if self._is_due(self._now - found[digest][0], found[digest][1], self._patience())
        ]
        if late and not self._dry_run and not ledger.ids_of_voids():
            doom_unnamed(self._catalog, self._store, {digest: found[digest][1] for digest in late})
            ledger = self._catalog.ledger()
        dead = {digest for digest in found if digest in ledger.doomed}
        due = [
            digest
            for digest in dead
            if digest in unnamed or self._is_due(_seconds(ledger.doomed[digest]), found[digest][1])
        ]
        if not self._dry_run:
            elsewhere.delete(due)
        for digest in due if not self._dry_run else {*due, *late}:
            self._count("packs", self._store.pack_path(digest), found[digest][1])

    def _patience(self) -> float:
        """Seconds that a pack which no entry names is left alone: an upload, and the save behind it, may take long."""
        return self._grace if not self._grace else max(self._grace, _UNNAMED)

    def _is_of_a_void(self, kind: str, digest: str, named: Collection[str]) -> bool:
        """Whether a manifest is one that an entry without effect names, or a pack has tensors of one.

        `rebuild --adopt` may take it in.

        Args:
            named: the manifests that such entries name.
        """
        if kind == "manifests" or not named:
            return digest in named
        try:
            held = self._store.pack_info(digest).places.keys()
            for manifest_id in named:
                with contextlib.suppress(NotFound):
                    if not held.isdisjoint(self._store.tensors_of(manifest_id)):
                        return True
        except RegistryError:
            # What cannot be read does not show that it is unneeded.
            return True
        return False

    def _remove(self, kind: str, digest: str, path: Path) -> bool:
        """Remove a file, unless an entry has come to need it; false then."""
        if self._dry_run:
            return True
        table, column = ("packs", "digest") if kind == "packs" else ("manifests", "id")
        gone = False

        def compute(view: View) -> list[Record]:
            nonlocal gone
            is_needed = view.query(f"SELECT 1 FROM {table} WHERE {column} = ?", [digest])
            gone = not is_needed and durable.unlink(path, inner=INNER)
            return []

        self._catalog.commit(compute)
        return gone

    def _sweep_temporary(self) -> None:
        """Remove temporary files that no writer holds."""
        for path, status in durable.left_behind(self._store.tmp):
            patience = self._grace if durable.locks_work(path, inner=1) else max(self._grace, GRACE)
            if not self._is_due(status.st_mtime, status.st_size, patience):
                continue
            if self._dry_run or durable.unlink(path, inner=1):
                self._count("temporary", path, status.st_size)

    def _sweep_old_format(self) -> None:
        """Remove what is left of format 1, whose place the log has taken."""
        root = self._store.root
        old = [root / f"{OLD}{part}" for part in ("", "-journal")]
        for path, inner in (*((path, 0) for path in old), (journal_path(root), 1)):
            status = places.status_of(path, inner=inner)
            since = places.status_of(root / settings.NAME)
            if status is None or since is None or not self._is_due(since.st_mtime, status.st_size):
                continue
            if self._dry_run or durable.unlink(path, inner=inner):
                self._count("temporary", path, status.st_size)

    def _is_due(self, since: float, size: int, grace: float | None = None) -> bool:
        """Whether a file has waited for its grace period; if not, it is counted as waiting."""
        grace = self._grace if grace is None else grace
        age = self._now - since
        if age >= grace or not grace:
            return True
        self._waiting += 1
        self._waiting_bytes += size
        self._wait = max(self._wait, min(grace, grace - age))
        return False

    def _count(self, kind: str, path: Path, size: int) -> None:
        if self._tell:
            self._tell(path, size)
        self._counts[kind] += 1
        self._bytes += size


def _seconds(at: str) -> float:
    """A time of the log in seconds since the epoch; infinity if it is malformed."""
    try:
        return datetime.fromisoformat(at).timestamp()
    except ValueError:
        return float("inf")
