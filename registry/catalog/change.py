"""How each entry of the log changes the tables.

The same code applies an entry when it is made and when a catalog catches up. A catalog that is made anew is filled from
a `Ledger`, which knows what each operation means for itself.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from registry.catalog.lookups import batches, locate, marks
from registry.catalog.packs import Contents, Packs
from registry.log import facts
from registry.log.entries import MAX_NUMBER, Entry, Record
from registry.log.facts import Facts
from registry.log.ledger import Ledger, Refused
from registry.store import manifest as manifests
from registry.store.errors import RegistryError
from registry.store.manifest import Manifest
from registry.store.pack import PackInfo


class Material(Contents, Protocol):
    """What a change reads: manifests and packs, by their names."""

    def knows(self, manifest_id: str) -> bool:
        """Whether a manifest is at hand, without reading a file."""
        ...

    def manifest(self, manifest_id: str) -> Manifest:
        """A manifest.

        Raises:
            RegistryError: if it cannot be read.
        """
        ...


class Change:
    """Applies entries to the tables, inside a transaction.

    Args:
        material: the manifests and packs that entries name.
    """

    def __init__(self, connection: sqlite3.Connection, material: Material) -> None:
        self.connection = connection
        self._material = material
        self._parsed: dict[str, Manifest] = {}
        self.packs = Packs(connection, self)
        self.is_unsure = False
        """Whether what follows is not certain from the tables alone, so that they are to be made anew."""
        self.dropped: list[tuple[str, frozenset[str], frozenset[str]]] = []
        """Packs that do not count any more, with their tensors and the manifests that needed them before."""
        self.beside: dict[str, str] = {}
        """What is to be recorded of the write-ahead log that was there when the transaction began; see `pairing`."""
        self._seq = 0
        self._freed: dict[str, tuple[str, int]] = {}
        self._moved: set[str] = set()

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return self.connection.execute(sql, parameters).fetchall()

    def pack_info(self, digest: str) -> PackInfo:
        """See `Contents`."""
        return self._material.pack_info(digest)

    def tensors_of(self, manifest_id: str) -> Collection[str]:
        """See `Contents`."""
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
        self._moved.clear()
        self._parsed.clear()
        self.dropped.clear()
        for record in entry.records:
            _OPERATIONS[record["op"]](self, record, entry)
        if self._moved:
            self.packs.derive_uses(self._moved & self._live(self._moved))

    def keep(self, entry: Entry) -> None:
        """Keep the catalog's own copy of an entry."""
        self._execute(
            "INSERT OR REPLACE INTO log (seq, entry) VALUES (?, ?)", (entry.seq, zlib.compress(entry.line, 1))
        )

    def fill(self, ledger: Ledger) -> None:
        """Fill empty tables with what follows from the log."""
        self.connection.executemany(
            "INSERT INTO models (name, next_version, next_again) VALUES (?, ?, ?)",
            ((name, number, number) for name, number in ledger.next.items()),
        )
        for name, (model, at, record) in ledger.runs.items():
            self._insert_run(name, model, at, record)
        for digest, pack in ledger.packs.items():
            self.packs.add(
                digest,
                pack.size,
                number=pack.number,
                differences=pack.differences,
                damaged=pack.damaged,
            )
        for manifest_id in ledger.live_manifests():
            manifest = self._read(manifest_id)
            seq, _ = ledger.texts.get(manifest_id, (None, None))
            self._insert_manifest(manifest_id, manifest, seq)
            if manifest_id in ledger.versions:
                self._insert_version(manifest_id, *ledger.versions[manifest_id], manifest)
        for (model, name), manifest_id in ledger.aliases.items():
            self._insert_alias(model, name, manifest_id)
        for manifest_id, tags in ledger.tags.items():
            for tag in sorted(tags):
                self._execute("INSERT INTO tags (id, name) VALUES (?, ?)", (manifest_id, tag))
        for manifest_id, notes in ledger.notes.items():
            for written, text in notes:
                self._insert_note(manifest_id, written, text)
        for key, (manifest_id, at, record) in ledger.artifacts.items():
            self._insert_artifact(key, manifest_id, at, record)
        self.connection.executemany(
            "INSERT INTO released (id) VALUES (?)", ((manifest_id,) for manifest_id in ledger.released)
        )
        self.connection.executemany("INSERT INTO doomed (digest, at) VALUES (?, ?)", ledger.doomed.items())
        self.set_state("packs", ledger.pack_count)
        self.packs.derive_uses(ledger.live_manifests())

    def set_state(self, key: str, value: str | int) -> None:
        """Set what the catalog says of itself."""
        self._execute("INSERT OR REPLACE INTO state (key, value) VALUES (?, ?)", (key, str(value)))

    def _execute(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> sqlite3.Cursor:
        return self.connection.execute(sql, parameters)

    def _one(self, sql: str, *parameters: Any) -> tuple[Any, ...] | None:
        return self._execute(sql, parameters).fetchone()  # type: ignore[no-any-return]

    # -- packs -------------------------------------------------------------------------------------------

    def _pack(self, record: Record, entry: Entry) -> None:
        digest = record["digest"]
        _refuse_if(self.packs.number_of(digest) is not None, f"pack {digest[:12]} is there already")
        _refuse_if(self._is_doomed(digest), f"pack {digest[:12]} was doomed")
        row = self._one("SELECT value FROM state WHERE key = 'packs'")
        number = int(row[0]) + 1 if row else 1
        self.set_state("packs", number)
        digests = self._digests_in(digest)
        before = locate(self.query, digests)
        differences = bool(record.get("differences"))
        self.packs.add(digest, record["size"], number=number, differences=differences)
        if before:
            self._moved |= self.packs.moved(before, before)

    def _digests_in(self, pack: str) -> list[str]:
        try:
            return list(self._material.pack_info(pack).places)
        except RegistryError:
            self.is_unsure = True
            return []

    def _damaged(self, record: Record, entry: Entry) -> None:
        number = self._live_pack(record["pack"])
        self._execute("UPDATE packs SET damaged = 1 WHERE number = ?", (number,))
        self._moved |= self.packs.users([record["pack"]])

    def _replace(self, record: Record, entry: Entry) -> None:
        old, new = record["old"], record["new"]
        _refuse_if(old == new, f"pack {old[:12]} would take its own place")
        self._live_pack(old)
        self._live_pack(new)
        self._drop_pack(old, entry)

    def _doom(self, record: Record, entry: Entry) -> None:
        for digest in record["packs"]:
            self._live_pack(digest)
            self._drop_pack(digest, entry)
        for manifest_id in record["manifests"]:
            _refuse_if(self.is_live(manifest_id), f"manifest {manifest_id[:12]} is needed")
            self._execute("DELETE FROM released WHERE id = ?", (manifest_id,))
            self._set_doomed(manifest_id, entry.at)

    def _drop_pack(self, digest: str, entry: Entry) -> None:
        number, users = self._live_pack(digest), self.packs.users([digest])
        self.dropped.append((digest, frozenset(self.packs.tensors_in(number)), frozenset(users)))
        self._moved |= users
        self._execute("DELETE FROM packs WHERE number = ?", (number,))
        self._set_doomed(digest, entry.at)

    def _live_pack(self, digest: str) -> int:
        number = self.packs.number_of(digest)
        _refuse_if(number is None, f"there is no pack {digest[:12]}")
        assert number is not None
        return number

    def _is_doomed(self, digest: str) -> bool:
        return self._one("SELECT 1 FROM doomed WHERE digest = ?", digest) is not None

    def _set_doomed(self, digest: str, at: str) -> None:
        self._execute("INSERT OR REPLACE INTO doomed (digest, at) VALUES (?, ?)", (digest, at))

    # -- manifests ---------------------------------------------------------------------------------------

    def is_live(self, manifest_id: str) -> bool:
        return any(
            self._one(f"SELECT 1 FROM {table} WHERE id = ? LIMIT 1", manifest_id)
            for table in ("versions", "artifacts")
        )

    def _live(self, ids: set[str]) -> set[str]:
        found: set[str] = set()
        for part in batches(ids):
            found.update(
                row[0] for row in self.query(f"SELECT id FROM manifests WHERE id IN ({marks(part)})", part)
            )
        return found

    def _read(self, manifest_id: str, text: str | None = None) -> Manifest | None:
        try:
            if text is None or self._material.knows(manifest_id):
                return self._material.manifest(manifest_id)
            self._parsed[manifest_id] = manifests.parse(text.encode())
            return self._parsed[manifest_id]
        except RegistryError:
            return None

    def _revive(self, record: Record) -> Manifest | None:
        """Let a manifest count."""
        manifest_id, text = record["id"], record.get("manifest")
        _refuse_if(
            text is None and self._is_doomed(manifest_id),
            f"manifest {manifest_id[:12]} was doomed, and its text is not there",
        )
        manifest = self._read(manifest_id, text)
        self._execute("DELETE FROM released WHERE id = ?", (manifest_id,))
        if not self._one("SELECT 1 FROM manifests WHERE id = ?", manifest_id):
            self._insert_manifest(manifest_id, manifest, None)
            self._moved.add(manifest_id)
        if text is not None:
            self._execute("UPDATE manifests SET entry = ? WHERE id = ?", (self._seq, manifest_id))
        return manifest

    def _insert_manifest(self, manifest_id: str, manifest: Manifest | None, seq: int | None) -> None:
        tensors = manifest.tensors if manifest else ()
        size = sum(tensor.size for tensor in {tensor.digest: tensor for tensor in tensors}.values())
        self._execute(
            "INSERT INTO manifests (id, size, tensors, entry) VALUES (?, ?, ?, ?)",
            (manifest_id, min(size, MAX_NUMBER), len(tensors), seq),
        )

    def _release(self, manifest_id: str) -> None:
        """Let a manifest go that neither a version nor an artifact names."""
        if not self.is_live(manifest_id):
            self._execute("DELETE FROM manifests WHERE id = ?", (manifest_id,))
            self._execute("DELETE FROM doomed WHERE digest = ?", (manifest_id,))
            self._execute("INSERT OR IGNORE INTO released (id) VALUES (?)", (manifest_id,))

    # -- versions ----------------------------------------------------------------------------------------

    def _publish(self, record: Record, entry: Entry) -> None:
        manifest_id, model, version = record["id"], record["model"], record["version"]
        _refuse_if(
            self._one("SELECT 1 FROM versions WHERE id = ?", manifest_id) is not None,
            f"{manifest_id[:12]} is a version already",
        )
        instead = record.get("instead")
        if instead is None:
            following = self._next_of(model)
            self.is_unsure = self.is_unsure or bool(record.get("adopted"))
            _refuse_if(version < following, f"{model} has had a version v{version}")
            self._set_next(model, version + 1)
        else:
            freed = self._freed.pop(instead, None)
            _refuse_if(freed != (model, version), f"{model}:v{version} is not what {instead[:12]} was")
        manifest = self._revive(record)
        self._insert_version(manifest_id, model, version, manifest)

    def _insert_version(self, manifest_id: str, model: str, version: int, manifest: Manifest | None) -> None:
        about: Facts = facts.facts_of(manifest) if manifest else facts.UNKNOWN
        self._execute(
            "INSERT INTO versions (id, model, version, created, epoch, step, loss, run, record) "
            "VALUES (:id, :model, :version, :created, :epoch, :step, :loss, :run, :record)",
            {
                "id": manifest_id,
                "model": model,
                "version": version,
                "created": about.created,
                "epoch": about.epoch,
                "step": about.step,
                "loss": about.loss,
                "run": about.run,
                "record": _as_json(about.shown),
            },
        )
        self.connection.executemany(
            "INSERT INTO metrics (id, model, name, value) VALUES (?, ?, ?, ?)",
            ((manifest_id, model, name, value) for name, value in about.metrics.items()),
        )
        self.connection.executemany(
            "INSERT INTO lineage (child, kind, parent) VALUES (?, ?, ?)",
            ((manifest_id, kind, parent) for kind, parent in about.lineage),
        )

    def _remove(self, record: Record, entry: Entry) -> None:
        manifest_id = record["id"]
        model, version = self._version(manifest_id)
        aliases = {row[0] for row in self.query("SELECT name FROM aliases WHERE id = ?", [manifest_id])}
        tags = {row[0] for row in self.query("SELECT name FROM tags WHERE id = ?", [manifest_id])}
        taken = set(record["aliases"]), set(record["tags"])
        _refuse_if(taken != (aliases, tags), f"{model}:v{version} has other aliases or tags")
        self._execute("DELETE FROM versions WHERE id = ?", (manifest_id,))
        self._freed[manifest_id] = (model, version)
        self._release(manifest_id)

    def _version(self, manifest_id: str) -> tuple[str, int]:
        row = self._one("SELECT model, version FROM versions WHERE id = ?", manifest_id)
        _refuse_if(row is None, f"there is no version {manifest_id[:12]}")
        assert row is not None
        return row[0], row[1]

    def _next(self, record: Record, entry: Entry) -> None:
        model, version = record["model"], record["version"]
        _refuse_if(version < self._next_of(model), f"{model} has had a version v{version}")
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

    # -- names -------------------------------------------------------------------------------------------

    def _alias(self, record: Record, entry: Entry) -> None:
        model, alias, manifest_id = record["model"], record["alias"], record["id"]
        _refuse_if(self._version(manifest_id)[0] != model, f"{manifest_id[:12]} is no version of {model}")
        self._unpoint(model, alias, record["was"])
        self._insert_alias(model, alias, manifest_id)

    def _insert_alias(self, model: str, alias: str, manifest_id: str) -> None:
        self._execute("INSERT INTO aliases (model, name, id) VALUES (?, ?, ?)", (model, alias, manifest_id))

    def _unalias(self, record: Record, entry: Entry) -> None:
        self._unpoint(record["model"], record["alias"], record["was"])

    def _unpoint(self, model: str, alias: str, was: str | None) -> None:
        row = self._one("SELECT id FROM aliases WHERE model = ? AND name = ?", model, alias)
        _refuse_if((row[0] if row else None) != was, f"{model}@{alias} points elsewhere")
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
        self._insert_note(record["id"], record["at"], record["text"])

    def _insert_note(self, manifest_id: str, written: str, text: str) -> None:
        self._execute("INSERT INTO notes (id, written, text) VALUES (?, ?, ?)", (manifest_id, written, text))

    def _run(self, record: Record, entry: Entry) -> None:
        name, model, at = record["name"], record["model"], record["at"]
        before = self._one("SELECT model, started FROM runs WHERE name = ?", name)
        _refuse_if(before is not None and before != (model, at), f"there is another run {name}")
        self._execute("DELETE FROM runs WHERE name = ?", (name,))
        self._insert_run(name, model, at, record["record"])

    def _insert_run(self, name: str, model: str, at: str, record: Record) -> None:
        self._execute(
            "INSERT INTO runs (name, model, started, record) VALUES (?, ?, ?, ?)",
            (name, model, at, _as_json(record)),
        )

    # -- artifacts ---------------------------------------------------------------------------------------

    def _artifact(self, record: Record, entry: Entry) -> None:
        key = record["key"]
        before = self._expected_artifact(key, record["was"])
        self._revive(record)
        if before is not None:
            self._execute("DELETE FROM artifacts WHERE key = ?", (key,))
        self._insert_artifact(key, record["id"], record["at"], record["record"])
        if before is not None:
            self._release(before)

    def _insert_artifact(self, key: str, manifest_id: str, at: str, record: Record) -> None:
        self._execute(
            "INSERT INTO artifacts (key, id, created, record) VALUES (?, ?, ?, ?)",
            (key, manifest_id, at, _as_json(record)),
        )

    def _drop_artifact(self, record: Record, entry: Entry) -> None:
        self._expected_artifact(record["key"], record["was"])
        self._execute("DELETE FROM artifacts WHERE key = ?", (record["key"],))
        self._release(record["was"])

    def _expected_artifact(self, key: str, was: str | None) -> str | None:
        row = self._one("SELECT id FROM artifacts WHERE key = ?", key)
        found = row[0] if row else None
        _refuse_if(found != was, f"artifact {key[:12]} is another")
        return found

    # -- damage ------------------------------------------------------------------------------------------

    def _begin(self, record: Record, entry: Entry) -> None:
        """The registry is new."""

    def _adopt(self, record: Record, entry: Entry) -> None:
        """What was lost is accepted as lost; a catalog is made anew behind this."""
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


def _as_json(record: Any) -> str:
    return json.dumps(record, separators=(",", ":"))


def _refuse_if(wrong: bool, problem: str) -> None:
    if wrong:
        raise Refused(problem)
