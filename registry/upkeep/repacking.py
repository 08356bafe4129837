"""Repacking: what is needed of a pack is written to a new one, which takes its place in one commit."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from registry.catalog.lookups import are_doomed, batches, locate, marks
from registry.log.entries import Record, pack_record
from registry.store.errors import Corrupt, NotFound

if TYPE_CHECKING:
    from registry.catalog.catalog import Catalog
    from registry.catalog.lookups import Query
    from registry.catalog.transactions import View
    from registry.store.locating import Location
    from registry.store.pack import PackInfo
    from registry.store.store import Store

_WASTE = 0.5
"""Once nothing needs this share of a pack's bytes, the rest is copied to a new pack."""

_MAX_USERS = 20
"""Manifests to read at most to know what of a pack is needed."""


def tidy(catalog: Catalog, store: Store, packs: Iterable[str]) -> None:
    """Repack those of some packs of which half or more is not needed any more."""
    for pack in packs:
        rows = catalog.query("SELECT size FROM packs WHERE digest = ?", [pack])
        if not rows or len(users_of(catalog.query, pack)) > _MAX_USERS:
            continue
        with unless_gone(catalog, pack):
            needed = needed_of(catalog.query, store, pack)
            places = store.pack_info(pack).tensors
            size = sum(tensor.size for tensor in places if tensor.digest in needed)
            if needed and size <= rows[0][0] * (1 - _WASTE):
                repack(catalog, store, pack=pack, needed=needed)


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
        wanted = set(store.tensors_of(manifest_id))
        while wanted:
            places = locate(query, wanted)
            found.update(digest for digest, place in places.items() if place.pack == pack)
            wanted = {place.base for place in places.values() if place.base}
    return found


def repack(
    catalog: Catalog,
    store: Store,
    pack: str,
    needed: Collection[str],
    bases: Mapping[str, str] | None = None,
    *,
    at_most: int | None = None,
) -> PackInfo | None:
    """Write what is needed of a pack to a new one, and let that take its place.

    Args:
        needed: digests of tensors in the pack.
        bases: by digest, the tensor from which one may be stored as a difference.
        at_most: bytes that the new pack may have to be worth it.

    Returns:
        The new pack; None if it is not worth it, or others have changed meanwhile what it rests on.

    Raises:
        Corrupt: if a byte is not what was saved; nothing is changed.
    """
    copied = store.copy_to_new_pack(needed, bases)
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
    if not _rest_on_plain(view, old, own):
        return []
    return [pack_record(new), {"op": "replace", "old": old, "new": new.digest}]


def _rest_on_plain(view: View, old: str, own: Mapping[str, Location]) -> bool:
    """Whether the differences of a new pack rest on plain tensors of packs that stay, and nothing rests on them."""
    differences = {digest: place.base for digest, place in own.items() if place.base}
    elsewhere = {base for base in differences.values() if base not in own}
    places = view.locate(elsewhere)
    if len(places) < len(elsewhere) or any(own[base].base for base in differences.values() if base in own):
        return False
    if any(place.base or place.pack == old for place in places.values()):
        return False
    sizes = {place.pack: place.pack_size for place in places.values()}
    if not all(view.store.pack_is_whole(pack, size) for pack, size in sizes.items()):
        return False
    anew = [digest for digest, place in view.locate(differences).items() if place.base is None]
    return not any(
        view.query(f"SELECT 1 FROM tensors WHERE base IN ({marks(part)}) LIMIT 1", part)
        for part in batches(anew)
    )
