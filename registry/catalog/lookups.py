"""Questions that several parts ask of the tables, inside a transaction or outside."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from registry.log.metrics import bare
from registry.store.digest import is_digest
from registry.store.errors import Corrupt
from registry.store.locating import Location

if TYPE_CHECKING:
    from registry.store.store import Store

_BATCH = 500
"""Parameters of one statement."""

DEEPEST = 6
"""How many differences may rest on one another where a pack is made known. The format allows more."""

Query = Callable[[str, Sequence[Any]], Sequence[Sequence[Any]]]
"""Runs SQL and returns the rows."""


class Reader(Protocol):
    """The catalog, or the view of it inside a transaction."""

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query that only reads."""
        ...


class Placed(Reader, Protocol):
    """The view of the catalog inside a transaction, which knows where tensors lie."""

    store: Store

    def locate(self, digests: Collection[str]) -> dict[str, Location]:
        """Where stored tensors lie."""
        ...


def batches(items: Iterable[Any]) -> Iterable[list[Any]]:
    """Items in lists that are short enough for one statement."""
    wanted = list(items)
    return (wanted[start : start + _BATCH] for start in range(0, len(wanted), _BATCH))


def marks(items: Collection[Any]) -> str:
    """Question marks for as many parameters."""
    return ",".join("?" * len(items))


def locate(query: Query, digests: Collection[str]) -> dict[str, Location]:
    """Where tensors lie; those that no pack has are left out.

    Of several packs with the same tensor, one without known damage is preferred, then one that has the tensor itself,
    then one that has it coded by itself, then the one that the log named first.

    Raises:
        Corrupt: if the table holds a damaged row.
    """
    found: dict[str, Location] = {}
    ranks: dict[str, tuple[int, int, int]] = {}
    # Sorted as the table is, each statement reads a part of it, not all of it.
    for part in batches(sorted(digests)):
        rows = query(
            "SELECT t.digest, t.start, t.base, t.coded, p.digest, p.size, p.damaged, p.number FROM tensors t "
            f"JOIN packs p ON p.number = t.pack WHERE t.digest IN ({marks(part)})",
            part,
        )
        for digest, start, base, coded, pack, size, damaged, number in rows:
            is_right = type(start) is type(size) is type(damaged) is type(number) is int and type(pack) is str
            if not (is_right and 0 <= start <= size and _is_coding(base, coded)):
                raise Corrupt(
                    "the catalog holds a damaged row of a tensor", "recreate it with: registry rebuild"
                )
            place = Location(pack, start, size, base, coded, damaged != 0)
            rank = (damaged, place.rank, number)
            if digest not in found or rank < ranks[digest]:
                ranks[digest] = rank
                found[digest] = place
    return found


def can_be_turned_back(view: Placed, own: Mapping[str, Location], *, without: str = "") -> bool:
    """Whether the differences of a new pack, and all that rest on its tensors, lead to whole tensors in packs that stay.

    On the way there are no circles, and no more than `DEEPEST` differences: others may have changed meanwhile what the
    new pack was made from.

    Args:
        own: where tensors lie in the new pack.
        without: the pack that it takes the place of.
    """
    places = dict(own)
    wanted = {place.base for place in own.values() if place.base} - own.keys()
    while wanted:
        found = view.locate(wanted)
        if len(found) < len(wanted) or any(place.pack == without for place in found.values()):
            return False
        places |= found
        wanted = {place.base for place in found.values() if place.base} - places.keys()
    sizes = {place.pack: place.pack_size for digest, place in places.items() if digest not in own}
    if not all(view.store.pack_is_whole(pack, size) for pack, size in sizes.items()):
        return False
    depths = {digest: _depth(digest, places) for digest in own}
    level = {digest for digest, place in own.items() if place.base}
    while level:
        if any(depths[digest] > DEEPEST for digest in level):
            return False
        above: set[str] = set()
        for part in batches(level):
            rows = view.query(
                "SELECT t.digest, t.base FROM tensors t JOIN packs p ON p.number = t.pack "
                f"WHERE t.base IN ({marks(part)}) AND p.digest != ?",
                [*part, without],
            )
            for digest, base in rows:
                if depths[base] >= depths.get(digest, 0):
                    depths[digest] = depths[base] + 1
                    above.add(digest)
        level = above
    return True


def _depth(digest: str, places: Mapping[str, Location]) -> int:
    """How many differences lead from a tensor to a whole one; more than are allowed where there are too many, or a circle."""
    depth = 0
    while (base := places[digest].base) and depth <= DEEPEST:
        digest, depth = base, depth + 1
    return depth


def pack_size(size: object) -> int:
    """The bytes of a pack, as a row of the table says.

    Raises:
        Corrupt: if the row is damaged.
    """
    if type(size) is not int or size < 0:
        raise Corrupt("the catalog holds a damaged row of a pack", "recreate it with: registry rebuild")
    return size


def are_doomed(view: Reader, packs: Collection[str]) -> bool:
    """Whether one of some packs was doomed, so that its name cannot count any more."""
    return any(
        view.query(f"SELECT 1 FROM doomed WHERE digest IN ({marks(part)}) LIMIT 1", part)
        for part in batches(packs)
    )


def was_removed(query: Query, manifest_id: str) -> bool:
    """Whether a manifest counted once, and does not any more."""
    gone = "SELECT id FROM released UNION ALL SELECT digest FROM doomed"
    live = "SELECT id FROM manifests"
    return bool(
        query(f"SELECT 1 FROM ({gone}) WHERE id = ? AND ? NOT IN ({live} WHERE id = ?)", [manifest_id] * 3)
    )


def _is_coding(base: Any, coded: Any) -> bool:
    """Whether a tensor can be stored so: as it is, coded by itself, or as a difference."""
    if coded is None:
        return base is None
    return type(coded) is int and coded >= 0 and (base is None or is_digest(base))


def best_id(query: Query, model: str, metric: str, *, smallest: bool) -> tuple[str, float] | None:
    """Id and value of the version with the best value of a metric (or `loss`); of equal ones the earlier version."""
    direction = "ASC" if smallest else "DESC"
    if metric == "loss":
        rows = query(
            "SELECT id, loss FROM versions WHERE model = ? AND loss IS NOT NULL "
            f"ORDER BY loss {direction}, version LIMIT 1",
            [model],
        )
    else:
        rows = query(
            "SELECT t.id, t.value FROM metrics t JOIN versions v ON v.id = t.id "
            "WHERE t.model = ? AND t.name = ? AND t.value IS NOT NULL "
            f"ORDER BY t.value {direction}, v.version LIMIT 1",
            [model, bare(metric)],
        )
    return (str(rows[0][0]), float(rows[0][1])) if rows else None


def parsed(record: Any) -> Any:
    """A record that a table holds as JSON.

    Raises:
        Corrupt: if it is damaged.
    """
    try:
        found = json.loads(record)
        if isinstance(found, dict):
            return found
        problem = "it is not an object"
    except (ValueError, TypeError, RecursionError) as error:
        problem = str(error)
    raise Corrupt(f"the catalog holds a damaged record ({problem})", "recreate it with: registry rebuild")
