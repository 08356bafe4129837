"""Who holds the bytes of a registry, from the catalog alone.

Bytes are counted by packs, as a pack is what goes or stays. A version relies on the packs that have its tensors, on those
that its differences rest on, and on those of the files that are attached to it. Each pack counts once: as *own bytes* of
the version that was saved first of those that rely on it; as *cached* if only results of cached functions rely on it; as
*unneeded* if nothing does, or only files whose version is gone. So the own bytes of all models, the cached and the unneeded bytes are what the packs take.

What a removal would *free* are the packs on which nothing else relies. A removal may free more, as what is still needed of a
pack is copied to a smaller one where most of it is not. It may be less than the own bytes, as later
versions share them, and for several versions together it may be more than the sum. Manifests and the log are not counted,
and neither are files that gc removes later, as of packs that compaction has replaced.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from registry.catalog.attached import owners_of_files, results
from registry.catalog.lookups import Reader, pack_size
from registry.catalog.versions import UNHELD
from registry.store.errors import Corrupt

_CACHE = ""
"""Stands for the cached functions among the ids of versions that rely on a pack."""


class ModelUsage(NamedTuple):
    """What a model holds; sizes in bytes.

    Attributes:
        versions: how many it has.
        size: what they would take as separate files, of the state alone.
        own: its versions' own bytes.
        freed: what removing all its versions would free.
        unheld: how many of its versions nothing holds; see `registry.catalog.versions.list_versions`.
        unheld_freed: what removing these would free.
    """

    name: str
    versions: int
    size: int
    own: int
    freed: int
    unheld: int
    unheld_freed: int


class VersionUsage(NamedTuple):
    """What a version holds; sizes in bytes.

    Attributes:
        size: what it would take as a separate file, of the state alone.
        own: its own bytes.
        freed: what removing it alone would free.
        held_by: what it is kept for: `alias best`, `tag paper`, `the latest`, `2 versions from it`; empty if nothing
            holds it.
    """

    name: str
    id: str
    size: int
    own: int
    freed: int
    held_by: tuple[str, ...]


class Usage(NamedTuple):
    """Who holds the bytes of a registry; sizes in bytes.

    Attributes:
        stored: what the packs take.
        logical: what the versions and artifacts would take as separate files.
        cached: packs on which only results of cached functions rely.
        unneeded: packs on which nothing relies; `gc` frees them.
        models: those with the most own bytes first.
    """

    stored: int
    logical: int
    cached: int
    unneeded: int
    models: tuple[ModelUsage, ...]

    @property
    def saved(self) -> int:
        """What sharing and differences saved."""
        return max(self.logical - self.stored, 0)

    @property
    def document(self) -> dict[str, Any]:
        """The same in the shape that `--json` prints."""
        return {**self._asdict(), "saved": self.saved, "models": [one._asdict() for one in self.models]}


class _Pack(NamedTuple):
    """A pack's size, and the ids of the versions that rely on it, with `_CACHE` if a cached result does."""

    size: int
    users: frozenset[str]


class _Version(NamedTuple):
    """What the reckoning needs of a version."""

    model: str
    number: int
    created: str
    size: int


def usage(catalog: Reader) -> Usage:
    """Reckon what each model holds."""
    versions, packs = _versions(catalog), _packs(catalog)
    unheld = {
        version_id for (version_id,) in catalog.query(f"SELECT v.id FROM versions v WHERE {UNHELD.sql}")
    }
    own: dict[str, int] = defaultdict(int)
    freed: dict[str, int] = defaultdict(int)
    unheld_freed: dict[str, int] = defaultdict(int)
    for pack in packs:
        if first := _first(pack.users, versions):
            own[versions[first].model] += pack.size
            models = {versions[user].model for user in pack.users if user}
            if len(models) == 1 and _CACHE not in pack.users:
                freed[models.pop()] += pack.size
                if pack.users <= unheld:
                    unheld_freed[versions[first].model] += pack.size
    of_model: dict[str, list[str]] = defaultdict(list)
    for version_id, version in versions.items():
        of_model[version.model].append(version_id)
    found = [
        ModelUsage(
            name=model,
            versions=len(ids),
            size=sum(versions[version_id].size for version_id in ids),
            own=own[model],
            freed=freed[model],
            unheld=sum(version_id in unheld for version_id in ids),
            unheld_freed=unheld_freed[model],
        )
        for model, ids in of_model.items()
    ]
    ((logical,),) = catalog.query("SELECT COALESCE(SUM(size), 0) FROM manifests")
    return Usage(
        stored=sum(pack.size for pack in packs),
        logical=logical,
        cached=sum(pack.size for pack in packs if pack.users == {_CACHE}),
        unneeded=sum(pack.size for pack in packs if not pack.users),
        models=tuple(sorted(found, key=lambda one: (-one.own, one.name))),
    )


def usage_of(catalog: Reader, model: str) -> list[VersionUsage]:
    """Reckon what each version of a model holds: those with the most own bytes first, and else the newest."""
    versions, packs = _versions(catalog), _packs(catalog)
    own: dict[str, int] = defaultdict(int)
    freed: dict[str, int] = defaultdict(int)
    for pack in packs:
        if first := _first(pack.users, versions):
            own[first] += pack.size
            if len(pack.users) == 1:
                freed[first] += pack.size
    holders = _holders(catalog, model)
    latest = max((one.number for one in versions.values() if one.model == model), default=0)
    found = [
        (
            -own[version_id],
            -one.number,
            VersionUsage(
                name=f"{model}:v{one.number}",
                id=version_id,
                size=one.size,
                own=own[version_id],
                freed=freed[version_id],
                held_by=(*(["the latest"] if one.number == latest else []), *holders[version_id]),
            ),
        )
        for version_id, one in versions.items()
        if one.model == model
    ]
    return [one for _, _, one in sorted(found)]


def freed_by(catalog: Reader, artifact_ids: Collection[str]) -> int:
    """Bytes of the packs on which nothing but some artifacts relies: what removing them would free."""
    users: dict[int, set[str]] = defaultdict(set)
    for pack, manifest_id in catalog.query("SELECT pack, id FROM uses"):
        users[pack].add(manifest_id)
    wanted = set(artifact_ids)
    sizes = catalog.query("SELECT number, size FROM packs")
    return sum(pack_size(size) for number, size in sizes if users[number] and users[number] <= wanted)


def _versions(catalog: Reader) -> dict[str, _Version]:
    """All versions by id."""
    rows = catalog.query(
        "SELECT v.id, v.model, v.version, v.created, m.size FROM versions v JOIN manifests m ON m.id = v.id"
    )
    types = (str, str, int, str, int)
    if not all(all(map(isinstance, row, types)) for row in rows):
        raise Corrupt("the catalog holds a damaged row of a version", "recreate it with: registry rebuild")
    return {version_id: _Version(*rest) for version_id, *rest in rows}


def _packs(catalog: Reader) -> list[_Pack]:
    """All packs, with what relies on them."""
    versions = {version_id for (version_id,) in catalog.query("SELECT id FROM versions")}
    owners: dict[str, set[str]] = {version_id: {version_id} for version_id in versions}
    for artifact_id, ids in owners_of_files(catalog).items():
        owners.setdefault(artifact_id, set()).update(ids)
    for artifact_id in results(catalog):
        owners.setdefault(artifact_id, set()).add(_CACHE)
    users: dict[int, set[str]] = defaultdict(set)
    for pack, manifest_id in catalog.query("SELECT pack, id FROM uses"):
        users[pack] |= owners.get(manifest_id, set())
    return [
        _Pack(pack_size(size), frozenset(users[number]))
        for number, size in catalog.query("SELECT number, size FROM packs")
    ]


def _first(users: Iterable[str], versions: Mapping[str, _Version]) -> str | None:
    """The version that was saved first of those that rely on a pack."""
    return min(
        (user for user in users if user in versions),
        key=lambda user: (versions[user].created, versions[user].model, versions[user].number),
        default=None,
    )


def _holders(catalog: Reader, model: str) -> dict[str, list[str]]:
    """What holds each version of a model, but for being the latest."""
    found: dict[str, list[str]] = defaultdict(list)
    of_model = "(SELECT id FROM versions WHERE model = ?)"
    for version_id, name in catalog.query(
        "SELECT id, name FROM aliases WHERE model = ? ORDER BY name", [model]
    ):
        found[version_id].append(f"alias {name}")
    for version_id, name in catalog.query(
        f"SELECT id, name FROM tags WHERE id IN {of_model} ORDER BY name", [model]
    ):
        found[version_id].append(f"tag {name}")
    for version_id, count in catalog.query(
        f"SELECT parent, COUNT(DISTINCT child) FROM lineage WHERE parent IN {of_model} GROUP BY parent",
        [model],
    ):
        found[version_id].append(f"{count:,} version{'s' if count > 1 else ''} from it")
    return found


_PARTS = {"packs": "tensors", "runs": "runs", "journal": "log", "manifests": "manifests"}
"""What the folders of a registry hold."""


def on_disk(root: Path) -> dict[str, int]:
    """Bytes of the files in a registry's folder: of tensors, of runs (logs, events, scalars), and of the rest."""
    found = {"tensors": 0, "runs": 0, "log": 0, "manifests": 0, "catalog and rest": 0}
    for entry in _entries(root):
        found[_PARTS.get(entry.name, "catalog and rest")] += _bytes_of(entry)
    return found


def _bytes_of(entry: os.DirEntry[str]) -> int:
    """Bytes of a file, or of all files below a folder; links are not followed, and what goes away meanwhile counts 0."""
    try:
        if entry.is_dir(follow_symlinks=False):
            return sum(map(_bytes_of, _entries(entry.path)))
        return entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else 0
    except OSError:
        return 0


def _entries(path: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError:
        return []
