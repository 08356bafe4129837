"""Publishing: store trees, and make them known in one commit.

If other processes remove meanwhile what the trees rely on, both steps are repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from registry.catalog.lookups import are_doomed, can_be_turned_back
from registry.log.entries import MAX_TEXT, Record, manifest_text, now, pack_record
from registry.progress import Progress, silent
from registry.store.digest import salt
from registry.store.errors import Conflict, Corrupt, Missing, RegistryError, Unsupported
from registry.store.pausing import collector_paused
from registry.store.store import Written

if TYPE_CHECKING:
    from registry.catalog.catalog import Catalog
    from registry.catalog.transactions import View
    from registry.log.sharing import Shared
    from registry.store.locating import Location
    from registry.store.saving import Encoded
    from registry.store.store import Store, Stored

_ATTEMPTS = 6


class Stale(RegistryError):
    """Something that a save relied on has changed meanwhile; the save looks again. Never reaches users."""


class Taken(Stale):
    """Another version has the id already: equal values, saved at the same instant. Never reaches users."""


class Doomed(Stale):
    """The manifest's id was doomed, and its text is too large for the log. Never reaches users."""


def publish(
    catalog: Catalog,
    store: Store,
    state: Encoded | Written,
    record: dict[str, Any],
    records: Callable[[View, str, Mapping[str, str]], Sequence[Record]],
    *,
    what: str,
    keeps_id: bool = False,
    progress: Progress = silent,
) -> tuple[str, Sequence[Record]]:
    """Store trees and make them known.

    Args:
        record: what the manifest carries along. If the manifest's id is taken, the record gets a new time, or a salt.
        keeps_id: it gets neither, as it is a copy. If its id is taken, that is a conflict.
        records: returns the records that make the manifest known, from the view inside the commit, its id, and the
            field that carries its text.
        what: what to call it in an error.

    Returns:
        The manifest's digest, and the records of the entry.

    Raises:
        StorageError: if the disk is full or refuses; nothing is made known.
        Corrupt: if the log is damaged; nothing is written.
        Conflict: if others change the registry again and again.
    """
    # What several processes have written is stored already, and an upload may take minutes.
    sizes = (
        []
        if isinstance(state, Written) or catalog.shared is not None
        else [leaf.size for leaf in state.leaves]
    )
    with collector_paused(sizes):
        (manifest_id,), made = publish_all(
            catalog,
            store,
            [state],
            record=record,
            records=lambda view, stored: records(view, *stored[0]),
            what=what,
            keeps_id=keeps_id,
            progress=progress,
        )
    return manifest_id, made


def publish_all(
    catalog: Catalog,
    store: Store,
    states: Sequence[Encoded | Written],
    record: dict[str, Any],
    records: Callable[[View, Sequence[tuple[str, Mapping[str, str]]]], Sequence[Record]],
    *,
    what: str,
    keeps_id: bool = False,
    progress: Progress = silent,
) -> tuple[Sequence[str], Sequence[Record]]:
    """Store trees as several manifests, and make them known in one commit; see `publish`.

    Args:
        states: of which no two have a tensor in common.
        records: gets id and text of every manifest, in the order of the states.

    Returns:
        The manifests' digests, and the records of the entry.
    """
    catalog.check_unbroken()
    # Packs that other processes wrote cannot be written again here.
    is_repeatable = not any(isinstance(state, Written) for state in states)
    # What another host has stored meanwhile does no harm, and to upload anew costs more than to have it twice.
    strict_attempts = 0 if catalog.shared else _ATTEMPTS // 2

    def put() -> list[Stored]:
        return [store.put(state, record, progress=progress) for state in states]

    for attempt in range(_ATTEMPTS):
        # The last attempt stores inside the commit, while nobody else can change anything.
        alone = attempt == _ATTEMPTS - 1
        stored: list[Stored] = [] if alone else put()

        def compute(view: View) -> list[Record]:
            nonlocal stored
            stored = stored or put()
            packs: list[Record] = []
            for one in stored:
                found = _packs(view, one, strict=is_repeatable and attempt < strict_attempts)  # noqa: B023
                packs += [record for record in found if record not in packs]
            texts = [manifest_text(one.text) for one in stored]
            check_size(texts if catalog.shared else (), what)
            for one, text in zip(stored, texts, strict=True):
                if not text and view.query("SELECT 1 FROM doomed WHERE digest = ?", [one.digest]):
                    raise Doomed(f"{one.digest[:12]} was doomed")
            ids = [one.digest for one in stored]
            return [*packs, *records(view, list(zip(ids, texts, strict=True)))]

        try:
            if catalog.shared:
                _upload(catalog.shared, stored)
            entry = catalog.commit(compute)
            for one in stored:
                # Garbage collection took the file before the commit. Reading the manifest writes it again, from the log.
                if not store.has(one.digest):
                    store.manifest(one.digest)
            return [one.digest for one in stored], entry.records if entry else ()
        except Stale as error:
            stays = isinstance(error, Taken) and not is_repeatable and not keeps_id
            if stored and not stays:
                catalog.discard([pack.digest for one in stored for pack in one.packs])
            if not (is_repeatable or stays):
                break
            _renew(record, error)
    raise Conflict(f"{what}: other processes kept changing the registry during the save", "repeat it")


def _renew(record: dict[str, Any], error: Stale) -> None:
    """Let a manifest have another id, where what is recorded of it holds a time, or where that is needed."""
    if "created" in record:
        record["created"] = now()
    elif isinstance(error, Doomed):
        # Without a time in the record, the id follows from the content alone.
        record["salt"] = salt()


def check_size(texts: Sequence[Mapping[str, str]], what: str) -> None:
    """Refuse a manifest whose text an entry does not carry: a shared registry has no other place for it.

    Raises:
        Unsupported: if there is one, of which the field for the text is empty.
    """
    if not all(texts):
        raise Unsupported(
            f"{what}: its plain values take more than the {MAX_TEXT >> 20} MB that an entry of a shared registry holds",
            "put long lists into tensors or arrays",
        )


def _upload(shared: Shared, stored: Sequence[Stored]) -> None:
    """Bring the packs of a save to where all hosts find them.

    Raises:
        Stale: if garbage collection took one of them before.
    """
    try:
        shared.upload([pack.digest for one in stored for pack in one.packs])
    except Missing as error:
        raise Stale(str(error)) from error


def publish_version(view: View, model: str, manifest_id: str, text: Mapping[str, str]) -> Record:
    """The record that makes a manifest the next version of a model.

    Raises:
        Taken: if it is a version already.
    """
    if view.query("SELECT 1 FROM versions WHERE id = ?", [manifest_id]):
        raise Taken(f"{manifest_id[:12]} is a version already")
    version = view.next_version(model)
    return {"op": "publish", "id": manifest_id, "model": model, "version": version, **text}


def _packs(view: View, stored: Stored, *, strict: bool) -> list[Record]:
    """The records of the packs that a save wrote, once all that it relies on is there.

    Args:
        strict: also require that no other process has stored tensors of the new packs meanwhile, and that no pack that
            the save relies on is damaged.

    Raises:
        Stale: if something is not there any more.
    """
    store = view.store
    if are_doomed(view, [pack.digest for pack in stored.packs]):
        raise Stale("packs of this save were collected meanwhile")
    needed = {tensor.digest for tensor in stored.manifest.tensors}
    own: dict[str, Location] = {}
    for pack in stored.packs:
        own |= pack.places
    # What the differences in the new packs rest on; only packs that were copied have some.
    needed |= {place.base for place in own.values() if place.base}
    found = view.locate(needed | set(own))
    elsewhere = {place.pack: place for digest, place in found.items() if digest in own}
    known = {pack for pack, place in elsewhere.items() if place.is_damaged}
    broken = {
        pack
        for pack, place in elsewhere.items()
        if pack in store.distrusted or not store.pack_is_whole(pack, place.pack_size)
    }
    if strict and elsewhere.keys() - known - broken:
        raise Stale("tensors of this save were stored meanwhile")
    if (needed - set(found) - set(own)) or not (store.has(stored.digest) or manifest_text(stored.text)):
        raise Stale("tensors or the manifest of this save were removed meanwhile")
    if any(place.base for place in own.values()) and not can_be_turned_back(view, own):
        raise Stale("differences of this save would lie too deep, or in a circle")
    relied_on = _with_bases(view, {digest: found[digest] for digest in needed - set(own)})
    if strict and any(place.is_damaged for place in relied_on.values()):
        raise Stale("a pack that this save relied on was found damaged meanwhile")
    sizes = {place.pack: place.pack_size for place in relied_on.values()}
    sizes |= {pack.digest: pack.size for pack in stored.packs}
    if any(not store.pack_is_whole(pack, size) for pack, size in sizes.items()):
        raise Stale("a pack that this save relied on was removed meanwhile")
    for name in {place.pack for place in relied_on.values()}:
        try:
            store.pack_info(name)
        except Corrupt as error:
            # What the save needs of it is written again.
            store.distrusted.add(name)
            raise Stale(str(error)) from error
    return [
        *({"op": "damaged", "pack": pack} for pack in sorted(broken - known)),
        *(pack_record(pack) for pack in stored.packs),
    ]


def _with_bases(view: View, places: Mapping[str, Location]) -> dict[str, Location]:
    """Places of tensors, and those of the tensors that they are stored as differences from.

    Raises:
        Stale: if one is not there.
    """
    found = dict(places)
    wanted = {place.base for place in places.values() if place.base} - set(found)
    while wanted:
        new = view.locate(wanted)
        if len(new) < len(wanted):
            raise Stale("a tensor that others are differences from was removed meanwhile")
        found |= new
        wanted = {place.base for place in new.values() if place.base} - set(found)
    return found
