"""Packs in the catalog: where each tensor lies, and which manifest needs which pack.

Both follow from the manifests and the packs that count, and from nothing else. `uses` says it once, for any manifests;
a step that moves tensors asks it again for those who need the packs concerned.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from registry.catalog.lookups import batches, locate, marks
from registry.store.errors import RegistryError
from registry.store.locating import Location
from registry.store.pack import PackInfo


class Contents(Protocol):
    """What is in packs and manifests, by their names; the same whenever it is asked."""

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
    """The tables of packs, tensors and uses, inside a transaction."""

    def __init__(self, connection: sqlite3.Connection, contents: Contents) -> None:
        self._connection = connection
        self._contents = contents

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return self._connection.execute(sql, parameters).fetchall()

    def add(self, digest: str, size: int, *, number: int, differences: bool, damaged: bool = False) -> None:
        """Let a pack count; nobody's uses are brought up to date."""
        self._connection.execute(
            "INSERT INTO packs (number, digest, size, differences, damaged) VALUES (?, ?, ?, ?, ?)",
            (number, digest, size, int(differences), int(damaged)),
        )
        try:
            info = self._contents.pack_info(digest)
        except RegistryError:  # Damaged or gone: verify names it. Its tensors have no place in it.
            return
        rows = [(name, number, place.start, place.base, place.coded) for name, place in info.places.items()]
        self._connection.executemany(
            "INSERT INTO tensors (digest, pack, start, base, coded) VALUES (?, ?, ?, ?, ?)", rows
        )

    def number_of(self, digest: str) -> int | None:
        """The number of a pack that counts."""
        rows = self.query("SELECT number FROM packs WHERE digest = ?", [digest])
        return rows[0][0] if rows else None

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

    def located(self, digests: Collection[str]) -> dict[str, Location]:
        """Where tensors lie, and where those lie that they are stored as differences from."""
        found = locate(self.query, digests)
        wanted = {place.base for place in found.values() if place.base} - set(found)
        while wanted:
            new = locate(self.query, wanted)
            found.update(new)
            wanted = {place.base for place in new.values() if place.base} - set(found)
        return found

    def derive_uses(self, manifest_ids: Iterable[str]) -> None:
        """Bring up to date which packs some manifests need."""
        for manifest_id in sorted(manifest_ids):
            self._connection.execute("DELETE FROM uses WHERE id = ?", (manifest_id,))
            try:
                digests = self._contents.tensors_of(manifest_id)
            except RegistryError:  # Damaged or gone: verify names it.
                continue
            packs = sorted({place.pack for place in self.located(digests).values()})
            for part in batches(packs):
                self._connection.execute(
                    f"INSERT INTO uses (id, pack) SELECT ?, number FROM packs WHERE digest IN ({marks(part)})",
                    [manifest_id, *part],
                )

    def moved(self, before: Mapping[str, Location], digests: Collection[str]) -> set[str]:
        """The manifests that needed a pack in which one of some tensors lay, and does not any more."""
        after = locate(self.query, digests)
        left = {place.pack for digest, place in before.items() if after.get(digest) != place}
        return self.users(left)
