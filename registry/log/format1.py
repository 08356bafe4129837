"""Format 1: the journal of version 0.1, and its translation into entries of the log.

Format 1 kept a journal of lines beside the manifests, and bookkeeping of packs in the catalog alone. The journal is read
here and compared with what `registry.catalog.old_format` has read of the catalog. `docs/FORMAT.md` describes the parts
of the old format that are needed for that.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from registry.log.entries import Record, in_parts, manifest_text, pack_record
from registry.store import places
from registry.store.digest import digest, is_digest
from registry.store.errors import Corrupt, Invalid, RegistryError
from registry.store.manifest import MAX_SIZE, record_document
from registry.store.pack import INNER
from registry.store.text import quoted

if TYPE_CHECKING:
    from registry.store.pack import PackInfo
    from registry.store.store import Store

JOURNAL = "journal.jsonl"
_LARGEST = 1 << 30
"""Bytes of the journal that are read at most."""

WRITTEN = frozenset(("pack", "next", "publish", "alias", "tag", "note", "run", "artifact"))
"""The operations that `entries_of` uses."""


@dataclass
class State:
    """What a registry of format 1 says.

    Attributes:
        versions: model and number, by id.
        next: the number that the next version gets, by model.
        aliases: the id that a model and a name point at.
        tags: id and name.
        notes: id, time and text.
        runs: model, time and record, by name.
        artifacts: id, time and record, by key.
        packs: those that the catalog relies on, in order; None if there is no catalog.
    """

    versions: dict[str, tuple[str, int]] = field(default_factory=dict)
    next: dict[str, int] = field(default_factory=dict)
    aliases: dict[tuple[str, str], str] = field(default_factory=dict)
    tags: set[tuple[str, str]] = field(default_factory=set)
    notes: set[tuple[str, str, str]] = field(default_factory=set)
    runs: dict[str, tuple[str, str, Any]] = field(default_factory=dict)
    artifacts: dict[str, tuple[str, str, Any]] = field(default_factory=dict)
    packs: list[str] | None = None

    def take(self, record: Mapping[str, Any]) -> None:
        """Apply a line of the journal; one that refers to what is not there has no effect."""
        operation = _OPERATIONS.get(str(record.get("op")))
        if operation is None:
            raise Corrupt(
                f"the journal holds the operation {quoted(str(record.get('op')))}, which nobody knows"
            )
        try:
            operation(self, record)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise Corrupt(f"a line of the journal is malformed: {quoted(json.dumps(record))}") from None

    def take_all(self, lines: list[_Line]) -> None:
        """Apply the lines that can be read."""
        for line in lines:
            if line.record is not None:
                self.take(line.record)

    def forget(self, version_id: str) -> None:
        """Drop a version with its aliases, tags and notes."""
        self.versions.pop(version_id, None)
        self.aliases = {name: found for name, found in self.aliases.items() if found != version_id}
        self.tags = {pair for pair in self.tags if pair[0] != version_id}
        self.notes = {note for note in self.notes if note[0] != version_id}

    def _all(self, record: Mapping[str, Any]) -> None:
        for one in record["records"]:
            self.take(one)

    def _publish(self, record: Mapping[str, Any]) -> None:
        version_id, model, number = record["id"], record["model"], record["version"]
        if version_id not in self.versions:
            self.next[model] = max(self.next.get(model, 1), number + 1)
            for other in [found for found, name in self.versions.items() if name == (model, number)]:
                self.forget(other)
            self.versions[version_id] = (model, number)

    def _remove(self, record: Mapping[str, Any]) -> None:
        self.forget(record["id"])

    def _next(self, record: Mapping[str, Any]) -> None:
        self.next[record["model"]] = record["version"]

    def _alias(self, record: Mapping[str, Any]) -> None:
        if record["id"] in self.versions:
            self.aliases[record["model"], record["alias"]] = record["id"]

    def _unalias(self, record: Mapping[str, Any]) -> None:
        self.aliases.pop((record["model"], record["alias"]), None)

    def _tag(self, record: Mapping[str, Any]) -> None:
        if record["id"] in self.versions:
            self.tags.add((record["id"], record["tag"]))

    def _untag(self, record: Mapping[str, Any]) -> None:
        self.tags.discard((record["id"], record["tag"]))

    def _note(self, record: Mapping[str, Any]) -> None:
        if record["id"] in self.versions:
            self.notes.add((record["id"], record["at"], record["text"]))

    def _run(self, record: Mapping[str, Any]) -> None:
        model, at, _ = self.runs.get(record["name"], (record["model"], record["at"], None))
        self.runs[record["name"]] = (model, at, record["record"])

    def _artifact(self, record: Mapping[str, Any]) -> None:
        self.artifacts[record["key"]] = (record["id"], record["at"], record.get("record", {}))

    def _drop_artifact(self, record: Mapping[str, Any]) -> None:
        self.artifacts.pop(record["key"], None)


_OPERATIONS: dict[str, Callable[[State, Mapping[str, Any]], None]] = {
    "all": State._all,
    "publish": State._publish,
    "remove": State._remove,
    "next": State._next,
    "alias": State._alias,
    "unalias": State._unalias,
    "tag": State._tag,
    "untag": State._untag,
    "note": State._note,
    "run": State._run,
    "artifact": State._artifact,
    "drop-artifact": State._drop_artifact,
}


class Found(NamedTuple):
    """A registry of format 1 as it was found.

    Attributes:
        state: what its journal and its catalog agree on, or what one of them says if the other is lost.
        problems: where they differ, and what is damaged.
    """

    state: State
    problems: list[str]


def journal_path(root: Path) -> Path:
    """Where format 1 has its journal."""
    return root / "manifests" / JOURNAL


class Catalog(NamedTuple):
    """What a catalog of format 1 says.

    Attributes:
        state: of the registry.
        applied: how many bytes of the journal it has taken in.
    """

    state: State
    applied: int


def read(root: Path, store: Store, catalog: Callable[[], Catalog] | None) -> Found:
    """Read journal and catalog, and compare them.

    Args:
        catalog: reads the catalog; None if it is lost.

    Raises:
        Corrupt: from `catalog`.
    """
    lines = list(_lines(journal_path(root)))
    end = lines[-1].end if lines else 0
    if catalog is None:
        journal = State()
        journal.take_all(lines)
        return Found(journal, [line.problem for line in lines if line.record is None])
    theirs, applied = catalog()
    if applied > end:
        # The journal was lost, or an older one was put back.
        return Found(theirs, [])
    before = [line for line in lines if line.end <= applied]
    after = lines[len(before) :]
    problems = [line.problem for line in after if line.record is None]
    state = _copied(theirs)
    if all(line.record is not None for line in before):
        state = State()
        state.take_all(before)
        _leave_out(state, theirs, store)
        problems += _differences(state, theirs)
    state.take_all(after)
    state.packs = theirs.packs
    return Found(state, problems)


def entries_of(store: Store, state: State) -> Iterator[list[Record]]:
    """The records that say in the log of the present format what a registry of format 1 holds, an entry at a time."""
    live = {*state.versions, *(found for found, _, _ in state.artifacts.values())}
    chosen = _packs(store, state, live)
    yield from in_parts([pack_record(pack) for pack in chosen])
    yield from in_parts(_records(store, state))


class _Line(NamedTuple):
    """A line of the journal: its record, unless it is damaged, and the bytes up to its end."""

    record: dict[str, Any] | None
    end: int
    problem: str


def _lines(path: Path) -> Iterator[_Line]:
    try:
        data = places.read_file(path, _LARGEST, inner=1)
    except FileNotFoundError:
        return
    end = 0
    for raw in data.splitlines(keepends=True):
        start, end = end, end + len(raw)
        # A last line without an end is one that a crash cut short.
        if raw.endswith(b"\n") and raw.strip():
            yield _Line(_parsed(raw), end, f"{path}: the line at byte {start} is damaged")


def _leave_out(state: State, catalog: State, store: Store) -> None:
    """Leave out versions that the catalog lacks because their manifests or tensors are gone."""
    for version_id in state.versions.keys() - catalog.versions.keys():
        try:
            tensors = store.tensors_of(version_id, text_of=lambda _: None)
        except RegistryError:
            state.forget(version_id)
            continue
        held: set[str] = set()
        for name in store.pack_digests():
            with contextlib.suppress(RegistryError):
                held.update(store.pack_info(name).places)
        if not tensors <= held:
            state.forget(version_id)


def _copied(state: State) -> State:
    return State(
        versions=dict(state.versions),
        next=dict(state.next),
        aliases=dict(state.aliases),
        tags=set(state.tags),
        notes=set(state.notes),
        runs=dict(state.runs),
        artifacts=dict(state.artifacts),
    )


def _parsed(raw: bytes) -> dict[str, Any] | None:
    text, tab, check = raw.rstrip(b"\n").rpartition(b"\t")
    if not tab or digest(text)[:16].encode() != check:
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _differences(journal: State, catalog: State) -> list[str]:
    """Where journal and catalog say different things, in words."""
    found = []
    for what, ours, theirs in (
        ("versions", journal.versions, catalog.versions),
        ("next numbers", journal.next, catalog.next),
        ("aliases", journal.aliases, catalog.aliases),
        ("tags", journal.tags, catalog.tags),
        ("notes", journal.notes, catalog.notes),
        ("runs", journal.runs, catalog.runs),
        ("artifacts", journal.artifacts, catalog.artifacts),
    ):
        if ours != theirs:
            found.append(f"the journal and the catalog of format 1 differ in their {what}")
    return found


def _records(store: Store, state: State) -> Iterator[Record]:
    following: dict[str, int] = {}
    for version_id, (model, number) in sorted(state.versions.items(), key=lambda item: item[1]):
        # The versions in between were removed.
        if following.get(model, 1) < number:
            yield {"op": "next", "model": model, "version": number}
        following[model] = number + 1
        yield {
            "op": "publish",
            "id": version_id,
            "model": model,
            "version": number,
            **_text(store, version_id),
        }
    for model, number in sorted(state.next.items()):
        if following.get(model, 1) < number:
            yield {"op": "next", "model": model, "version": number}
    for (model, alias), version_id in sorted(state.aliases.items()):
        if state.versions[version_id][0] != model:
            raise Corrupt(
                f"the alias {quoted(alias)} of {quoted(model)} points at a version of another model"
            )
        yield {"op": "alias", "model": model, "alias": alias, "id": version_id, "was": None}
    for version_id, tag in sorted(state.tags):
        yield {"op": "tag", "id": version_id, "tag": tag}
    for version_id, at, text in sorted(state.notes, key=lambda note: note[1:]):
        yield {"op": "note", "id": version_id, "at": at, "text": text}
    for name, (model, at, record) in state.runs.items():
        about = record_document(record)
        yield {"op": "run", "name": name, "model": model, "at": at, "record": about}
    for key, (artifact_id, at, record) in state.artifacts.items():
        about = record_document(record)
        line = {"op": "artifact", "key": key, "id": artifact_id, "at": at, "record": about, "was": None}
        yield {**line, **_text(store, artifact_id)}


def _text(store: Store, manifest_id: str) -> dict[str, str]:
    """The field that carries a manifest's text; empty if its file cannot be read."""
    if not is_digest(manifest_id):
        raise Corrupt(f"{quoted(str(manifest_id))} is not a digest")
    with contextlib.suppress(OSError, RegistryError):
        data = places.read_file(store.manifest_path(manifest_id), MAX_SIZE, inner=INNER)
        if digest(data) == manifest_id:
            return manifest_text(data)
    return {}


def _packs(store: Store, state: State, live: set[str]) -> list[PackInfo]:
    """The packs that manifests need, in the order in which the catalog had them."""
    needed: set[str] = set()
    for manifest_id in live:
        with contextlib.suppress(RegistryError):
            needed |= store.tensors_of(manifest_id, text_of=lambda _: None)
    names = state.packs if state.packs is not None else list(store.pack_digests())
    chosen: list[PackInfo] = []
    for name in names:
        with contextlib.suppress(RegistryError, Invalid):
            pack = store.pack_info(name)
            if not needed.isdisjoint(pack.places) or state.packs is not None:
                chosen.append(pack)
    held = {found for pack in chosen for found in pack.places}
    bases = {place.base for pack in chosen for place in pack.places.values() if place.base} - held
    lacking = (needed | {base for base in bases if base}) - held
    for name in store.pack_digests() if lacking else ():
        with contextlib.suppress(RegistryError):
            pack = store.pack_info(name)
            if not lacking.isdisjoint(pack.places) and all(one.digest != name for one in chosen):
                chosen.append(pack)
    return chosen
