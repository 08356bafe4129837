"""Garbage collection: free what no checkpoint, artifact or running save needs.

Packs and manifests that nothing needs are doomed by an entry of the log, and their names are never used again. What
the catalog says only proposes them: each is proven to be unneeded from the log itself, the manifests and the packs'
own indexes, so a catalog that lies cannot make anything be deleted. Files go after the entry, once readers have had time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from registry.catalog import settings
from registry.catalog.catalog import OLD
from registry.catalog.entries import Record
from registry.catalog.format1 import journal_path
from registry.catalog.invariants import MAX_CHAIN
from registry.catalog.schema import UNUSED
from registry.store import durable, places
from registry.store.digest import is_digest
from registry.store.errors import Corrupt, NotFound, RegistryError, storage_errors
from registry.store.folder_index import names_of
from registry.store.pack import INNER

if TYPE_CHECKING:
    from registry.catalog.catalog import Catalog, View
    from registry.catalog.ledger import Ledger
    from registry.catalog.lookups import Query
    from registry.store.store import Store

_ATTEMPTS = 4
_MOST = 100_000
"""Packs, and manifests, that one entry dooms; the next gc goes on."""

_logger = logging.getLogger(__name__)

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
        Corrupt: if the log is damaged, or a folder of the registry is none; nothing is removed then.
    """
    return _Sweep(catalog, store, grace, dry_run, tell, time.time() if now is None else now).run()


class _Sweep:
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
        with storage_errors(self._store.root):
            if not self._dry_run:
                self._catalog.check_writable()
                if self._catalog.format == 1:
                    self._catalog.migrate()
                self._catalog.check_unbroken()
            self._check_folders()
            dead = self._doom()
            if self._knows_of_some():
                self._sweep("packs", self._store.packs, ".safetensors", dead)
                self._sweep("manifests", self._store.manifests, ".json", dead)
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
        """See that every folder is one and every file is one, before the first file goes."""
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

    # -- dooming -----------------------------------------------------------------------------------------

    def _doom(self) -> set[str]:
        """Doom what nothing needs; with a dry run, what would be doomed."""
        if not self._has_candidates():
            return set()
        for attempt in range(_ATTEMPTS):
            seq = self._catalog.ledger().seq
            packs, manifests = self._unneeded(self._catalog.query)
            if self._dry_run:
                return {*packs, *manifests}
            record = {"op": "doom", "packs": packs, "manifests": manifests}
            try:
                self._catalog.commit(self._computed(seq, record, is_last=attempt == _ATTEMPTS - 1))
                break
            except _Overtaken:
                continue
        return set()

    def _computed(self, seq: int, record: Record, *, is_last: bool) -> Callable[[View], list[Record]]:
        """The doom that was proven when the log ended with an entry; the last time it is proven while others wait."""

        def compute(view: View) -> list[Record]:
            found = record
            if self._catalog.ledger().seq != seq:
                if not is_last:
                    raise _Overtaken
                packs, manifests = self._unneeded(view.query)
                found = {"op": "doom", "packs": packs, "manifests": manifests}
            return [found] if found["packs"] or found["manifests"] else []

        return compute

    def _has_candidates(self) -> bool:
        query = self._catalog.query
        released = query("SELECT 1 FROM released LIMIT 1")
        return bool(released or query(f"SELECT 1 FROM packs WHERE {UNUSED} LIMIT 1"))

    def _unneeded(self, query: Query) -> tuple[list[str], list[str]]:
        """Digests of packs, and ids of manifests, that are proven to be needed by nothing."""
        ledger = self._catalog.ledger()
        rows = query(f"SELECT digest FROM packs WHERE {UNUSED} ORDER BY number", [])
        packs = [str(row[0]) for row in rows if row[0] in ledger.packs]
        kept = ledger.ids_of_voids()
        manifests = [found for found in ledger.released if found not in kept]
        try:
            unneeded = Proof(self._store, ledger, query).unneeded(packs) if packs else []
        except RegistryError as error:
            _logger.warning("no pack is removed, as it is not certain what is needed: %s", error)
            unneeded = []
        return unneeded[:_MOST], manifests[:_MOST]

    # -- files -------------------------------------------------------------------------------------------

    def _knows_of_some(self) -> bool:
        """Whether what the log does not name is known to be garbage.

        It is not where the log has never named a pack or a manifest, while there are several: then an old copy of it may
        have taken its place. A first save that was killed leaves one.
        """
        ledger = self._catalog.ledger()
        if ledger.pack_count or ledger.texts or ledger.doomed or ledger.is_any_live:
            return True
        unknown = sum(1 for _ in self._store)
        if unknown < 2:
            return True
        _logger.warning(
            "%s names no checkpoint, while manifests/ has %d: they are kept, as an old copy of the log may have been put "
            "back; registry rebuild --adopt takes them in",
            *(self._catalog.journal.folder, unknown),
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
        except RegistryError:  # What cannot be read does not show that it is unneeded.
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
        for name in places.names_in(self._store.tmp, inner=1):
            path = self._store.tmp / name
            status = places.status_of(path, inner=1)
            if status is None:
                continue
            try:
                fd = places.open_file(path, os.O_RDONLY, inner=1)
            except (FileNotFoundError, Corrupt):
                continue
            try:
                if not durable.try_lock(fd):
                    continue
                patience = self._grace if durable.locks_work(path, inner=1) else max(self._grace, GRACE)
                if not self._is_due(status.st_mtime, status.st_size, patience):
                    continue
                if self._dry_run or durable.unlink(path, inner=1):
                    self._count("temporary", path, status.st_size)
            finally:
                os.close(fd)

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


class _Overtaken(RegistryError):
    """Something was recorded since the proof. Never reaches users."""


class Proof:
    """Shows that packs are needed by nothing, from the log, the manifests and the packs' own indexes.

    Args:
        query: asks the catalog where else a tensor lies, which is then looked up in that pack's index.
    """

    def __init__(self, store: Store, ledger: Ledger, query: Query) -> None:
        self._store = store
        self._ledger = ledger
        self._query = query

    def unneeded(self, packs: Sequence[str]) -> list[str]:
        """Those of some packs that nothing needs; a pack whose index cannot be read is one only if all else is whole."""
        left = dict.fromkeys(packs)
        held: dict[str, set[str]] = {}
        unreadable = []
        for pack in packs:
            try:
                for digest in self._store.pack_info(pack).places:
                    held.setdefault(digest, set()).add(pack)
            except RegistryError:
                unreadable.append(pack)
        if unreadable and not self._all_whole(set(packs)):
            for pack in unreadable:
                del left[pack]
        needed = self._needed_of(held.keys())
        while True:
            taken = set(packs) & left.keys()
            lacking = {digest for digest in needed if not self._lies_elsewhere(digest, taken)}
            back = {pack for digest in lacking for pack in held[digest]} & left.keys()
            if not back:
                return list(left)
            for pack in back:
                del left[pack]

    def _needed_of(self, digests: Collection[str]) -> set[str]:
        """Those of some tensors that a manifest has, or that a difference in any pack rests on."""
        found: set[str] = set()
        for tensors in self._manifests():
            found |= tensors.intersection(digests)
        for pack, about in self._ledger.packs.items():
            if about.differences:
                found |= {base for base in self._bases_in(pack) if base in digests}
        return found

    def _manifests(self) -> Iterable[frozenset[str]]:
        """The tensors of each manifest that counts, or that an entry without effect names."""
        for manifest_id in self._ledger.live_manifests():
            yield self._store.tensors_of(manifest_id)
        for manifest_id in self._ledger.ids_of_voids():
            with contextlib.suppress(NotFound):
                yield self._store.tensors_of(manifest_id)

    def _bases_in(self, pack: str) -> Iterable[str]:
        held = self._store.pack_info(pack).places.values()
        return [place.base for place in held if place.base]

    def _lies_elsewhere(self, digest: str, taken: Collection[str], depth: int = 0) -> bool:
        """Whether a tensor can be had from packs that stay."""
        if depth > MAX_CHAIN:
            return False
        rows = self._query(
            "SELECT p.digest FROM tensors t JOIN packs p ON p.number = t.pack WHERE t.digest = ?", [digest]
        )
        for (name,) in rows:
            pack = str(name)
            if pack in taken or pack not in self._ledger.packs or not is_digest(pack):
                continue
            try:
                place = self._store.pack_info(pack).places.get(digest)
            except RegistryError:
                continue
            if place is None or not self._store.pack_is_whole(pack, self._ledger.packs[pack].size):
                continue
            if place.base is None or self._lies_elsewhere(place.base, taken, depth + 1):
                return True
        return False

    def _all_whole(self, without: Collection[str]) -> bool:
        """Whether every tensor that a manifest has can be had from packs other than some."""
        held: set[str] = set()
        for pack in self._ledger.packs.keys() - without:
            try:
                held.update(self._store.pack_info(pack).places)
            except RegistryError:
                return False
        return all(tensors <= held for tensors in self._manifests())


def _seconds(at: str) -> float:
    """A time of the log in seconds since the epoch."""
    try:
        return datetime.fromisoformat(at).timestamp()
    except ValueError:
        return float("inf")
