"""Attached files: artifacts that belong to a version, such as an ONNX file that was made from it.

An artifact's record says under `attached` which version it belongs to, by its name, which no other version ever gets.
When the version is gone, garbage collection drops the artifact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from registry.catalog.lookups import Reader, parsed
from registry.catalog.resolving import resolve
from registry.log.entries import Record, now
from registry.store.digest import digest
from registry.store.errors import Conflict, NotFound, RegistryError, fix
from registry.store.text import quoted

if TYPE_CHECKING:
    from registry.catalog.catalog import Catalog

MARK = "attached"
"""The key of an artifact's record that names the version."""


class Attached(NamedTuple):
    """A file that is attached to a version.

    Attributes:
        version: the name of the version, such as `lenet5:v3`.
        name: of the file.
        size: in bytes.
        at: when it was attached, in UTC, ISO 8601.
        key: of the artifact.
        id: digest of the artifact's manifest.
    """

    version: str
    name: str
    size: int
    at: str
    key: str
    id: str


def attached(reader: Reader, version: str | None = None) -> list[Attached]:
    """The files that are attached to a version, or to any, by name."""
    rows = reader.query(
        "SELECT key, id, created, record FROM artifacts WHERE record LIKE ?", [f'%"{MARK}":%']
    )
    found = []
    for key, artifact_id, at, text in rows:
        record = parsed(text)
        to, name, size = (record.get(field) for field in (MARK, "name", "size"))
        if isinstance(to, str) and isinstance(name, str) and type(size) is int and version in (None, to):
            found.append(Attached(version=to, name=name, size=size, at=at, key=key, id=artifact_id))
    return sorted(found, key=lambda one: (one.version, one.name))


def attachment(
    view: Reader, reference: str, artifact_id: str, *, name: str, size: int, force: bool
) -> Record:
    """The record that attaches an artifact's manifest to the version that a reference names.

    Args:
        name, size: of the file.
        force: take the place of a file of this name.

    Raises:
        Conflict: if another file of this name is attached and `force` is false.
        NotFound: if there is no such version.
    """
    version = resolve(view, reference).name
    key = digest(f"{MARK}\0{version}\0{name}".encode())
    rows = view.query("SELECT id FROM artifacts WHERE key = ?", [key])
    was = rows[0][0] if rows else None
    if was not in (None, artifact_id) and not force:
        raise Conflict(
            f"{version} has another file {quoted(name)} already; rename yours",
            fix("or replace it", force=True),
        )
    record = {MARK: version, "name": name, "size": size}
    return {"op": "artifact", "key": key, "id": artifact_id, "at": now(), "record": record, "was": was}


def drop_orphans(catalog: Catalog) -> None:
    """Drop the artifacts of versions that are gone."""

    def compute(view: Reader) -> list[Record]:
        return [
            {"op": "drop-artifact", "key": one.key, "was": one.id}
            for one in attached(view)
            if not _is_there(view, one.version)
        ]

    if compute(catalog):
        catalog.commit(compute)


def _is_there(view: Reader, version: str) -> bool:
    try:
        resolve(view, version)
    except NotFound:
        return False
    except RegistryError:
        # The name is malformed, so that it names no version.
        return False
    return True
