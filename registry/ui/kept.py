"""What several pages need and takes long to find out, kept as long as no change of the registry concerns it."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from registry.catalog.copies import records_since
from registry.catalog.lookups import batches, marks, pack_size
from registry.registry import Registry
from registry.store import places

T = TypeVar("T")

NAMED = frozenset({"alias", "unalias", "tag", "untag", "note", "run"})
"""Operations that change names, notes and runs alone."""

NOTED = frozenset({"note", "run"})
"""Operations that leave versions and what holds them as they are."""

_ADDED = frozenset({"pack", "publish"})
"""Operations that add versions."""

_MOST = 128
"""Findings of a registry that are kept."""

_MOST_ENTRIES = 200
"""Entries of the log that are read to see what changed. After more of them, all is found out anew."""


class _Place(NamedTuple):
    """How far the log went, and what tells the folder from another one that gets its name."""

    seq: int
    folder: int


class _Change(NamedTuple):
    """What entries of the log did: their operations, and the ids of the versions that they added."""

    operations: frozenset[str]
    added: tuple[str, ...]


@dataclass
class _Known:
    """What is kept of a registry."""

    found: OrderedDict[object, tuple[_Place, Any]] = field(default_factory=OrderedDict)
    change: tuple[_Place, _Place, _Change | None] | None = None


_kept: WeakKeyDictionary[Registry, _Known] = WeakKeyDictionary()
"""The reader's thread alone uses it."""


def last_entry(registry: Registry) -> _Place:
    """The number of the log's last entry, and what tells the folder from another one that gets its name."""
    ((seq,),) = registry.catalog.query("SELECT COALESCE(MAX(seq), 0) FROM log")
    status = places.status_of(registry.root)
    return _Place(int(seq), 0 if status is None else status.st_ino)


def once(
    registry: Registry,
    key: object,
    find_out: Callable[[], T],
    *,
    survives: Collection[str] = (),
    extended: Callable[[T, Sequence[str]], T] | None = None,
) -> T:
    """What a function finds out, unless it was found out under this key and holds still.

    Args:
        survives: the operations of the log that leave it as it is.
        extended: what it becomes by versions that were added, whose ids it is given.
    """
    known, place = _kept.setdefault(registry, _Known()), last_entry(registry)
    value: T
    if key in known.found:
        then, value = known.found[key]
        change = _change(registry, known, then, place) if survives else None
        if then == place or (change and change.operations <= frozenset(survives)):
            known.found[key] = (place, value)
            known.found.move_to_end(key)
            return value
        if change and extended and change.operations <= _ADDED.union(survives):
            value = extended(value, change.added)
        else:
            value = find_out()
    else:
        value = find_out()
    if last_entry(registry) != place:
        # It may know a part of what was changed meanwhile.
        known.found.pop(key, None)
        return value
    known.found[key] = (place, value)
    known.found.move_to_end(key)
    while len(known.found) > _MOST:
        known.found.popitem(last=False)
    return value


def _change(registry: Registry, known: _Known, then: _Place, now: _Place) -> _Change | None:
    """What happened between two places; None if that cannot be told, or it is much."""
    if known.change and known.change[:2] == (then, now):
        return known.change[2]
    found = None
    if then.folder == now.folder and 0 <= now.seq - then.seq <= _MOST_ENTRIES:
        records = records_since(registry.catalog.query, then.seq, now.seq)
        if records is not None:
            added = tuple(record["id"] for record in records if record["op"] == "publish")
            found = _Change(frozenset(record["op"] for record in records), added)
    # A version that lacked tensors may get them by a pack of another one.
    if found and found.added and registry.catalog.query("SELECT 1 FROM lacks LIMIT 1"):
        found = None
    known.change = (then, now, found)
    return found


class Own(NamedTuple):
    """The bytes of the packs that were written for a version."""

    id: str
    model: str
    version: int
    size: int


class Owned:
    """Which version each pack was written for; what several share counts for the oldest."""

    def __init__(self) -> None:
        self._packs: dict[int, Own] = {}
        self.by_version: dict[str, Own] = {}
        self.by_model: dict[str, int] = {}

    def take(self, pack: int, own: Own) -> None:
        """Count a pack for a version, and for no other one."""
        if (before := self._packs.get(pack)) is not None:
            self._add(before, -before.size)
        self._packs[pack] = own
        self._add(own, own.size)

    def _add(self, own: Own, size: int) -> None:
        counted = self.by_version.get(own.id, own._replace(size=0))
        self.by_version[own.id] = counted._replace(size=counted.size + size)
        self.by_model[own.model] = self.by_model.get(own.model, 0) + size


def owned(registry: Registry) -> Owned:
    """Bytes of the packs that were written for each version and model."""

    def taken(found: Owned, where: str, given: Sequence[str] = ()) -> Owned:
        rows = registry.catalog.query(
            "SELECT p.number, p.size, v.id, v.model, v.version, MIN(v.created) FROM packs p "
            f"JOIN uses u ON u.pack = p.number JOIN versions v ON v.id = u.id {where} GROUP BY p.number",
            given,
        )
        for pack, size, version_id, model, version, _ in rows:
            found.take(pack, Own(version_id, model, version, pack_size(size)))
        return found

    def extended(found: Owned, added: Sequence[str]) -> Owned:
        for part in batches(added):
            taken(found, f"WHERE p.number IN (SELECT pack FROM uses WHERE id IN ({marks(part)}))", part)
        return found

    return once(registry, "owned", lambda: taken(Owned(), ""), survives=NAMED, extended=extended)


def points_of(registry: Registry, model: str, metric: str) -> Sequence[tuple[int, float]]:
    """The values of a metric (or `loss`) of a model's versions, by version. What was not a number is left out."""

    def read(also: str = "", given: Sequence[Any] = ()) -> list[tuple[int, float]]:
        if metric == "loss":
            sql, asked = (
                "SELECT v.version, v.loss FROM versions v WHERE v.model = ? AND v.loss IS NOT NULL",
                [model],
            )
        else:
            sql = (
                "SELECT v.version, m.value FROM metrics m JOIN versions v ON v.id = m.id "
                "WHERE m.model = ? AND m.name = ? AND m.value IS NOT NULL"
            )
            asked = [model, metric]
        rows = registry.catalog.query(f"{sql}{also} ORDER BY v.version", [*asked, *given])
        return [(version, value) for version, value in rows if isinstance(value, float)]

    def extended(found: list[tuple[int, float]], added: Sequence[str]) -> list[tuple[int, float]]:
        more = [row for part in batches(added) for row in read(f" AND v.id IN ({marks(part)})", part)]
        found = list(found)
        for row in more:
            bisect.insort(found, row)
        return found

    return once(registry, ("points", model, metric), read, survives=NAMED, extended=extended)


def logical_of(registry: Registry, model: str) -> int:
    """Bytes of the versions of a model as separate files."""

    def read(also: str = "", given: Sequence[Any] = ()) -> int:
        sql = "SELECT COALESCE(SUM(m.size), 0) FROM versions v JOIN manifests m ON m.id = v.id WHERE v.model = ?"
        ((found,),) = registry.catalog.query(f"{sql}{also}", [model, *given])
        return int(found)

    def extended(found: int, added: Sequence[str]) -> int:
        return found + sum(read(f" AND v.id IN ({marks(part)})", part) for part in batches(added))

    return once(registry, ("logical", model), read, survives=NAMED, extended=extended)
