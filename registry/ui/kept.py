"""What several pages need and takes long to find out, kept until the registry changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from registry.registry import Registry
from registry.store import places

T = TypeVar("T")

_kept: WeakKeyDictionary[Registry, tuple[tuple[int, int], dict[Any, Any]]] = WeakKeyDictionary()
"""For each registry where its log stands, and what was found out since. The reader's thread alone uses it."""


def last_entry(registry: Registry) -> tuple[int, int]:
    """The number of the log's last entry, and what tells the folder from another one that gets its name."""
    ((seq,),) = registry.catalog.query("SELECT COALESCE(MAX(seq), 0) FROM log")
    status = places.status_of(registry.root)
    return int(seq), 0 if status is None else status.st_ino


def once(registry: Registry, key: object, find_out: Callable[[], T]) -> T:
    """What a function finds out, unless it was found out under this key since the registry changed last."""
    place, found = last_entry(registry), _kept.get(registry)
    if found is None or found[0] != place:
        found = _kept[registry] = (place, {})
    if key not in found[1]:
        found[1][key] = find_out()
    return found[1][key]  # type: ignore[no-any-return]


class Own(NamedTuple):
    """The bytes of the packs that were written for a version."""

    id: str
    model: str
    version: int
    size: int


def own_by_version(registry: Registry) -> list[Own]:
    """Bytes of the packs that were written for each version, the most first; what several share counts for the oldest."""
    sql = (
        "SELECT id, model, version, SUM(size) FROM (SELECT v.id AS id, v.model AS model, v.version AS version, "
        "p.size AS size, MIN(v.created) FROM packs p JOIN uses u ON u.pack = p.number JOIN versions v ON v.id = u.id "
        "GROUP BY p.number) GROUP BY id ORDER BY SUM(size) DESC"
    )
    return once(registry, "own", lambda: [Own(*row) for row in registry.catalog.query(sql)])
