"""Entries of the log: what one commit did, as one line that is checked as if an enemy had written it.

A line is JSON, a tab, the digest of the JSON, and a line feed. The JSON has the entry's number `seq`, the time `at`, the
digest `prev` of the entry before it, a `nonce` that no other entry has, and the `records` that apply together or not at
all. `docs/FORMAT.md` lists the records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from registry.log.reference import check_name, check_run_name, check_text
from registry.store.digest import digest, is_digest, salt
from registry.store.errors import Corrupt, Invalid, RegistryError, Unsupported
from registry.store.text import quoted

if TYPE_CHECKING:
    from registry.store.pack import PackInfo

Record = Mapping[str, Any]

MAX_LINE = 64 << 20
"""Bytes that an entry's line has at most."""
MAX_RECORDS = 100_000
MAX_TEXT = 16 << 20
"""Bytes of the largest manifest that an entry carries. A larger one is in its file alone."""
_PART = 16 << 20
"""Once the records of an entry hold this many bytes of text, `in_parts` begins the next entry."""
MAX_NUMBER = (1 << 63) - 1
MAX_VERSION = 999_999_999
START = "0" * 64
"""The `prev` of the first entry."""

_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z\Z")
_NONCE = re.compile(r"[0-9a-f]{32}\Z")


class Entry(NamedTuple):
    """One commit.

    Attributes:
        seq: its number, from 1 on, without gaps.
        at: when it was written, in UTC.
        prev: digest of the entry before it.
        nonce: drawn at random, so that no two entries are equal.
        records: what applies together or not at all.
        digest: of its JSON.
        line: the bytes that stand for it in the log.
    """

    seq: int
    at: str
    prev: str
    nonce: str
    records: Sequence[Record]
    digest: str
    line: bytes


def now() -> str:
    """The time as records have it: in UTC, ISO 8601, to the microsecond."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def write(seq: int, prev: str, records: Sequence[Record]) -> Entry:
    """Make an entry.

    Raises:
        Invalid: if it would be larger than an entry may be.
        ValueError: if it records nothing, as such an entry cannot be read.
    """
    if not records:
        raise ValueError("an entry without records")
    if len(records) > MAX_RECORDS:
        raise Invalid(
            f"one change of {len(records):,} records is too large; at most {MAX_RECORDS:,} go at a time"
        )
    at, nonce = now(), salt()
    document = {"seq": seq, "at": at, "prev": prev, "nonce": nonce, "records": records}
    text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
    own = digest(text)
    line = b"%s\t%s\n" % (text, own.encode())
    if len(line) > MAX_LINE:
        raise Invalid(
            f"what this change records takes {len(line) >> 20} MB, at most {MAX_LINE >> 20} are written",
            "put long lists into tensors or arrays",
        )
    return Entry(seq=seq, at=at, prev=prev, nonce=nonce, records=records, digest=own, line=line)


def digest_of_line(line: bytes) -> str | None:
    """The digest at the end of a line; None if it is not that of the rest."""
    text, tab, own = line.removesuffix(b"\n").rpartition(b"\t")
    return own.decode() if tab and line.endswith(b"\n") and digest(text).encode() == own else None


def parse(line: bytes) -> Entry:
    """Read a line of the log, and check everything in it.

    Raises:
        Corrupt: saying what is wrong.
        Unsupported: if a newer version of this package wrote it.
    """
    own = digest_of_line(line)
    if own is None:
        raise Corrupt("its bytes are not what was written")
    try:
        document = json.loads(
            line[: line.rindex(b"\t")], object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise Corrupt("it is nested too deep") from None
    except ValueError as error:
        raise Corrupt(f"it is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise Corrupt("it is not an object")
    seq, at, prev, nonce, records = (document.get(key) for key in ("seq", "at", "prev", "nonce", "records"))
    _whole(seq, 1, MAX_NUMBER)
    _time(at)
    _digest(prev)
    if not isinstance(nonce, str) or not _NONCE.match(nonce):
        raise Corrupt("its nonce is malformed")
    if not isinstance(records, list) or not 0 < len(records) <= MAX_RECORDS:
        raise Corrupt("its records are not a list of the right length")
    for record in records:
        check_record(record)
    return Entry(
        seq=document["seq"],
        at=document["at"],
        prev=document["prev"],
        nonce=nonce,
        records=records,
        digest=own,
        line=line,
    )


def check_record(record: Any) -> None:
    """Check the form of a record; what it refers to is checked where it is applied.

    Raises:
        Corrupt: naming the field.
        Unsupported: if a newer version of this package wrote it.
    """
    if not isinstance(record, dict) or not isinstance(record.get("op"), str):
        raise Corrupt("a record has no op")
    fields = _FIELDS.get(record["op"])
    if fields is None:
        raise Unsupported(
            f"the log holds the operation {quoted(record['op'])}, which a newer version wrote",
            "upgrade with: pip install -U torch-registry",
        )
    for name, check in fields.items():
        try:
            if name == "was" and name not in record:
                raise Corrupt("is missing")
            check(record.get(name))
        except RegistryError as error:
            raise Corrupt(f"{record['op']}: {name}: {error}") from None
    if record["op"] in ("publish", "artifact") and "manifest" in record:
        _check_manifest(record)


def in_parts(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Split records, in their order, into parts that each fit into one entry."""
    part: list[Record] = []
    size = 0
    for record in records:
        check_record(record)
        part.append(record)
        # A character beyond ASCII takes up to 12 bytes.
        size += len(record.get("manifest", "")) + 12 * len(record.get("text", ""))
        if size > _PART or len(part) >= MAX_RECORDS:
            yield part
            part, size = [], 0
    if part:
        yield part


def manifest_text(data: bytes) -> dict[str, str]:
    """The field by which a record carries a manifest's text; empty if the text is too large or not ASCII."""
    return {"manifest": data.decode("ascii")} if len(data) <= MAX_TEXT and data.isascii() else {}


def pack_record(pack: PackInfo) -> Record:
    """The record that makes a pack count."""
    record: dict[str, Any] = {"op": "pack", "digest": pack.digest, "size": pack.size}
    if any(tensor.base for tensor in pack.tensors):
        record["differences"] = True
    return record


def _check_manifest(record: Record) -> None:
    text = record["manifest"]
    if not isinstance(text, str) or len(text) > MAX_TEXT or not text.isascii():
        raise Corrupt(f"{record['op']}: the manifest is malformed")
    if digest(text.encode()) != record["id"]:
        raise Corrupt(f"{record['op']}: the manifest is not the one that its id names")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise Corrupt("it names a key twice")
    return table


def _refuse_constant(text: str) -> Any:
    raise Corrupt(f"it holds the number {quoted(text)}")


def _whole(value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise Corrupt(f"{quoted(str(value))} is not a whole number from {least} to {most}")


def _time(value: Any) -> None:
    if not isinstance(value, str) or not _TIME.match(value):
        raise Corrupt(f"{quoted(str(value))} is not a time")


def _digest(value: Any) -> None:
    if not is_digest(value):
        raise Corrupt(f"{quoted(str(value))} is not a digest")


def _digest_or_none(value: Any) -> None:
    if value is not None:
        _digest(value)


def _digests(value: Any) -> None:
    if not isinstance(value, list) or not all(map(is_digest, value)) or len(set(value)) != len(value):
        raise Corrupt("is not a list of different digests")


def _name(kind: str) -> Callable[[Any], None]:
    def check(value: Any) -> None:
        if not isinstance(value, str):
            raise Corrupt(f"{quoted(str(value))} is not a name")
        check_name(value, kind)

    return check


def _names(kind: str) -> Callable[[Any], None]:
    def check(value: Any) -> None:
        if not isinstance(value, list) or len(set(map(str, value))) != len(value):
            raise Corrupt("is not a list of different names")
        for name in value:
            _name(kind)(name)

    return check


def _version(value: Any) -> None:
    _whole(value, 1, MAX_VERSION)


def _next(value: Any) -> None:
    _whole(value, 1, MAX_VERSION + 1)


def _size(value: Any) -> None:
    _whole(value, 1, MAX_NUMBER)


def _text(value: Any) -> None:
    check_text(value, "it")


def _table(value: Any) -> None:
    if not isinstance(value, dict):
        raise Corrupt("is not an object")


def _flag(value: Any) -> None:
    if value is not None and value is not True:
        raise Corrupt("is neither true nor absent")


def _gaps(value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise Corrupt("is not a list of ranges")
    for gap in value:
        if not isinstance(gap, list) or len(gap) != 2:
            raise Corrupt("is not a list of ranges")
        _whole(gap[0], 1, MAX_NUMBER)
        _whole(gap[1], gap[0], MAX_NUMBER)


_FIELDS: dict[str, dict[str, Callable[[Any], object]]] = {
    "begin": {"by": _text},
    "pack": {"digest": _digest, "size": _size, "differences": _flag},
    "damaged": {"pack": _digest},
    "replace": {"old": _digest, "new": _digest},
    "doom": {"packs": _digests, "manifests": _digests},
    "publish": {
        "id": _digest,
        "model": _name("model"),
        "version": _version,
        "instead": _digest_or_none,
        "adopted": _flag,
    },
    "remove": {"id": _digest, "aliases": _names("alias"), "tags": _names("tag")},
    "next": {"model": _name("model"), "version": _next},
    "alias": {"model": _name("model"), "alias": _name("alias"), "id": _digest, "was": _digest_or_none},
    "unalias": {"model": _name("model"), "alias": _name("alias"), "was": _digest},
    "tag": {"id": _digest, "tag": _name("tag")},
    "untag": {"id": _digest, "tag": _name("tag")},
    "note": {"id": _digest, "at": _time, "text": _text},
    "run": {"name": check_run_name, "model": _name("model"), "at": _time, "record": _table},
    "artifact": {"key": _digest, "id": _digest, "at": _time, "record": _table, "was": _digest_or_none},
    "drop-artifact": {"key": _digest, "was": _digest},
    "adopt": {"gaps": _gaps, "reason": _text},
}
"""The operations, and what their fields must be. Other fields are ignored."""
