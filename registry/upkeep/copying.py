"""Copying versions from one registry to another, by id: only the tensors that the other one lacks, checked on the way."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from registry.catalog.attached import attached, attached_again
from registry.catalog.commit import publish, publish_version
from registry.catalog.lookups import DEEPEST, batches, marks, was_removed
from registry.catalog.resolving import resolve
from registry.catalog.versions import COPIED, by_id, find_versions
from registry.log.entries import now
from registry.store.errors import Conflict, NotFound, RegistryError
from registry.store.store import Written

if TYPE_CHECKING:
    from registry.catalog.transactions import View
    from registry.catalog.versions import Version
    from registry.home import Home
    from registry.log.entries import Record
    from registry.store.pack import PackInfo

_ATTEMPTS = 3

_logger = logging.getLogger(__name__)


class Removed(NotFound):
    """A version that must not come back by being copied. Never reaches users."""


class Copied(NamedTuple):
    """A version in both registries.

    Attributes:
        id: the same in both, unless the other registry has the version as it was before it was thinned, or thinned.
        source, target: its name in each, such as `lenet5:v3` and `lenet5:v17`.
        size: bytes that the other registry lacked.
        is_new: whether the other registry did not have it.
    """

    id: str
    source: str
    target: str
    size: int
    is_new: bool


def copy_versions(
    source: Home,
    target: Home,
    references: Sequence[str] = (),
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Copied]:
    """Copy versions, with their tags, notes and attached files, from one registry to another.

    An interrupted copy is repeated: what is there already is not copied again. The other registry gives each version the
    next number of its model. Aliases stay where they are.

    Args:
        references: the versions; all of them unless given. They are copied in the order in which they were saved.
        progress: told the bytes of the versions that are done, and of all.

    Returns:
        Each version, under its name in both registries.

    Raises:
        NotFound: if there is no such version.
        Corrupt: if a byte is not what was saved; nothing more is copied.
        StorageError: if the system, or a store, refuses.
    """
    chosen = [resolve(source.catalog, reference) for reference in references]
    chosen = chosen or find_versions(source.catalog, "1", order="v.created, v.model, v.version")
    versions = sorted(
        {version.id: version for version in chosen}.values(), key=lambda one: (one.created, one.version)
    )
    found: list[Copied] = []
    done, total = 0, sum(version.size for version in versions)
    thinned = _thinned(target)
    for version in versions:
        progress(done, total)
        copied = _copy_if_there(source, target, version, thinned)
        if copied is not None:
            found.append(copied)
        done += version.size
    return found


def _thinned(home: Home) -> dict[str, str]:
    """The ids of the versions that were thinned, by the ids that they had before."""
    rows = home.catalog.query(
        "SELECT json_extract(record, '$.\"thinned-from\"'), id FROM versions WHERE record LIKE '%\"thinned-from\"%'"
    )
    return {str(before): str(now) for before, now in rows if before}


def _copy_if_there(source: Home, target: Home, version: Version, thinned: Mapping[str, str]) -> Copied | None:
    """Copy a version, unless the other registry has it with more or less of its states; None if it is gone meanwhile.

    Args:
        thinned: see `_thinned`, of the other registry.
    """
    for other in (thinned.get(version.id), version.record.get("thinned-from")):
        there = by_id(target.catalog, other) if isinstance(other, str) else None
        if there is not None:
            return Copied(version.id, version.name, there.name, size=0, is_new=False)
    try:
        return _copy(source, target, version, functools.partial(_copied_version, version, source.place))
    except RegistryError:
        if by_id(source.catalog, version.id) is not None:
            raise
    # Another process has removed it meanwhile, or thinned it, which gives it another id.
    number = [version.model, version.version]
    for now_there in find_versions(source.catalog, "v.model = ? AND v.version = ?", number):
        return _copy_if_there(source, target, now_there, thinned)
    _logger.warning("%s was removed from %s before it was copied", version.name, source.place)
    return None


def copy_pending(
    source: Home, target: Home, version: Version, more: Callable[[View], list[Record]]
) -> Copied:
    """Copy a version that was meant for the other registry, and whose run knows it there; see `registry.upkeep.outbox`.

    Args:
        more: what else is recorded with it.

    Raises:
        Removed: if it was copied before, and removed there since.
        Conflict, Corrupt, StorageError: as `copy_versions`.
    """

    def known(view: View, text: Mapping[str, str]) -> list[Record]:
        if was_removed(view.query, version.id):
            raise Removed(f"{version.name} was copied to {target.place}, and removed there since")
        return [*_version(view, version, text), *more(view)]

    return _copy(source, target, version, known)


def _copy(
    source: Home,
    target: Home,
    version: Version,
    known: Callable[[View, Mapping[str, str]], list[Record]],
) -> Copied:
    """Copy a version with its attached files.

    Args:
        known: returns the records of the version, from the view and the field that carries its text.
    """
    there, size = by_id(target.catalog, version.id), 0
    is_new = there is None

    for _ in range(_ATTEMPTS if is_new else 0):
        # Somebody else may copy it, or remove what it relies on, at this moment.
        with contextlib.suppress(Conflict):
            size = _publish(source, target, version.id, known)
        there = by_id(target.catalog, version.id)
        if there is not None:
            break
    if there is None:
        raise Conflict(f"{version.name}: other processes kept changing {target.place} meanwhile", "repeat")
    kept = {file.key for file in attached(target.catalog, there)}
    for file in attached(source.catalog, version):
        if file.key not in kept:
            size += _publish(source, target, file.id, functools.partial(attached_again, file))
    return Copied(version.id, version.name, there.name, size=size, is_new=is_new)


def _publish(
    source: Home, target: Home, manifest_id: str, records: Callable[[View, Mapping[str, str]], list[Record]]
) -> int:
    """Make a manifest known in the other registry, and return the bytes that it lacked.

    Args:
        records: returns what makes it known, from the view and the field that carries its text.
    """
    manifest = source.store.manifest(manifest_id)
    digests = {tensor.digest for tensor in manifest.tensors}
    needed = source.store.with_bases(digests - target.store.intact(digests))
    lacking = needed - target.store.intact(needed)
    pack = _copied_pack(source, target, lacking) if lacking else None
    publish(
        target.catalog,
        target.store,
        Written(manifest.components, manifest.tensors, [pack] if pack else []),
        dict(manifest.record),
        lambda view, _, text: records(view, text),
        what=manifest_id[:12],
        keeps_id=True,
    )
    return pack.size if pack else 0


def _copied_pack(source: Home, target: Home, lacking: Collection[str]) -> PackInfo:
    """Copy tensors to a pack of the other registry, of which all bases are there."""
    pack = source.store.copy_to_new_pack(lacking, into=target.store, whole=_too_deep(source, target, lacking))
    bases = {tensor.base for tensor in pack.tensors if tensor.base} - pack.places.keys()
    if bases - target.store.intact(bases):
        # Another process has stored some as other differences meanwhile.
        target.store.discard_pack(pack.digest)
        pack = source.store.copy_to_new_pack(lacking, into=target.store, whole=lacking)
    return pack


def _too_deep(source: Home, target: Home, lacking: Collection[str]) -> set[str]:
    """The tensors whose differences would lie too deep in the other registry, or let others lie deeper.

    These are tensors on which others rest there, although it lacks them whole.
    """
    places = dict(source.catalog.locate(lacking))
    wanted = {place.base for place in places.values() if place.base} - places.keys()
    while wanted:
        found = target.catalog.locate(wanted)
        places |= found
        wanted = {place.base for place in found.values() if place.base} - places.keys()
    depths: dict[str, int] = {}
    whole = {
        digest
        for part in batches(lacking)
        for (digest,) in target.catalog.query(
            f"SELECT DISTINCT base FROM tensors WHERE base IN ({marks(part)})", part
        )
    }

    def depth(digest: str, above: int = 0) -> int:
        base = places[digest].base if digest in places else None
        # No healthy registry has a circle.
        if base is None or digest in whole or above > 4 * DEEPEST:
            return 0
        if digest not in depths:
            depths[digest] = depth(base, above + 1) + 1
            if depths[digest] > DEEPEST and digest in lacking:
                whole.add(digest)
                depths[digest] = 0
        return depths[digest]

    for digest in lacking:
        depth(digest)
    return whole


def _version(view: View, version: Version, text: Mapping[str, str]) -> list[Record]:
    """The records of a version with its tags and notes."""
    return [
        publish_version(view, version.model, version.id, text),
        *({"op": "tag", "id": version.id, "tag": tag} for tag in version.tags),
        *({"op": "note", "id": version.id, "at": at, "text": note} for at, note in version.notes),
    ]


def _copied_version(version: Version, place: str, view: View, text: Mapping[str, str]) -> list[Record]:
    """The same, and where it came from."""
    origin = f"{COPIED}{version.name} of {place}"
    return [*_version(view, version, text), {"op": "note", "id": version.id, "at": now(), "text": origin}]
