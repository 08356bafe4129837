"""One transaction of the catalog: how each journal record changes the tables.

The same code applies a record when it is made, when a catalog catches up after a crash, and when it is rebuilt.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from registry.reference import check_run_name
from registry.store.errors import Corrupt, NotFound, RegistryError, Unsupported
from registry.store.location import Location
from registry.store.manifest import Manifest
from registry.store.pack import PackInfo, read_pack_info
from registry.store.store import Store
from registry.store.text import quoted
from registry.versions import best_id

_BATCH = 500
USERS = "SELECT u.id FROM uses u JOIN packs p ON p.number = u.pack WHERE p.digest = ?"
"""The manifests that rely on a pack."""


class Stale(RegistryError):
    """Something that a save relied on has changed meanwhile; the save looks again. Never reaches users."""


def locate(connection: sqlite3.Connection, digests: Collection[str]) -> dict[str, Location]:
    found = {}
    wanted = list(digests)
    for start in range(0, len(wanted), _BATCH):
        part = wanted[start : start + _BATCH]
        rows = connection.execute(
            "SELECT t.digest, p.digest, t.start, p.size, t.base, t.coded FROM tensors t "
            "JOIN packs p ON p.number = t.pack "
            f"WHERE t.digest IN ({','.join('?' * len(part))})",
            part,
        )
        found.update({row[0]: Location(*row[1:]) for row in rows})
    return found


class Taken(Stale):
    """Another version has the id already: equal values, saved at the same instant. Never reaches users."""


class Change:
    """One transaction: applies records to the tables and remembers them for the journal."""

    def __init__(self, connection: sqlite3.Connection, store: Store) -> None:
        self.connection = connection
        self.records: list[Mapping[str, Any]] = []
        self._store = store
        self._manifests: dict[str, Manifest] = {}

    def apply(self, record: Mapping[str, Any]) -> None:
        """Apply a record and keep it for the journal.

        Raises:
            Unsupported: if a newer version wrote it.
            Corrupt: if it, or the manifest that it names, lacks what it should have.
        """
        method = _OPERATIONS.get(record.get("op", ""))
        if method is None:
            raise Unsupported(
                f"the journal holds the operation {quoted(str(record.get('op')))}, which a newer version wrote; upgrade "
                "with: pip install -U torch-registry"
            )
        try:
            method(self, record)
        except (KeyError, TypeError, AttributeError) as error:
            raise Corrupt(
                f"a journal line or manifest is malformed ({error!r}): {quoted(json.dumps(record))}"
            ) from None
        self.records.append(record)

    def publish(self, id: str, model: str) -> int:
        """Make a manifest the next version of a model.

        Raises:
            Taken: if it is a version already.
        """
        if self.connection.execute("SELECT 1 FROM versions WHERE id = ?", (id,)).fetchone():
            raise Taken(f"{id[:12]} is a version already")
        row = self.connection.execute("SELECT next_version FROM models WHERE name = ?", (model,)).fetchone()
        version = int(row[0]) if row else 1
        ((newest,),) = self.connection.execute("SELECT MAX(version) FROM versions WHERE model = ?", (model,))
        if newest is not None and newest >= version:
            raise Corrupt(
                f"the catalog says that the next version of {model} is v{version}, but it has v{newest} already; "
                "recreate it with: registry rebuild"
            )
        self.apply({"op": "publish", "id": id, "model": model, "version": version})
        return version

    def point_to_best(self, model: str, metric: str, *, smallest: bool) -> None:
        """Move the alias `best` to the version with the best value; NaN never wins, of equals the earlier does."""

        def query(sql: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
            return self.connection.execute(sql, parameters).fetchall()

        id = best_id(query, model, metric, smallest=smallest)
        row = self.connection.execute(
            "SELECT id FROM aliases WHERE model = ? AND name = 'best'", (model,)
        ).fetchone()
        if id and (row is None or row[0] != id):
            self.apply({"op": "alias", "model": model, "alias": "best", "id": id})

    def use(self, id: str, manifest: Manifest, packs: Sequence[PackInfo], *, strict: bool) -> None:
        """Register a manifest and the new packs that came with it.

        Args:
            strict: also ask that no tensor of the new packs was stored by somebody else meanwhile.

        Raises:
            Stale: if a pack that the manifest relies on is not there any more.
        """
        self._manifests[id] = manifest
        needed = {tensor.digest for tensor in manifest.tensors}
        found = locate(self.connection, needed.union(*(pack.places for pack in packs)))
        for pack in packs:
            own = pack.places
            elsewhere = [
                found[digest] for digest in own if digest in found and found[digest].pack != pack.digest
            ]
            broken = {
                location.pack
                for location in elsewhere
                if location.pack in self._store.distrusted
                or not self._store.pack_is_whole(location.pack, location.pack_size)
            }
            if strict and any(location.pack not in broken for location in elsewhere):
                raise Stale("tensors of this save were stored meanwhile")
            self.add_pack(pack, replace=broken)
            found.update(locate(self.connection, own) if elsewhere else own)
        located = {digest: found[digest] for digest in needed if digest in found}
        bases = self._bases(located)
        relied_on = {place.pack: place.pack_size for place in (*located.values(), *bases.values())}
        if len(located) < len(needed) or not self._store.has(id):
            raise Stale("tensors or the manifest of this save were removed meanwhile")
        for name, size in relied_on.items():
            if not self._store.pack_is_whole(name, size):
                raise Stale("a pack that this save relied on was removed meanwhile")
        total = sum(tensor.size for tensor in {tensor.digest: tensor for tensor in manifest.tensors}.values())
        self.connection.execute(
            "INSERT INTO manifests (id, size, tensors) VALUES (?, ?, ?) ON CONFLICT (id) DO NOTHING",
            (id, total, len(manifest.tensors)),
        )
        for name in relied_on:
            self.connection.execute(
                "INSERT INTO uses (id, pack) SELECT ?, number FROM packs WHERE digest = ? "
                "ON CONFLICT (id, pack) DO NOTHING",
                (id, name),
            )
            self.connection.execute("UPDATE packs SET condemned = NULL WHERE digest = ?", (name,))

    def _bases(self, located: Mapping[str, Location]) -> dict[str, Location]:
        """Where the tensors lie that others are stored as differences from.

        Raises:
            Stale: if one is not there.
        """
        found: dict[str, Location] = {}
        wanted = {place.base for place in located.values() if place.base}
        while wanted:
            new = locate(self.connection, wanted)
            if len(new) < len(wanted):
                raise Stale("a tensor that others are differences from was removed meanwhile")
            found.update(new)
            wanted = {place.base for place in new.values() if place.base} - set(found)
        return found

    def add_pack(self, pack: PackInfo, *, replace: Collection[str], damaged: bool = True) -> None:
        """Register a pack; its tensors keep an earlier location unless that is in a pack to `replace`.

        Args:
            damaged: whether those to replace are; if not, gc leaves them to who reads them for a while.
        """
        execute = self.connection.execute
        execute(
            "INSERT INTO packs (number, digest, size) SELECT COALESCE(MAX(number), 0) + 1, ?, ? FROM packs "
            "WHERE 1 = 1 ON CONFLICT (digest) DO NOTHING",
            (pack.digest, pack.size),
        )
        execute("DELETE FROM doomed WHERE digest = ?", (pack.digest,))
        (number,) = execute("SELECT number FROM packs WHERE digest = ?", (pack.digest,)).fetchone()
        rows = [(one.digest, number, one.start, one.base, one.coded) for one in pack.tensors]
        insert = (
            "INSERT INTO tensors (digest, pack, start, base, coded) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (digest) DO UPDATE SET pack = excluded.pack, start = excluded.start, "
            "base = excluded.base, coded = excluded.coded "
        )
        better = "(tensors.base IS NOT NULL AND excluded.base IS NULL)"  # it needs no other tensor
        if replace:
            for broken in replace:
                execute(
                    "INSERT INTO uses (id, pack) SELECT u.id, ? FROM uses u JOIN packs p ON p.number = u.pack "
                    "WHERE p.digest = ? ON CONFLICT (id, pack) DO NOTHING",
                    (number, broken),
                )
            marks = ",".join("?" * len(replace))
            old = [
                row[0] for row in execute(f"SELECT number FROM packs WHERE digest IN ({marks})", [*replace])
            ]
            in_old = f"pack IN ({','.join(map(str, old))})"
            better += f" OR tensors.{in_old} OR tensors.base IN (SELECT digest FROM tensors AS other WHERE {in_old})"
        for start in range(
            0, len(rows), _BATCH
        ):  # who needs a tensor that moves needs the pack that it moves to
            part = rows[start : start + _BATCH]
            execute(
                "INSERT INTO uses (id, pack) SELECT DISTINCT u.id, ? FROM tensors t JOIN uses u ON u.pack = t.pack "
                f"WHERE t.base IS NOT NULL AND t.digest IN ({','.join('?' * len(part))}) "
                "ON CONFLICT (id, pack) DO NOTHING",
                (number, *(row[0] for row in part)),
            )
        self.connection.executemany(f"{insert} WHERE {better}", rows)
        if damaged:
            for broken in replace:
                self._drop_if_empty(broken)

    def can_replace(self, old: str, new: PackInfo, users: Collection[str]) -> bool:
        """Whether a pack that was made from another one can still take its place.

        Args:
            users: ids of the manifests that relied on the old one when the new one was made.
        """
        execute = self.connection.execute
        if not self._store.pack_is_whole(new.digest, new.size):  # gc, to which it was nobody's, has taken it
            return False
        if new.digest == old or {row[0] for row in execute(USERS, (old,))} != users:
            return False
        bases = {tensor.base for tensor in new.tensors if tensor.base}
        located = locate(self.connection, bases)
        own = {tensor.digest: tensor for tensor in new.tensors}
        for base in bases:
            place = located.get(base)
            if place is None or (base in own and own[base].base) or (place.base and base not in own):
                return False
            if not self._store.pack_is_whole(place.pack, place.pack_size):
                return False
        differences = [tensor.digest for tensor in new.tensors if tensor.base]
        known = locate(self.connection, differences)
        return not any(
            known[digest].base is None
            and execute("SELECT 1 FROM tensors WHERE base = ? LIMIT 1", (digest,)).fetchone()
            for digest in differences
            if digest in known
        )

    def replace_pack(self, old: str, new: PackInfo) -> None:
        """Let everything that relies on one pack rely on another, which holds all of it that is still needed."""
        self.add_pack(new, replace={old}, damaged=False)
        execute = self.connection.execute
        execute("DELETE FROM uses WHERE pack = (SELECT number FROM packs WHERE digest = ?)", (old,))
        execute(
            "INSERT INTO uses (id, pack) SELECT u.id, b.pack FROM packs p JOIN uses u ON u.pack = p.number "
            "JOIN tensors t ON t.pack = p.number JOIN tensors b ON b.digest = t.base WHERE p.digest = ? "
            "ON CONFLICT (id, pack) DO NOTHING",
            (new.digest,),
        )

    def _drop_if_empty(self, pack: str) -> None:
        """Forget a damaged pack once all of its tensors are stored elsewhere."""
        execute = self.connection.execute
        (number,) = execute("SELECT number FROM packs WHERE digest = ?", (pack,)).fetchone()
        if not execute("SELECT 1 FROM tensors WHERE pack = ? LIMIT 1", (number,)).fetchone():
            execute("DELETE FROM uses WHERE pack = ?", (number,))
            execute("DELETE FROM packs WHERE number = ?", (number,))
            execute("INSERT INTO doomed (digest) VALUES (?) ON CONFLICT (digest) DO NOTHING", (pack,))

    # -- records -----------------------------------------------------------------------------------------

    def _publish(self, record: Mapping[str, Any]) -> None:
        id, model, version = record["id"], record["model"], record["version"]
        execute = self.connection.execute
        if execute("SELECT 1 FROM versions WHERE id = ?", (id,)).fetchone():
            return
        execute(  # first, so that the number is not given again even if the manifest is gone
            "INSERT INTO models (name, next_version) VALUES (?, ?) ON CONFLICT (name) DO UPDATE "
            "SET next_version = CASE WHEN excluded.next_version > models.next_version "
            "THEN excluded.next_version ELSE models.next_version END",
            (model, version + 1),
        )
        manifest = self._manifests.get(id) or self._store.manifest(id)
        self._use_unless_used(id, manifest)
        about = manifest.record
        if execute("SELECT 1 FROM versions WHERE model = ? AND version = ?", (model, version)).fetchone():
            raise Corrupt(f"the journal publishes {model}:v{version} twice, under different ids")
        shown = {key: about[key] for key in about if key not in ("epoch", "step", "loss", "metrics", "dcp")}
        shown["components"] = manifest.contents
        if _number(about.get("loss")) != about.get("loss"):
            shown["loss_is_nan"] = True
        execute(
            "INSERT INTO versions (id, model, version, created, epoch, step, loss, run, record) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(id, model, version, about["created"], about.get("epoch"), about.get("step")),
                *(_number(about.get("loss")), about.get("run"), json.dumps(shown, separators=(",", ":"))),
            ),
        )
        for name, value in about.get("metrics", {}).items():
            execute(
                "INSERT INTO metrics (id, model, name, value) VALUES (?, ?, ?, ?)",
                (id, model, name, _number(value)),
            )
        for edge in about.get("lineage", []):
            execute(
                "INSERT INTO lineage (child, kind, parent) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (id, edge["kind"], edge["parent"]),
            )

    def _use_unless_used(self, id: str, manifest: Manifest) -> None:
        if not self.connection.execute("SELECT 1 FROM manifests WHERE id = ?", (id,)).fetchone():
            self._read_unknown_packs(manifest)
            try:
                self.use(id, manifest, (), strict=False)
            except Stale:
                raise NotFound(f"checkpoint {id[:12]} lacks tensors") from None

    def _read_unknown_packs(self, manifest: Manifest) -> None:
        """When catching up: register the packs that a crash kept out of the catalog."""
        digests = {tensor.digest for tensor in manifest.tensors}
        if len(locate(self.connection, digests)) == len(digests):
            return
        known = {
            row[0]
            for row in self.connection.execute("SELECT digest FROM packs UNION SELECT digest FROM doomed")
        }
        for name in self._store.pack_digests():
            if name not in known:
                with contextlib.suppress(Corrupt):
                    self.add_pack(read_pack_info(self._store.pack_path(name)), replace=())

    def _remove(self, record: Mapping[str, Any]) -> None:
        self.connection.execute("DELETE FROM versions WHERE id = ?", (record["id"],))
        self._release(record["id"])

    def _release(self, id: str) -> None:
        """Forget a manifest that neither a version nor an artifact names."""
        execute = self.connection.execute
        for table in ("versions", "artifacts"):
            if execute(f"SELECT 1 FROM {table} WHERE id = ? LIMIT 1", (id,)).fetchone():
                return
        execute("DELETE FROM manifests WHERE id = ?", (id,))

    def _next(self, record: Mapping[str, Any]) -> None:
        self.connection.execute(
            "INSERT INTO models (name, next_version) VALUES (?, ?) "
            "ON CONFLICT (name) DO UPDATE SET next_version = excluded.next_version",
            (record["model"], record["version"]),
        )

    def _alias(self, record: Mapping[str, Any]) -> None:
        self._require(record["id"])
        self.connection.execute(
            "INSERT INTO aliases (model, name, id) VALUES (?, ?, ?) "
            "ON CONFLICT (model, name) DO UPDATE SET id = excluded.id",
            (record["model"], record["alias"], record["id"]),
        )

    def _unalias(self, record: Mapping[str, Any]) -> None:
        self.connection.execute(
            "DELETE FROM aliases WHERE model = ? AND name = ?", (record["model"], record["alias"])
        )

    def _tag(self, record: Mapping[str, Any]) -> None:
        self._require(record["id"])
        self.connection.execute(
            "INSERT INTO tags (id, name) VALUES (?, ?) ON CONFLICT DO NOTHING", (record["id"], record["tag"])
        )

    def _untag(self, record: Mapping[str, Any]) -> None:
        self.connection.execute("DELETE FROM tags WHERE id = ? AND name = ?", (record["id"], record["tag"]))

    def _note(self, record: Mapping[str, Any]) -> None:
        self._require(record["id"])
        values = (record["id"], record["at"], record["text"])
        if not self.connection.execute(
            "SELECT 1 FROM notes WHERE id = ? AND written = ? AND text = ?", values
        ).fetchone():
            self.connection.execute("INSERT INTO notes (id, written, text) VALUES (?, ?, ?)", values)

    def _run(self, record: Mapping[str, Any]) -> None:
        check_run_name(record["name"])
        self.connection.execute(
            "INSERT INTO runs (name, model, started, record) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (name) DO UPDATE SET record = excluded.record",
            (
                record["name"],
                record["model"],
                record["at"],
                _compact(record["record"]),
            ),
        )

    def _artifact(self, record: Mapping[str, Any]) -> None:
        self._use_unless_used(record["id"], self._store.manifest(record["id"]))
        self.connection.execute(
            "INSERT INTO artifacts (key, id, created, record) VALUES (?, ?, ?, ?) ON CONFLICT (key) DO UPDATE "
            "SET id = excluded.id, created = excluded.created, record = excluded.record",
            (record["key"], record["id"], record["at"], _compact(record.get("record", {}))),
        )

    def _drop_artifact(self, record: Mapping[str, Any]) -> None:
        row = self.connection.execute("SELECT id FROM artifacts WHERE key = ?", (record["key"],)).fetchone()
        self.connection.execute("DELETE FROM artifacts WHERE key = ?", (record["key"],))
        if row:
            self._release(row[0])

    def _require(self, id: str) -> None:
        if not self.connection.execute("SELECT 1 FROM versions WHERE id = ?", (id,)).fetchone():
            raise NotFound(f"there is no checkpoint {id[:12]} any more")


_OPERATIONS: dict[str, Callable[[Change, Mapping[str, Any]], None]] = {
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
}


def _compact(record: Any) -> str:
    return json.dumps(record, separators=(",", ":"))


def _number(value: Any) -> float | None:
    """A number for the catalog; NaN is kept out so that it never sorts as best (the manifest has it exactly)."""
    return float(value) if isinstance(value, int | float) and value == value else None
