"""Copying versions from one registry to another, by id: only the tensors that the other one lacks, checked on the way."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from registry.catalog.attached import attached, attached_again
from registry.catalog.commit import publish, publish_version
from registry.catalog.lookups import was_removed
from registry.catalog.resolving import resolve
from registry.catalog.versions import COPIED, by_id, find_versions
from registry.log.entries import now
from registry.store.errors import Conflict, NotFound
from registry.store.store import Written

if TYPE_CHECKING:
    from registry.catalog.transactions import View
    from registry.catalog.versions import Version
    from registry.home import Home
    from registry.log.entries import Record

_ATTEMPTS = 3


class Removed(NotFound):
    """A version that must not come back by being copied. Never reaches users."""


class Copied(NamedTuple):
    """A version in both registries.

    Attributes:
        id: the same in both.
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
    for version in versions:
        progress(done, total)
        found.append(
            _copy(source, target, version, functools.partial(_copied_version, version, source.place))
        )
        done += version.size
    return found


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
    pack = source.store.copy_to_new_pack(lacking, into=target.store) if lacking else None
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
