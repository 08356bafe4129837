"""The copy of the log that a catalog has: its entries, how far it goes, and the manifests that they carry."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from registry.catalog.database import UNREADABLE, Damaged
from registry.catalog.lookups import Query
from registry.log import entries
from registry.log.entries import MAX_LINE, Entry, Record
from registry.log.journal import Journal, Position
from registry.store.errors import Corrupt, RegistryError

if TYPE_CHECKING:
    from registry.log.ledger import Ledger
    from registry.store.manifest import Manifest
    from registry.store.pack import PackInfo
    from registry.store.store import Store


class Material:
    """Manifests and packs for a change: from their files, and manifests also from the log.

    Args:
        text_of: gives the text of a manifest that the log has.
    """

    def __init__(self, store: Store, text_of: Callable[[str], bytes | None] = lambda _: None) -> None:
        self._store = store
        self._text_of = text_of

    def knows(self, manifest_id: str) -> bool:
        """Whether a manifest is at hand, without reading a file."""
        return self._store.just_written(manifest_id) is not None

    def manifest(self, manifest_id: str) -> Manifest:
        """A manifest.

        Raises:
            RegistryError: if it cannot be read.
        """
        found = self._store.just_written(manifest_id)
        return found or self._store.manifest(manifest_id, text_of=self._text_of)

    def find_manifest(self, manifest_id: str) -> Manifest | None:
        """A manifest; None if it cannot be read."""
        try:
            return self.manifest(manifest_id)
        except RegistryError:
            return None

    def tensors_of(self, manifest_id: str) -> Collection[str]:
        """The digests of a manifest's tensors.

        Raises:
            RegistryError: if it cannot be read.
        """
        return self._store.tensors_of(manifest_id, text_of=self._text_of)

    def pack_info(self, digest: str) -> PackInfo:
        """The index of a pack.

        Raises:
            RegistryError: if it cannot be read.
        """
        return self._store.pack_info(digest)


def packed(entry: Entry) -> bytes:
    """The form in which the copy has an entry."""
    return zlib.compress(entry.line, 1)


def copies(connection: sqlite3.Connection) -> Iterator[Entry]:
    """The entries that a catalog has a copy of, as far as it can be read."""
    last = 0
    while True:
        try:
            rows = connection.execute(
                "SELECT seq, entry FROM main.log WHERE seq > ? ORDER BY seq LIMIT 64", (last,)
            ).fetchall()
        except UNREADABLE:
            return
        if not rows:
            return
        for seq, blob in rows:
            if type(seq) is not int or seq <= last:
                return
            last = seq
            with contextlib.suppress(Corrupt):
                entry = entries.parse(_unpacked(blob))
                if entry.seq == seq:
                    yield entry


def records_since(query: Query, after: int, last: int) -> list[Record] | None:
    """What the entries behind a place of the log say, up to another place; None if the copy of one cannot be read."""
    rows = query("SELECT seq, entry FROM log WHERE seq > ? AND seq <= ? ORDER BY seq", [after, last])
    if [row[0] for row in rows] != list(range(after + 1, last + 1)):
        return None
    try:
        return [record for _, blob in rows for record in entries.parse(_unpacked(blob)).records]
    except RegistryError:
        return None


def text_in(connection: sqlite3.Connection, ledger: Ledger | None = None) -> Callable[[str], bytes | None]:
    """A function that gives the text of a manifest from the catalog's copy of the log.

    Args:
        ledger: says which entry carries a manifest; without it the tables do.
    """

    def text(manifest_id: str) -> bytes | None:
        if ledger is not None:
            seq, _ = ledger.texts.get(manifest_id, (None, None))
        else:
            rows = connection.execute("SELECT entry FROM manifests WHERE id = ?", (manifest_id,)).fetchall()
            seq = rows[0][0] if rows else None
        row = connection.execute("SELECT entry FROM log WHERE seq = ?", (seq,)).fetchone()
        return _text_of(row[0], manifest_id) if row else None

    return text


def head(connection: sqlite3.Connection) -> tuple[int, str, Position]:
    """Number and digest of the last entry that the catalog has, and where the log ends behind it.

    Raises:
        Damaged: if the catalog does not say.
    """
    found = dict(connection.execute("SELECT key, value FROM state").fetchall())
    try:
        end = Position(int(found["segment"]), int(found["offset"]))
        if int(found["seq"]) < 0 or end.segment < 1 or end.offset < 0:
            raise ValueError
        return int(found["seq"]), found["digest"], end
    except (KeyError, ValueError, TypeError):
        raise Damaged(
            "the catalog does not say how much of the log it holds", "run: registry rebuild"
        ) from None


def is_behind(connection: sqlite3.Connection, journal: Journal) -> bool:
    """Whether the log has entries that the catalog lacks, or is not the log that the catalog follows."""
    seq, digest, end = head(connection)
    if not journal.ends_at(end, seq):
        return True
    return seq > 0 and journal.digest_before(end) != digest


def state(connection: sqlite3.Connection, key: str) -> str | None:
    """What the catalog says of itself under a key."""
    row = connection.execute("SELECT value FROM state WHERE key = ?", (key,)).fetchone()
    return None if row is None else str(row[0])


def gaps_in(text: Any) -> list[str]:
    """The gaps of the log that a catalog names, in words.

    Args:
        text: a list of them as JSON, from the table `state`.

    Raises:
        Damaged: if it is anything else.
    """
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        found = None
    if not isinstance(found, list) or not found or not all(isinstance(gap, str) for gap in found):
        raise Damaged("the catalog does not say what is lost of the log", "run: registry rebuild")
    return found


def not_before(journal: Journal, gap: object) -> Corrupt:
    """The error of a change that comes before a user has accepted that entries are lost."""
    advice = "nothing can be changed before: registry rebuild --adopt"
    return Corrupt(f"{journal.folder}: {gap}", advice)


def _unpacked(blob: Any) -> bytes:
    if not isinstance(blob, bytes):
        raise Corrupt("it is not what was written")
    try:
        return zlib.decompressobj().decompress(blob, MAX_LINE)
    except zlib.error:
        raise Corrupt("it is not what was written") from None


def _text_of(blob: Any, manifest_id: str) -> bytes | None:
    """The text of a manifest in the copy of an entry."""
    try:
        records: Iterable[Record] = entries.parse(_unpacked(blob)).records
    except Corrupt:
        return None
    for record in records:
        if record.get("id") == manifest_id and isinstance(record.get("manifest"), str):
            return str(record["manifest"]).encode()
    return None
