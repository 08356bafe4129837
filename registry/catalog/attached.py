"""Attached files: artifacts that belong to a version, such as an ONNX file that was made from it.

An artifact's record says under `attached` which version it belongs to, by the id that the version was saved with. A thinned
version names that id in its record, and one that `rebuild --adopt` takes in under another number still has it. When the
version is gone, garbage collection drops the artifact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from registry.catalog.lookups import Reader, parsed
from registry.log.entries import Record, now
from registry.store.digest import digest
from registry.store.errors import Conflict, fix
from registry.store.text import quoted

if TYPE_CHECKING:
    from registry.catalog.catalog import Catalog
    from registry.catalog.versions import Version

MARK = "attached"
"""The key of an artifact's record that names the version's first id."""


class Attached(NamedTuple):
    """A file that is attached to a version.

    Attributes:
        version: the name of the version, such as `lenet5:v3`.
        name: of the file.
        size: in bytes.
        at: when it was attached, in UTC, ISO 8601.
        key: of the artifact.
        id: digest of the artifact's manifest.
        to: the id that the version was saved with.
    """

    version: str
    name: str
    size: int
    at: str
    key: str
    id: str
    to: str


class Attachment(NamedTuple):
    """A file that is about to be attached: its name, its size in bytes, and the id of the artifact's manifest."""

    name: str
    size: int
    id: str


def attached(reader: Reader, version: Version) -> list[Attached]:
    """The files that are attached to a version, by name."""
    first = _first_id(version.id, version.record)
    found = [
        Attached(version=version.name, name=name, size=size, at=at, key=key, id=artifact_id, to=to)
        for to, name, size, at, key, artifact_id in _all(reader)
        if to == first
    ]
    return sorted(found, key=lambda one: one.name)


def attachment(view: Reader, version: Version, file: Attachment, *, force: bool) -> Record:
    """The record that attaches a file to a version.

    Args:
        force: take the place of a file of this name.

    Raises:
        Conflict: if another file of this name is attached and `force` is false.
    """
    first = _first_id(version.id, version.record)
    key = digest(f"{MARK}\0{first}\0{file.name}".encode())
    rows = view.query("SELECT id FROM artifacts WHERE key = ?", [key])
    was = rows[0][0] if rows else None
    if was not in (None, file.id) and not force:
        raise Conflict(
            f"{version.name} has another file {quoted(file.name)} already",
            "rename yours",
            fix("or replace it", force=True),
        )
    record = {MARK: first, "name": file.name, "size": file.size}
    return {"op": "artifact", "key": key, "id": file.id, "at": now(), "record": record, "was": was}


def attached_again(file: Attached, view: Reader, text: Mapping[str, str]) -> list[Record]:
    """The record that attaches a file of another registry to the same version in this one, unless one has its name.

    Args:
        text: the field that carries the text of the artifact's manifest.
    """
    rows = view.query("SELECT id FROM artifacts WHERE key = ?", [file.key])
    about = {MARK: file.to, "name": file.name, "size": file.size}
    record = {"op": "artifact", "key": file.key, "id": file.id, "at": file.at, "record": about, "was": None}
    return [] if rows else [{**record, **text}]


def owners_of_files(reader: Reader) -> dict[str, set[str]]:
    """The ids of the versions that the artifact of an attached file belongs to, by the artifact's id.

    Equal files are one artifact. It belongs to none if the version is gone; garbage collection drops it then.
    """
    found = _all(reader)
    if not found:
        return {}
    ids: dict[str, set[str]] = {}
    for version_id, record in reader.query("SELECT id, record FROM versions"):
        ids.setdefault(_first_id(version_id, parsed(record)), set()).add(version_id)
    owners: dict[str, set[str]] = {}
    for to, _, _, _, _, artifact_id in found:
        owners.setdefault(artifact_id, set()).update(ids.get(to, ()))
    return owners


def results(reader: Reader) -> set[str]:
    """The ids of the artifacts that are results of cached functions, and no attached files."""
    rows = reader.query("SELECT DISTINCT id FROM artifacts WHERE record NOT LIKE ?", [f'%"{MARK}":%'])
    return {artifact_id for (artifact_id,) in rows}


def drop_orphans(catalog: Catalog) -> None:
    """Drop the artifacts of versions that are gone."""

    def compute(view: Reader) -> list[Record]:
        found = _all(view)
        rows = view.query("SELECT id, created, record FROM versions") if found else []
        is_readable = all(created for _, created, _ in rows)
        if not is_readable or adoptable - {version_id for version_id, _, _ in rows}:
            # A version that cannot be read, or that is yet to be taken in, may be a thinned one with any of the files.
            return []
        there = {_first_id(version_id, parsed(record)) for version_id, _, record in rows}
        return [
            {"op": "drop-artifact", "key": key, "was": artifact_id}
            for to, _, _, _, key, artifact_id in found
            if to not in there
        ]

    adoptable = catalog.ledger().ids_of_voids()
    if compute(catalog):
        catalog.commit(compute)


def _first_id(version_id: str, record: Mapping[str, Any]) -> str:
    """The id that a version was saved with."""
    return str(record.get("thinned-from") or version_id)


def _all(reader: Reader) -> list[tuple[str, str, int, str, str, str]]:
    """Of each attached file: the version's first id, name, size, time, the artifact's key and its id."""
    rows = reader.query(
        "SELECT key, id, created, record FROM artifacts WHERE record LIKE ?", [f'%"{MARK}":%']
    )
    found = []
    for key, artifact_id, at, text in rows:
        record = parsed(text)
        to, name, size = (record.get(field) for field in (MARK, "name", "size"))
        if isinstance(to, str) and isinstance(name, str) and type(size) is int:
            found.append((to, name, size, at, key, artifact_id))
    return found
