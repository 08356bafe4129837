"""The journal: one line for each change to the catalog, beside the manifests.

A change is written here, durably, in the same exclusive transaction that applies it to the catalog. So the
journal is a redo log: a catalog that is behind it (a crash between the two, a restored backup) catches up, and a
lost one is rebuilt from it and the manifests. A line is JSON, a tab, and 16 hex digits of the JSON's digest. What
happens wholly or not at all stands in one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

NAME = "journal.jsonl"
_CHECK = 16


class Line(NamedTuple):
    """A record of the journal; None where its line is damaged. `end` is the offset behind the line."""

    record: dict[str, Any] | None
    end: int


class Journal:
    """An append-only file of checked lines."""

    def __init__(self, manifests: Path) -> None:
        self.path = manifests / NAME

    def size(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add what one change did as one line, durably; on an error the journal is as before."""
        from registry.store import durable

        data = _line(records[0] if len(records) == 1 else {"op": "all", "records": records})
        if not self._ends_in_newline():
            data = b"\n" + data
        durable.append(self.path, data)

    def truncate(self, size: int) -> None:
        from registry.store import durable

        durable.truncate(self.path, size)

    def drop_torn_end(self, start: int) -> None:
        """Cut off a last line, not before `start`, that a crash kept from being written whole."""
        if self._ends_in_newline():
            return
        with self.path.open("rb") as file:
            file.seek(start)
            rest = file.read()
        self.truncate(start + rest.rfind(b"\n") + 1)

    def read(self, start: int = 0) -> Iterator[Line]:
        """The records from an offset on; lines that are damaged are marked, not raised."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(start)
            for raw in file:
                start += len(raw)
                if raw.strip():
                    for record in _parsed(raw):
                        yield Line(record, start)

    def _ends_in_newline(self) -> bool:
        size = self.size()
        if not size:
            return True
        with self.path.open("rb") as file:
            file.seek(size - 1)
            return file.read(1) == b"\n"


def now() -> str:
    """The time as records have it: in UTC, ISO 8601, to the microsecond."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return text + b"\t" + _check_of(text) + b"\n"


def _check_of(text: bytes) -> bytes:
    from registry.store.digest import digest

    return digest(text)[:_CHECK].encode()


def _parsed(raw: bytes) -> list[dict[str, Any] | None]:
    """The records of a line; only None if it is damaged."""
    text, tab, check = raw.rstrip(b"\n").rpartition(b"\t")
    if not tab or _check_of(text) != check:
        return [None]
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return [None]
    if not isinstance(record, dict):
        return [None]
    records = record.get("records") if record.get("op") == "all" else [record]
    if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
        return [None]
    return records
