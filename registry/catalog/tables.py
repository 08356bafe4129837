"""The tables, inside a transaction: the rows of versions and their names, and those of packs with what follows from them.

Where each tensor lies, and which manifest needs which pack, follow from the manifests and the packs that count, and from
nothing else. `Packs.derive_uses` derives it, for any manifests. A step that moves tensors calls it again for the
manifests that need the packs concerned, or have lacked these tensors.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from registry.catalog.copies import Material
from registry.catalog.lookups import batches, locate, marks
from registry.log import facts
from registry.log.entries import MAX_NUMBER, Record
from registry.log.facts import Facts
from registry.log.ledger import Ledger
from registry.log.refusals import refuse_if
from registry.store.errors import RegistryError, Unsupported
from registry.store.locating import Location
from registry.store.manifest import Manifest
from registry.store.pack import PackInfo


class Contents(Protocol):
    """Gives what packs and manifests hold, by digest; the same whenever it is asked."""

    def pack_info(self, digest: str) -> PackInfo:
        """The index of a pack.

        Raises:
            RegistryError: if it cannot be read.
        """
        ...

    def tensors_of(self, manifest_id: str) -> Collection[str]:
        """The digests of a manifest's tensors.

        Raises:
            RegistryError: if it cannot be read.
        """
        ...


class Packs:
    """The tables of packs, of tensors, and of what manifests need.

    Attributes:
        dropped: packs that do not count any more, with their tensors and the manifests that needed them before.
        moved: manifests whose tensors lie elsewhere now, or have become known.
    """

    def __init__(self, connection: sqlite3.Connection, contents: Contents) -> None:
        self._connection = connection
        self._contents = contents
        self.dropped: list[tuple[str, frozenset[str], frozenset[str]]] = []
        self.moved: set[str] = set()
        self._places: dict[str, Location] = {}

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query that only reads."""
        return self._connection.execute(sql, parameters).fetchall()

    def add(self, digest: str, size: int, *, number: int, differences: bool, damaged: bool = False) -> None:
        """Let a pack count. What manifests need is not brought up to date."""
        self._connection.execute(
            "INSERT INTO packs (number, digest, size, differences, damaged) VALUES (?, ?, ?, ?, ?)",
            (number, digest, size, int(differences), int(damaged)),
        )
        try:
            info = self._contents.pack_info(digest)
        except Unsupported:
            # A newer program wrote it, and this one would take its tensors for lost.
            raise
        except RegistryError:
            # Damaged or gone: verify names it. Its tensors have no place in it.
            return
        for name in info.places:
            self._places.pop(name, None)
        # Sorted as the table is, rows go side by side, not each to a page of its own.
        rows = sorted(
            (name, number, place.start, place.base, place.coded) for name, place in info.places.items()
        )
        self._connection.executemany(
            "INSERT INTO tensors (digest, pack, start, base, coded) VALUES (?, ?, ?, ?, ?)", rows
        )

    def number_of(self, digest: str) -> int | None:
        """The number of a pack that counts."""
        rows = self.query("SELECT number FROM packs WHERE digest = ?", [digest])
        return rows[0][0] if rows else None

    def live(self, digest: str) -> int:
        """The number of a pack that has to count.

        Raises:
            Refused: if it does not.
        """
        number = self.number_of(digest)
        refuse_if(number is None, f"there is no pack {digest[:12]}")
        assert number is not None
        return number

    def drop(self, digest: str) -> None:
        """Let a pack count no more, and add its users to `moved`.

        Raises:
            Refused: if it does not count.
        """
        number, users = self.live(digest), self.users([digest])
        self.dropped.append((digest, frozenset(self.tensors_in(number)), frozenset(users)))
        self.moved |= users
        self.forget()
        self._connection.execute("DELETE FROM packs WHERE number = ?", (number,))

    def set_damaged(self, digest: str) -> None:
        """Mark a pack as damaged, and add its users to `moved`.

        Raises:
            Refused: if it does not count.
        """
        number = self.live(digest)
        self.forget()
        self._connection.execute("UPDATE packs SET damaged = 1 WHERE number = ?", (number,))
        self.moved |= self.users([digest])

    def tensors_in(self, number: int) -> list[str]:
        """The digests of the tensors that a pack has."""
        return [row[0] for row in self.query("SELECT digest FROM tensors WHERE pack = ?", [number])]

    def users(self, packs: Iterable[str]) -> set[str]:
        """The manifests that need one of some packs."""
        found: set[str] = set()
        for part in batches(packs):
            found.update(
                row[0]
                for row in self.query(
                    "SELECT u.id FROM uses u JOIN packs p ON p.number = u.pack "
                    f"WHERE p.digest IN ({marks(part)})",
                    part,
                )
            )
        return found

    def lacking(self, tensors: Iterable[str]) -> set[str]:
        """The manifests that need one of some tensors which no pack was known to have."""
        if not self.query("SELECT 1 FROM lacks LIMIT 1"):
            return set()
        return {
            row[0]
            for part in batches(tensors)
            for row in self.query(f"SELECT id FROM lacks WHERE digest IN ({marks(part)})", part)
        }

    def locate(self, digests: Collection[str]) -> dict[str, Location]:
        """Where tensors lie. A commit asks several times, so it is remembered until a pack has them, too, goes or is damaged."""
        places = self._places
        places.update(locate(self.query, [digest for digest in digests if digest not in places]))
        return {digest: places[digest] for digest in digests if digest in places}

    def forget(self) -> None:
        """The tables of packs and tensors are about to change, or have been changed by others."""
        self._places.clear()

    def located(self, digests: Collection[str]) -> dict[str, Location]:
        """Where tensors lie, and where the tensors lie that they are stored as differences from."""
        found = self.locate(digests)
        wanted = {place.base for place in found.values() if place.base} - set(found)
        while wanted:
            new = self.locate(wanted)
            found.update(new)
            wanted = {place.base for place in new.values() if place.base} - set(found)
        return found

    def derive_uses(self, manifest_ids: Iterable[str]) -> None:
        """Bring up to date which packs some manifests need."""
        for manifest_id in sorted(manifest_ids):
            for table in ("uses", "lacks"):
                self._connection.execute(f"DELETE FROM {table} WHERE id = ?", (manifest_id,))
            try:
                digests = self._contents.tensors_of(manifest_id)
            except RegistryError:
                # Damaged or gone: verify names it.
                continue
            found = self.located(digests)
            bases = {place.base for place in found.values() if place.base}
            self._connection.executemany(
                "INSERT INTO lacks (digest, id) VALUES (?, ?)",
                ((digest, manifest_id) for digest in sorted({*digests, *bases} - found.keys())),
            )
            packs = sorted({place.pack for place in found.values()})
            for part in batches(packs):
                self._connection.execute(
                    f"INSERT INTO uses (id, pack) SELECT ?, number FROM packs WHERE digest IN ({marks(part)})",
                    [manifest_id, *part],
                )

    def users_left(self, before: Mapping[str, Location]) -> set[str]:
        """The manifests that need a pack from which one of some tensors has moved.

        Args:
            before: where the tensors lay, by digest.
        """
        after = self.locate(before)
        left = {place.pack for digest, place in before.items() if after.get(digest) != place}
        return self.users(left)


class Rows:
    """The rows of versions, of what they are called, of runs and of artifacts."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def set_state(self, key: str, value: str | int) -> None:
        """Set what the catalog says of itself under a key."""
        self._execute("INSERT OR REPLACE INTO state (key, value) VALUES (?, ?)", (key, str(value)))

    def add_manifest(self, manifest_id: str, manifest: Manifest | None, seq: int | None) -> None:
        """Let a manifest count.

        Args:
            manifest: None if it cannot be read.
            seq: number of the entry that carries its text, if one does.
        """
        tensors = manifest.tensors if manifest else ()
        size = sum(tensor.size for tensor in {tensor.digest: tensor for tensor in tensors}.values())
        self._execute(
            "INSERT INTO manifests (id, size, tensors, entry) VALUES (?, ?, ?, ?)",
            (manifest_id, min(size, MAX_NUMBER), len(tensors), seq),
        )

    def add_version(self, manifest_id: str, *, model: str, version: int, manifest: Manifest | None) -> None:
        """Let a manifest be a version of a model."""
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
        self._connection.executemany(
            "INSERT INTO metrics (id, model, name, value) VALUES (?, ?, ?, ?)",
            ((manifest_id, model, name, value) for name, value in about.metrics.items()),
        )
        self._connection.executemany(
            "INSERT INTO lineage (child, kind, parent) VALUES (?, ?, ?)",
            ((manifest_id, kind, parent) for kind, parent in about.lineage),
        )

    def add_alias(self, model: str, alias: str, manifest_id: str) -> None:
        """Let an alias point at a version."""
        self._execute("INSERT INTO aliases (model, name, id) VALUES (?, ?, ?)", (model, alias, manifest_id))

    def add_note(self, manifest_id: str, written: str, text: str) -> None:
        """Attach a note to a version."""
        self._execute("INSERT INTO notes (id, written, text) VALUES (?, ?, ?)", (manifest_id, written, text))

    def add_run(self, name: str, *, model: str, at: str, record: Record) -> None:
        """Add a run."""
        self._execute(
            "INSERT INTO runs (name, model, started, record) VALUES (?, ?, ?, ?)",
            (name, model, at, _as_json(record)),
        )

    def add_artifact(self, key: str, *, manifest_id: str, at: str, record: Record) -> None:
        """Let a manifest be the artifact under a key."""
        self._execute(
            "INSERT INTO artifacts (key, id, created, record) VALUES (?, ?, ?, ?)",
            (key, manifest_id, at, _as_json(record)),
        )

    def _execute(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any]) -> None:
        self._connection.execute(sql, parameters)


def fill(connection: sqlite3.Connection, ledger: Ledger, material: Material) -> None:
    """Fill empty tables with what follows from the log."""
    rows, packs = Rows(connection), Packs(connection, material)
    connection.executemany(
        "INSERT INTO models (name, next_version, next_again) VALUES (?, ?, ?)",
        ((name, number, number) for name, number in ledger.next.items()),
    )
    for name, (model, at, record) in ledger.runs.items():
        rows.add_run(name, model=model, at=at, record=record)
    for digest, pack in ledger.packs.items():
        packs.add(
            digest,
            pack.size,
            number=pack.number,
            differences=pack.differences,
            damaged=pack.damaged,
        )
    for manifest_id in ledger.live_manifests():
        manifest = material.find_manifest(manifest_id)
        seq, _ = ledger.texts.get(manifest_id, (None, None))
        rows.add_manifest(manifest_id, manifest, seq)
        if manifest_id in ledger.versions:
            model, version = ledger.versions[manifest_id]
            rows.add_version(manifest_id, model=model, version=version, manifest=manifest)
    for (model, name), manifest_id in ledger.aliases.items():
        rows.add_alias(model, name, manifest_id)
    connection.executemany(
        "INSERT INTO tags (id, name) VALUES (?, ?)",
        ((manifest_id, tag) for manifest_id, tags in ledger.tags.items() for tag in sorted(tags)),
    )
    for manifest_id, notes in ledger.notes.items():
        for written, text in notes:
            rows.add_note(manifest_id, written, text)
    for key, (manifest_id, at, record) in ledger.artifacts.items():
        rows.add_artifact(key, manifest_id=manifest_id, at=at, record=record)
    connection.executemany(
        "INSERT INTO released (id) VALUES (?)", ((manifest_id,) for manifest_id in ledger.released)
    )
    connection.executemany("INSERT INTO doomed (digest, at) VALUES (?, ?)", ledger.doomed.items())
    rows.set_state("packs", ledger.pack_count)
    packs.derive_uses(ledger.live_manifests())


def _as_json(record: Any) -> str:
    return json.dumps(record, separators=(",", ":"))
