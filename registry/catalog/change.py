"""How each entry of the log changes the tables.

The same code applies an entry when it is made and when a catalog catches up. A catalog that is made anew is filled from
a `Ledger`, which has code of its own for each operation.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from registry.catalog import pairing
from registry.catalog.copies import Material, packed
from registry.catalog.lookups import batches, marks
from registry.catalog.tables import Packs, Rows
from registry.log.entries import Entry, Record
from registry.log.journal import Position
from registry.log.ledger import Ledger
from registry.log.refusals import refuse_if
from registry.store import manifest as manifests
from registry.store.errors import RegistryError
from registry.store.manifest import Manifest
from registry.store.pack import PackInfo


class Change:
    """Applies entries to the tables, inside a transaction.

    Args:
        material: the manifests and packs that entries name.

    Attributes:
        rows, packs: the tables.
        is_unsure: whether the tables alone do not tell what an entry changes, so that they must be made anew.
        beside: the rows of `state` about the write-ahead log that the transaction found; see
            `registry.catalog.pairing.after`.
    """

    def __init__(self, connection: sqlite3.Connection, material: Material) -> None:
        self.connection = connection
        self._material = material
        self._parsed: dict[str, Manifest] = {}
        self.rows = Rows(connection)
        self.packs = Packs(connection, self)
        self.is_unsure = False
        self.beside: dict[str, str] = {}
        self._seq = 0
        # Model and number of the versions that the present entry has removed, by id.
        self._freed: dict[str, tuple[str, int]] = {}

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query that only reads."""
        return self.connection.execute(sql, parameters).fetchall()

    def pack_info(self, digest: str) -> PackInfo:
        """See `registry.catalog.tables.Contents`."""
        return self._material.pack_info(digest)

    def tensors_of(self, manifest_id: str) -> Collection[str]:
        """See `registry.catalog.tables.Contents`."""
        parsed = self._parsed.get(manifest_id)
        if parsed is None:
            return self._material.tensors_of(manifest_id)
        return {tensor.digest for tensor in parsed.tensors}

    def take(self, entry: Entry) -> None:
        """Apply an entry.

        Raises:
            Refused: if it contradicts those before it; the caller undoes what was done.
        """
        self._seq = entry.seq
        self._freed.clear()
        self.packs.moved.clear()
        self._parsed.clear()
        self.packs.dropped.clear()
        for record in entry.records:
            _OPERATIONS[record["op"]](self, record, entry)
        moved = self.packs.moved
        if moved:
            self.packs.derive_uses(moved & self._live(moved))

    def keep(self, entry: Entry) -> None:
        """Keep the catalog's own copy of an entry."""
        self._execute("INSERT OR REPLACE INTO log (seq, entry) VALUES (?, ?)", (entry.seq, packed(entry)))

    def set_head(self, last: Entry | Ledger, end: Position) -> None:
        """Say how much of the log the catalog holds.

        Args:
            last: the last entry, or the ledger of all entries.
            end: where the log ends behind it.
        """
        for key, value in self.beside.items():
            self.rows.set_state(key, value)
        self.beside = {}
        pairing.stamp(self.connection)
        self.rows.set_state("seq", last.seq)
        self.rows.set_state("digest", last.digest)
        self.rows.set_state("segment", end.segment)
        self.rows.set_state("offset", end.offset)

    def is_live(self, manifest_id: str) -> bool:
        """Whether a manifest is that of a version or an artifact."""
        return any(
            self._one(f"SELECT 1 FROM {table} WHERE id = ? LIMIT 1", manifest_id)
            for table in ("versions", "artifacts")
        )

    def _execute(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> sqlite3.Cursor:
        return self.connection.execute(sql, parameters)

    def _one(self, sql: str, *parameters: Any) -> tuple[Any, ...] | None:
        return self._execute(sql, parameters).fetchone()  # type: ignore[no-any-return]

    def _pack(self, record: Record, entry: Entry) -> None:
        digest = record["digest"]
        refuse_if(self.packs.number_of(digest) is not None, f"pack {digest[:12]} is there already")
        refuse_if(self._is_doomed(digest), f"pack {digest[:12]} was doomed")
        row = self._one("SELECT value FROM state WHERE key = 'packs'")
        number = int(row[0]) + 1 if row else 1
        self.rows.set_state("packs", number)
        digests = self._digests_in(digest)
        before = self.packs.locate(digests)
        differences = bool(record.get("differences"))
        self.packs.add(digest, record["size"], number=number, differences=differences)
        if before:
            self.packs.moved |= self.packs.users_left(before)
        self.packs.moved |= self.packs.lacking(name for name in digests if name not in before)

    def _digests_in(self, pack: str) -> list[str]:
        try:
            return list(self._material.pack_info(pack).places)
        except RegistryError:
            self.is_unsure = True
            return []

    def _damaged(self, record: Record, entry: Entry) -> None:
        self.packs.set_damaged(record["pack"])

    def _replace(self, record: Record, entry: Entry) -> None:
        old, new = record["old"], record["new"]
        refuse_if(old == new, f"pack {old[:12]} would take its own place")
        self.packs.live(old)
        self.packs.live(new)
        self._drop_pack(old, entry)

    def _doom(self, record: Record, entry: Entry) -> None:
        for digest in record["packs"]:
            self.packs.live(digest)
            self._drop_pack(digest, entry)
        for manifest_id in record["manifests"]:
            refuse_if(self.is_live(manifest_id), f"manifest {manifest_id[:12]} is needed")
            self._execute("DELETE FROM released WHERE id = ?", (manifest_id,))
            self._set_doomed(manifest_id, entry.at)

    def _drop_pack(self, digest: str, entry: Entry) -> None:
        self.packs.drop(digest)
        self._set_doomed(digest, entry.at)

    def _is_doomed(self, digest: str) -> bool:
        return self._one("SELECT 1 FROM doomed WHERE digest = ?", digest) is not None

    def _set_doomed(self, digest: str, at: str) -> None:
        self._execute("INSERT OR REPLACE INTO doomed (digest, at) VALUES (?, ?)", (digest, at))

    def _live(self, ids: set[str]) -> set[str]:
        """Those of some manifests that count."""
        found: set[str] = set()
        for part in batches(ids):
            found.update(
                row[0] for row in self.query(f"SELECT id FROM manifests WHERE id IN ({marks(part)})", part)
            )
        return found

    def _read(self, manifest_id: str, text: str | None) -> Manifest | None:
        """A manifest, from its file or from the text that the entry carries; None if it cannot be read."""
        if text is None or self._material.knows(manifest_id):
            return self._material.find_manifest(manifest_id)
        try:
            self._parsed[manifest_id] = manifests.parse(text.encode())
        except RegistryError:
            return None
        return self._parsed[manifest_id]

    def _revive(self, record: Record) -> Manifest | None:
        """Let a manifest count."""
        manifest_id, text = record["id"], record.get("manifest")
        refuse_if(
            text is None and self._is_doomed(manifest_id),
            f"manifest {manifest_id[:12]} was doomed, and its text is not there",
        )
        manifest = self._read(manifest_id, text)
        self._execute("DELETE FROM released WHERE id = ?", (manifest_id,))
        if not self._one("SELECT 1 FROM manifests WHERE id = ?", manifest_id):
            self.rows.add_manifest(manifest_id, manifest, None)
            self.packs.moved.add(manifest_id)
        if text is not None:
            self._execute("UPDATE manifests SET entry = ? WHERE id = ?", (self._seq, manifest_id))
        return manifest

    def _release(self, manifest_id: str) -> None:
        """Let a manifest go, unless a version or an artifact still has it."""
        if not self.is_live(manifest_id):
            self._execute("DELETE FROM manifests WHERE id = ?", (manifest_id,))
            self._execute("DELETE FROM doomed WHERE digest = ?", (manifest_id,))
            self._execute("INSERT OR IGNORE INTO released (id) VALUES (?)", (manifest_id,))

    def _publish(self, record: Record, entry: Entry) -> None:
        manifest_id, model, version = record["id"], record["model"], record["version"]
        refuse_if(
            self._one("SELECT 1 FROM versions WHERE id = ?", manifest_id) is not None,
            f"{manifest_id[:12]} is a version already",
        )
        instead = record.get("instead")
        if instead is None:
            following = self._next_of(model)
            self.is_unsure = self.is_unsure or bool(record.get("adopted"))
            refuse_if(version < following, f"{model} has had a version v{version}")
            self._set_next(model, version + 1)
        else:
            freed = self._freed.pop(instead, None)
            refuse_if(freed != (model, version), f"{model}:v{version} is not what {instead[:12]} was")
        manifest = self._revive(record)
        self.rows.add_version(manifest_id, model=model, version=version, manifest=manifest)

    def _remove(self, record: Record, entry: Entry) -> None:
        manifest_id = record["id"]
        model, version = self._version(manifest_id)
        aliases = {row[0] for row in self.query("SELECT name FROM aliases WHERE id = ?", [manifest_id])}
        tags = {row[0] for row in self.query("SELECT name FROM tags WHERE id = ?", [manifest_id])}
        taken = set(record["aliases"]), set(record["tags"])
        refuse_if(taken != (aliases, tags), f"{model}:v{version} has other aliases or tags")
        self._execute("DELETE FROM versions WHERE id = ?", (manifest_id,))
        self._freed[manifest_id] = (model, version)
        self._release(manifest_id)

    def _version(self, manifest_id: str) -> tuple[str, int]:
        row = self._one("SELECT model, version FROM versions WHERE id = ?", manifest_id)
        refuse_if(row is None, f"there is no version {manifest_id[:12]}")
        assert row is not None
        return row[0], row[1]

    def _next(self, record: Record, entry: Entry) -> None:
        model, version = record["model"], record["version"]
        refuse_if(version < self._next_of(model), f"{model} has had a version v{version}")
        self._set_next(model, version)

    def _next_of(self, model: str) -> int:
        row = self._one("SELECT next_version FROM models WHERE name = ?", model)
        return int(row[0]) if row else 1

    def _set_next(self, model: str, version: int) -> None:
        self._execute(
            "INSERT INTO models (name, next_version, next_again) VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE "
            "SET next_version = excluded.next_version, next_again = excluded.next_again",
            (model, version, version),
        )

    def _alias(self, record: Record, entry: Entry) -> None:
        model, alias, manifest_id = record["model"], record["alias"], record["id"]
        refuse_if(self._version(manifest_id)[0] != model, f"{manifest_id[:12]} is not a version of {model}")
        self._unpoint(model, alias, record["was"])
        self.rows.add_alias(model, alias, manifest_id)

    def _unalias(self, record: Record, entry: Entry) -> None:
        self._unpoint(record["model"], record["alias"], record["was"])

    def _unpoint(self, model: str, alias: str, was: str | None) -> None:
        row = self._one("SELECT id FROM aliases WHERE model = ? AND name = ?", model, alias)
        refuse_if((row[0] if row else None) != was, f"{model}@{alias} points elsewhere")
        self._execute("DELETE FROM aliases WHERE model = ? AND name = ?", (model, alias))

    def _tag(self, record: Record, entry: Entry) -> None:
        self._version(record["id"])
        self._execute(
            "INSERT INTO tags (id, name) VALUES (?, ?) ON CONFLICT DO NOTHING", (record["id"], record["tag"])
        )

    def _untag(self, record: Record, entry: Entry) -> None:
        self._version(record["id"])
        self._execute("DELETE FROM tags WHERE id = ? AND name = ?", (record["id"], record["tag"]))

    def _note(self, record: Record, entry: Entry) -> None:
        self._version(record["id"])
        self.rows.add_note(record["id"], record["at"], record["text"])

    def _run(self, record: Record, entry: Entry) -> None:
        name, model, at = record["name"], record["model"], record["at"]
        before = self._one("SELECT model, started FROM runs WHERE name = ?", name)
        refuse_if(before is not None and before != (model, at), f"there is another run {name}")
        self._execute("DELETE FROM runs WHERE name = ?", (name,))
        self.rows.add_run(name, model=model, at=at, record=record["record"])

    def _artifact(self, record: Record, entry: Entry) -> None:
        key = record["key"]
        before = self._expected_artifact(key, record["was"])
        self._revive(record)
        if before is not None:
            self._execute("DELETE FROM artifacts WHERE key = ?", (key,))
        self.rows.add_artifact(key, manifest_id=record["id"], at=record["at"], record=record["record"])
        if before is not None:
            self._release(before)

    def _drop_artifact(self, record: Record, entry: Entry) -> None:
        self._expected_artifact(record["key"], record["was"])
        self._execute("DELETE FROM artifacts WHERE key = ?", (record["key"],))
        self._release(record["was"])

    def _expected_artifact(self, key: str, was: str | None) -> str | None:
        row = self._one("SELECT id FROM artifacts WHERE key = ?", key)
        found = row[0] if row else None
        refuse_if(found != was, f"artifact {key[:12]} is another")
        return found

    def _begin(self, record: Record, entry: Entry) -> None:
        """Nothing changes: the registry is new."""

    def _adopt(self, record: Record, entry: Entry) -> None:
        """Lost entries are accepted as lost, and the tables must be made anew."""
        self.is_unsure = True


_OPERATIONS: dict[str, Callable[[Change, Record, Entry], None]] = {
    "begin": Change._begin,
    "pack": Change._pack,
    "damaged": Change._damaged,
    "replace": Change._replace,
    "doom": Change._doom,
    "publish": Change._publish,
    "remove": Change._remove,
    "next": Change._next,
    "alias": Change._alias,
    "unalias": Change._unalias,
    "tag": Change._tag,
    "untag": Change._untag,
    "note": Change._note,
    "run": Change._run,
    "artifact": Change._artifact,
    "drop-artifact": Change._drop_artifact,
    "adopt": Change._adopt,
}
