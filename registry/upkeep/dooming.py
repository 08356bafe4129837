"""Dooming: an entry says that nothing needs certain packs and manifests. From then on anybody may delete their files.

What the catalog says only proposes them. The proof comes from the log itself, the manifests and the packs' own indexes, so
a catalog that lies cannot make anything be deleted.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from registry.catalog.invariants import MAX_CHAIN
from registry.catalog.schema import UNUSED
from registry.log.entries import Record, pack_record
from registry.store.digest import is_digest
from registry.store.errors import Corrupt, NotFound, RegistryError

if TYPE_CHECKING:
    from registry.catalog.catalog import Catalog
    from registry.catalog.lookups import Query
    from registry.catalog.transactions import View
    from registry.log.ledger import Ledger
    from registry.store.store import Store

_ATTEMPTS = 4
_MOST = 100_000
"""Packs that one entry dooms at most, and as many manifests. The next gc dooms the others."""

_logger = logging.getLogger(__name__)


class Dooming:
    """Dooms what no checkpoint or artifact needs."""

    def __init__(self, catalog: Catalog, store: Store) -> None:
        self._catalog = catalog
        self._store = store

    def doom(self, *, dry_run: bool) -> set[str]:
        """Doom what nothing needs, by an entry of the log.

        Args:
            dry_run: write none.

        Returns:
            With a dry run, digests of the packs and ids of the manifests that would be doomed; else nothing.
        """
        if not self._has_candidates():
            return set()
        for attempt in range(_ATTEMPTS):
            seq = self._catalog.ledger().seq
            packs, manifests = self._unneeded(self._catalog.query)
            if dry_run:
                return {*packs, *manifests}
            record = {"op": "doom", "packs": packs, "manifests": manifests}
            try:
                self._catalog.commit(self._computed(seq, record, is_last=attempt == _ATTEMPTS - 1))
                break
            except _Overtaken:
                continue
        return set()

    def _computed(self, seq: int, record: Record, *, is_last: bool) -> Callable[[View], list[Record]]:
        """What to commit: the record that was proven while the log ended at `seq`.

        On the last attempt it is proven again inside the commit, while others wait.
        """

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


def doom_unnamed(catalog: Catalog, store: Store, packs: Mapping[str, int]) -> None:
    """Doom packs that no entry names, so that none ever will.

    Args:
        packs: their sizes in bytes.
    """
    readable = {}
    for digest, size in packs.items():
        # What is no pack may be anything, and stays.
        with contextlib.suppress(Corrupt):
            if store.pack_info(digest).size == size:
                readable[digest] = size

    def compute(view: View) -> list[Record]:
        left = [
            digest
            for digest in readable
            if not view.query("SELECT 1 FROM packs WHERE digest = ?", [digest])
            and not view.query("SELECT 1 FROM doomed WHERE digest = ?", [digest])
        ]
        if not left:
            return []
        # Only what counts can be doomed.
        counts = [pack_record(view.store.pack_info(digest)) for digest in left]
        return [*counts, {"op": "doom", "packs": left, "manifests": []}]

    catalog.commit(compute)


class _Overtaken(RegistryError):
    """Another entry was recorded since the proof. Never reaches users."""


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
        """Those of some packs that nothing needs.

        A pack whose index cannot be read is one of them only if everything is whole without these packs.
        """
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
        places = self._store.pack_info(pack).places.values()
        return [place.base for place in places if place.base]

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
