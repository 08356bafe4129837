"""Mending the log: entries that both copies of it have lost come from a second copy of the same log.

The digests show that it is the same: each entry names the one before it. So an entry that is lost here is taken only if the entry
behind it, which is not lost, leads to it.
"""

from __future__ import annotations

import heapq
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from registry.catalog.copies import copies
from registry.catalog.database import Database
from registry.catalog.refolding import history
from registry.log.entries import MAX_NUMBER, START, Entry, Record
from registry.log.history import End, Gap, Placed, heal, merge, walk
from registry.log.ledger import Ledger

if TYPE_CHECKING:
    from registry.store.store import Store

EntriesOf = Callable[[range], Iterable[Entry]]
"""Gives those entries with some numbers that a second copy has."""


class Mended(NamedTuple):
    """What a second copy gives back.

    Attributes:
        found: the entries that are put back, or would be, by number.
        gaps: what stays lost.
    """

    found: Mapping[int, Entry]
    gaps: list[Gap]


def mend(
    database: Database, connection: sqlite3.Connection, entries_of: EntriesOf, *, dry_run: bool
) -> Mended:
    """Put back into the folder's log what it and the catalog's copy have lost, and a second copy has.

    Args:
        dry_run: only say what would be put back.

    Raises:
        StorageError: if the folder cannot be written.
    """
    journal = database.journal
    with journal.locked():
        ledger, known = Ledger(), dict[int, str]()
        gap: Gap | None = None
        for item in history(journal, connection):
            ledger.follow([item])
            if isinstance(item, Placed) and gap is not None:
                known[item.entry.seq - 1] = item.entry.prev
            elif isinstance(item, End) and gap is not None:
                # The last line is damaged, and the digest at its end may be whole.
                known[gap.last] = journal.digest_before(item.position) or ""
            gap = item if isinstance(item, Gap) and item.last >= item.first else None
        gaps = [gap for gap in ledger.gaps if gap.last >= gap.first]
        found: dict[int, Entry] = {}
        for gap in gaps:
            found |= leading_to(known, entries_of(range(gap.first, gap.last + 1)))
        if not ledger.seq and not gaps:
            found = _whole(entries_of, database)
        if found and not dry_run:
            own = (entry for entry in copies(connection) if entry.seq not in found)
            more = heapq.merge(own, sorted(found.values()), key=lambda entry: entry.seq)
            heal(journal, merge(walk(journal.read()), more), ledger.accepted)
    return Mended(found, [gap for gap in gaps if not found.keys() >= {*range(gap.first, gap.last + 1)}])


def leading_to(known: Mapping[int, str], candidates: Iterable[Entry]) -> dict[int, Entry]:
    """Those of some entries that are known to belong to a log, by number.

    Args:
        known: digests of entries of the log.
        candidates: sorted by their numbers.
    """
    found: dict[int, Entry] = {}
    wanted = dict(known)
    for entry in reversed(list(candidates)):
        if wanted.get(entry.seq) == entry.digest:
            found[entry.seq] = entry
            wanted[entry.seq - 1] = entry.prev
    return found


def _whole(entries_of: EntriesOf, database: Database) -> dict[int, Entry]:
    """All entries of a second copy, where nothing is left of the log, and it names a manifest or pack that is here."""
    found: dict[int, Entry] = {}
    prev, is_ours = START, False
    for entry in entries_of(range(1, MAX_NUMBER)):
        if entry.seq != len(found) + 1 or entry.prev != prev:
            break
        found[entry.seq], prev = entry, entry.digest
        is_ours = is_ours or any(_is_here(record, database.store) for record in entry.records)
    return found if is_ours else {}


def _is_here(record: Record, store: Store) -> bool:
    """Whether a record names a manifest or a pack that lies in the registry."""
    if record["op"] == "pack":
        return store.pack_is_here(record["digest"], record["size"])
    return store.has(str(record.get("id")))
