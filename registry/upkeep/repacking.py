"""Repacking: what is needed of a pack is written to a new one, which takes its place in one commit."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from registry.catalog.lookups import are_doomed, batches, can_be_turned_back, locate, marks
from registry.log.entries import Record, pack_record
from registry.store.errors import Corrupt, NotFound, RegistryError

if TYPE_CHECKING:
    from registry.catalog.catalog import Catalog
    from registry.catalog.lookups import Query
    from registry.catalog.transactions import View
    from registry.store.pack import PackInfo
    from registry.store.store import Store

_WASTE = 0.5
"""Once nothing needs this share of a pack's bytes, the rest is copied to a new pack."""

_WORTH_IT = 4 << 10
"""Bytes that must not be needed any more for it: a pack's header alone takes as many."""

_MAX_USERS = 20
"""Manifests to read at most to know what of a pack is needed."""


class Tidied(NamedTuple):
    """A pack of which most was not needed any more; sizes in bytes.

    Attributes:
        after: the size of what took its place; None if nothing did.
    """

    before: int
    after: int | None


def tidy(
    catalog: Catalog,
    store: Store,
    packs: Iterable[str],
    *,
    dry_run: bool = False,
    most_users: int | None = _MAX_USERS,
) -> list[Tidied]:
    """Repack those of some packs of which half or more is not needed any more.

    Args:
        dry_run: only say which.
        most_users: packs that more manifests rely on stay as they are, as all of these have to be read.
    """
    found = []
    for pack in packs:
        rows = catalog.query("SELECT size FROM packs WHERE digest = ?", [pack])
        if not rows or (most_users is not None and len(users_of(catalog.query, pack)) > most_users):
            continue
        ((before,),) = rows
        with unless_gone(catalog, pack):
            needed = needed_of(catalog.query, store, pack)
            places = store.pack_info(pack).tensors
            size = sum(tensor.size for tensor in places if tensor.digest in needed)
            wasted = sum(tensor.size for tensor in places) - size
            if needed and size <= before * (1 - _WASTE) and wasted >= _WORTH_IT:
                new = None if dry_run else repack(catalog, store, pack=pack, needed=needed)
                if new or dry_run:
                    found.append(Tidied(before, new.size if new else None))
    return found


def tidy_behind(catalog: Catalog, store: Store, packs: Iterable[str]) -> None:
    """As `tidy`, of packs that removed versions needed. What it cannot do, the next compaction does.

    In a shared registry it does nothing, as packs would have to be brought and sent.
    """
    if catalog.shared is None:
        with contextlib.suppress(RegistryError):
            tidy(catalog, store, packs)


def packs_of(query: Query, manifest_ids: Iterable[str]) -> set[str]:
    """The packs that some manifests need."""
    return {
        row[0]
        for part in batches(manifest_ids)
        for row in query(
            f"SELECT DISTINCT p.digest FROM uses u JOIN packs p ON p.number = u.pack WHERE u.id IN ({marks(part)})",
            part,
        )
    }


@contextlib.contextmanager
def unless_gone(catalog: Catalog, pack: str) -> Iterator[None]:
    """Suppress the error of the body if another process has removed the pack meanwhile, or versions that need it."""
    users = users_of(catalog.query, pack)
    try:
        yield
    except (NotFound, Corrupt):
        if users_of(catalog.query, pack) == users:
            raise


def users_of(query: Query, pack: str) -> set[str]:
    """Ids of the manifests that rely on a pack."""
    sql = "SELECT u.id FROM uses u JOIN packs p ON p.number = u.pack WHERE p.digest = ?"
    return {row[0] for row in query(sql, [pack])}


def needed_of(query: Query, store: Store, pack: str) -> set[str]:
    """Digests of the tensors in a pack that manifests need, or that differences in other packs rest on."""
    rest_here = (
        "SELECT t.digest FROM packs p JOIN tensors t ON t.pack = p.number "
        "WHERE p.digest = ? AND EXISTS (SELECT 1 FROM tensors d WHERE d.base = t.digest AND d.pack != p.number)"
    )
    bases = {row[0] for row in query(rest_here, [pack])}
    found = {digest for digest, place in locate(query, bases).items() if place.pack == pack}
    for manifest_id in users_of(query, pack):
        try:
            wanted = set(store.tensors_of(manifest_id))
        except NotFound:
            if manifest_id in users_of(query, pack):
                raise
            # It was removed meanwhile.
            continue
        seen: set[str] = set()
        while wanted:
            seen |= wanted
            places = locate(query, wanted)
            found.update(digest for digest, place in places.items() if place.pack == pack)
            wanted = {place.base for place in places.values() if place.base} - seen
    return found


def repack(
    catalog: Catalog,
    store: Store,
    pack: str,
    needed: Collection[str],
    bases: Mapping[str, Sequence[str]] | None = None,
    *,
    alone: Collection[str] = (),
    whole: Collection[str] = (),
    at_most: int | None = None,
) -> PackInfo | None:
    """Write what is needed of a pack to a new one, and let that take its place.

    Args:
        needed: digests of tensors in the pack.
        bases: by digest, the tensors from which one may be stored as a difference.
        alone: those that may be coded by themselves.
        whole: those that are turned back if they are coded.
        at_most: bytes that the new pack may have to be worth it.

    Returns:
        The new pack; None if it is not worth it, or others have changed meanwhile what it rests on.

    Raises:
        Corrupt: if a byte is not what was saved; nothing is changed.
    """
    copied = store.copy_to_new_pack(needed, bases, alone=alone, whole=whole)
    done = False
    try:
        if at_most is None or copied.size <= at_most:
            done = catalog.commit(lambda view: _replacement(view, pack, copied)) is not None
    finally:
        if not done:
            catalog.discard([copied.digest])
    return copied if done else None


def _replacement(view: View, old: str, new: PackInfo) -> list[Record]:
    """The records that put a pack in the place of another; none if it cannot take it."""
    store = view.store
    if not view.query("SELECT 1 FROM packs WHERE digest = ?", [old]):
        return []
    if are_doomed(view, [new.digest]) or not store.pack_is_whole(new.digest, new.size):
        return []
    own = new.places
    if not needed_of(view.query, store, old) <= own.keys():
        return []
    if not can_be_turned_back(view, own, without=old):
        return []
    return [pack_record(new), {"op": "replace", "old": old, "new": new.digest}]
