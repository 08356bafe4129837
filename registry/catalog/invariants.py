"""What holds in every registry, checked over the tables.

`broken_by` checks what an entry touches, before the entry is written. `invariants` checks everything, and `Comparison`
checks that the tables follow from the log: `verify` and the tests ask both.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from registry.catalog import schema
from registry.catalog.copies import Material, head, text_in
from registry.catalog.lookups import batches, locate, marks
from registry.catalog.refolding import history
from registry.catalog.schema import UNUSED
from registry.catalog.tables import fill
from registry.log.entries import Entry
from registry.log.history import Fork, Placed
from registry.log.ledger import Ledger
from registry.store.errors import RegistryError

if TYPE_CHECKING:
    from registry.catalog.change import Change
    from registry.catalog.database import Database
    from registry.store.locating import Location
    from registry.store.store import Store

MAX_CHAIN = 8
"""How deep differences may rest on one another."""

_TRIES = 4


def broken_by(change: Change, entry: Entry, store: Store) -> str | None:
    """The rule that an entry breaks, in words; None if it breaks none.

    The entry has been applied, in a transaction that is still open. It is not blamed for what was broken before: a
    tensor still counts as there if the pack that should hold it is damaged.
    """
    for record in entry.records:
        if record["op"] in ("publish", "artifact") and (problem := _lacks(change, record["id"], store)):
            return problem
        if record["op"] == "publish" and (problem := _number_is_wrong(change, record["model"])):
            return problem
        if record["op"] == "replace":
            (row,) = change.query("SELECT size FROM packs WHERE digest = ?", [record["new"]])
            if not store.pack_is_whole(record["new"], row[0]):
                return f"pack {record['new'][:12]} is not there"
    return takes_needed(change)


def takes_needed(change: Change) -> str | None:
    """What an entry that has been applied takes away although it is needed, in words; None if it takes nothing.

    It depends on the log alone: not on the files that are here.
    """
    for digest, tensors, users in change.packs.dropped:
        lost = tensors - set(locate(change.query, tensors))
        for manifest_id in users:
            if change.is_live(manifest_id) and not lost.isdisjoint(change.tensors_of(manifest_id)):
                return f"manifest {manifest_id[:12]} still needs pack {digest[:12]}"
        if _is_base(change, lost):
            return f"differences still need pack {digest[:12]}"
    return None


def invariants(query: Callable[..., list[tuple[object, ...]]], store: Store) -> Iterator[str]:
    """Every rule that is broken, in words."""
    live = [str(row[0]) for row in query("SELECT id FROM manifests")]
    counting = f"FROM packs WHERE NOT (damaged = 1 AND {UNUSED})"
    for digest, number in query(f"SELECT digest, number {counting}"):
        try:
            held = {
                name: (place.start, place.base, place.coded)
                for name, place in store.pack_info(str(digest)).places.items()
            }
        except RegistryError as error:
            yield str(error)
            continue
        rows = query("SELECT digest, start, base, coded FROM tensors WHERE pack = ?", [number])
        if {str(name): tuple(place) for name, *place in rows} != held:
            yield f"pack {str(digest)[:12]} does not hold what the catalog says"
    for digest, _ in query("SELECT p.digest, p.size FROM packs p JOIN doomed d ON d.digest = p.digest"):
        yield f"pack {str(digest)[:12]} was doomed, and counts"
    for digest, size in query(f"SELECT digest, size {counting}"):
        if not store.pack_is_whole(str(digest), int(str(size))):
            yield f"pack {str(digest)[:12]} is not there in its full size"
    for manifest_id in live:
        yield from _manifest_problems(query, manifest_id, store)
    for name, number, again, newest in query(
        "SELECT m.name, m.next_version, m.next_again, COALESCE(MAX(v.version), 0) FROM models m "
        "LEFT JOIN versions v ON v.model = m.name GROUP BY m.name"
    ):
        if number != again or int(str(newest)) >= int(str(number)):
            yield f"the next version of {name} is v{number}, but it has v{newest}"
    for table, column in (("aliases", "id"), ("tags", "id"), ("notes", "id"), ("metrics", "id")):
        if query(f"SELECT 1 FROM {table} WHERE {column} NOT IN (SELECT id FROM versions) LIMIT 1"):
            yield f"the table {table} has rows of a version that is not there"
    if query("SELECT 1 FROM versions WHERE model NOT IN (SELECT name FROM models) LIMIT 1"):
        yield "there is a version of a model that is not there"
    named = "SELECT id FROM versions UNION SELECT id FROM artifacts"
    if query(f"SELECT 1 FROM manifests WHERE id NOT IN ({named}) LIMIT 1"):
        yield "a manifest counts that nothing names"
    if query(f"SELECT 1 FROM ({named}) WHERE id NOT IN (SELECT id FROM manifests) LIMIT 1"):
        yield "a version or artifact has no manifest"


class Comparison:
    """Compares the log, the catalog's copy of it, and the tables with one another.

    Args:
        connect: gives a connection to the catalog.
    """

    def __init__(self, database: Database, connect: Callable[[], sqlite3.Connection]) -> None:
        self._database = database
        self._connect = connect

    def problems(self) -> list[str]:
        """What does not fit together, in words."""
        database = self._database
        for _ in range(_TRIES):
            before = database.log_state()
            found = list(self._problems())
            if not found or before == database.log_state():
                return found
        if not database.is_writable:
            return found
        # Others keep changing the registry, and are kept out now.
        with database.journal.locked():
            return list(self._problems())

    def _problems(self) -> Iterator[str]:
        database, journal = self._database, self._database.journal
        with database.errors(), self._snapshot() as connection:
            for (text,) in connection.execute("PRAGMA integrity_check"):
                if text != "ok":
                    yield f"{database.path}: {text}; run: registry rebuild"
            seq, _, _ = head(connection)
            ledger = Ledger()
            for item in history(journal, connection):
                if isinstance(item, Placed):
                    if item.entry.seq > seq:
                        break
                    yield from self._damage_of(item)
                elif isinstance(item, Fork):
                    yield f"{journal.folder}: {item}"
                ledger.follow([item])
            yield from (f"{journal.folder}: {gap}; run: registry rebuild" for gap in ledger.gaps)
            yield from (f"{journal.folder}: {void}" for void in ledger.voids)
            if not ledger.seq and any(True for _ in database.store):
                yield (
                    f"{journal.folder}: the log is gone, and so is the catalog's copy; registry rebuild --adopt takes "
                    "in what lies in manifests/"
                )
            if ledger.seq < seq:
                yield f"{journal.folder}: the log ends at entry {ledger.seq}, the catalog has {seq}"
                return
            yield from self._differences_from(connection, ledger)

    def _damage_of(self, item: Placed) -> Iterator[str]:
        database = self._database
        if item.start is None:
            yield f"{database.journal.folder}: entry {item.entry.seq} is damaged; registry rebuild puts it back"
        elif not item.in_copy:
            yield f"{database.path}: its copy of entry {item.entry.seq} is damaged; run: registry rebuild"

    def _differences_from(self, connection: sqlite3.Connection, ledger: Ledger) -> Iterator[str]:
        """Where the tables are not what follows from the log."""
        database = self._database
        with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as fresh:
            schema.create(fresh)
            fill(fresh, ledger, Material(database.store, text_in(connection, ledger)))
            empty = "SELECT 1 FROM packs WHERE number NOT IN (SELECT pack FROM tensors) LIMIT 1"
            has_unreadable = fresh.execute(empty).fetchone() is not None
            for table in schema.DERIVED:
                if has_unreadable and table in ("tensors", "uses", "lacks"):
                    # `verify` names the packs that cannot be read.
                    continue
                found, expected = (
                    {tuple(row) for row in one.execute(f"SELECT * FROM {table}")}
                    for one in (connection, fresh)
                )
                if found != expected:
                    odd = len(found ^ expected)
                    rows = "1 row" if odd == 1 else f"{odd} rows"
                    yield f"{database.path}: {rows} of the table {table} do not follow from the log; run: registry rebuild"

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[sqlite3.Connection]:
        """A connection to the catalog. Where readers do not hold up writers, it shows a single moment."""
        connection = self._connect()
        held = connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        if held:
            connection.execute("BEGIN")
        try:
            yield connection
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")


def _lacks(change: Change, manifest_id: str, store: Store) -> str | None:
    """What a manifest lacks that counts from now on, in words; None if it lacks nothing."""
    wanted = set(change.tensors_of(manifest_id))
    depth = 0
    while wanted:
        places = change.packs.locate(wanted)
        if len(places) < len(wanted):
            return f"no pack has a tensor that manifest {manifest_id[:12]} needs"
        in_packs: dict[str, list[tuple[str, Location]]] = {}
        for name, place in places.items():
            in_packs.setdefault(place.pack, []).append((name, place))
        for pack, held in in_packs.items():
            if not store.pack_is_whole(pack, held[0][1].pack_size):
                return f"pack {pack[:12]}, which manifest {manifest_id[:12]} needs, is not there"
            said = store.pack_info(pack).places
            if any(said.get(name) != place for name, place in held):
                return f"pack {pack[:12]} does not hold what the catalog says"
        wanted = {place.base for place in places.values() if place.base}
        depth += 1
        if depth > MAX_CHAIN + 1:
            return f"the differences that manifest {manifest_id[:12]} needs rest on one another too deeply"
    return None


def _number_is_wrong(change: Change, model: str) -> str | None:
    rows = change.query("SELECT next_version, next_again FROM models WHERE name = ?", [model])
    ((newest,),) = change.query("SELECT MAX(version) FROM versions WHERE model = ?", [model])
    if not rows or rows[0][0] != rows[0][1] or newest >= rows[0][0]:
        return f"the next version of {model} is not known"
    return None


def _is_base(change: Change, digests: set[str] | frozenset[str]) -> bool:
    """Whether a difference rests on one of some tensors."""
    return any(
        change.query(f"SELECT 1 FROM tensors WHERE base IN ({marks(part)}) LIMIT 1", part)
        for part in batches(digests)
    )


def _manifest_problems(
    query: Callable[..., list[tuple[object, ...]]], manifest_id: str, store: Store
) -> Iterator[str]:
    """What a manifest lacks, and where the table `uses` is wrong about it, in words."""
    needed: set[str] = set()
    depth = 0
    try:
        wanted = set(store.tensors_of(manifest_id))
        while wanted and depth <= MAX_CHAIN + 1:
            places = locate(query, wanted)
            needed |= {place.pack for place in places.values()}
            if len(places) < len(wanted):
                yield f"manifest {manifest_id[:12]} lacks {len(wanted) - len(places)} tensors"
            wanted = {place.base for place in places.values() if place.base}
            depth += 1
    except RegistryError as error:
        yield str(error)
        return
    if wanted:
        yield f"the differences that manifest {manifest_id[:12]} needs rest on one another too deeply"
    rows = query(
        "SELECT p.digest FROM uses u JOIN packs p ON p.number = u.pack WHERE u.id = ?", [manifest_id]
    )
    if {str(row[0]) for row in rows} != needed:
        yield f"the packs that manifest {manifest_id[:12]} needs are not those that the catalog says"
