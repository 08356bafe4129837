"""Questions that several parts ask of the tables, inside a transaction or outside."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Protocol

from registry.store.digest import is_digest
from registry.store.errors import Corrupt
from registry.store.locating import Location

_BATCH = 500
"""Parameters of one statement."""

_PLACE_TYPES = {
    (str, int, int, str, int, int, base, coded) for base in (str, type(None)) for coded in (int, type(None))
}
"""The types that the columns of a place may have."""


Query = Callable[[str, Sequence[Any]], Sequence[Sequence[Any]]]
"""Runs SQL and returns the rows."""


class Reader(Protocol):
    """The catalog, or the view of it inside a transaction."""

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query that only reads."""
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

    Of several packs with the same tensor, one without known damage is preferred, then one that has the tensor itself
    and no difference, then the one that the log named first.

    Raises:
        Corrupt: if the table holds a damaged row.
    """
    found: dict[str, tuple[tuple[int, bool, int], Location]] = {}
    for part in batches(digests):
        rows = query(
            "SELECT t.digest, p.damaged, p.number, p.digest, t.start, p.size, t.base, t.coded FROM tensors t "
            f"JOIN packs p ON p.number = t.pack WHERE t.digest IN ({marks(part)})",
            part,
        )
        for row in rows:
            is_right = tuple(map(type, row)) in _PLACE_TYPES and 0 <= row[4] <= row[5] and (row[7] or 0) >= 0
            if not is_right or not (row[6] is None or is_digest(row[6])):
                raise Corrupt(
                    "the catalog holds a damaged row of a tensor; recreate it with: registry rebuild"
                )
            digest, damaged, number, pack, start, size, base, coded = row
            location = Location(
                pack=pack, start=start, pack_size=size, base=base, coded=coded, is_damaged=damaged != 0
            )
            rank = (damaged, location.base is not None, number)
            before = found.get(digest)
            if before is None or rank < before[0]:
                found[digest] = rank, location
    return {digest: location for digest, (_, location) in found.items()}


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
            [model, metric],
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
    raise Corrupt(f"the catalog holds a damaged record ({problem}); recreate it with: registry rebuild")
