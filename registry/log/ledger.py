"""The ledger: what follows from the log, in memory, without a database.

It is independent of the code that keeps the catalog's tables up to date: `verify` and every test compare the two. gc
decides by the ledger, so that a catalog that lies cannot make it delete anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from registry.log.entries import START, Entry, Record
from registry.log.history import End, Gap, Placed
from registry.log.journal import BEGINNING, Position
from registry.log.numbers import Numbers
from registry.log.refusals import Refused, refuse_if
from registry.log.undoing import Undo
from registry.store.pack import PackInfo


class LivePack(NamedTuple):
    """A pack that counts.

    Attributes:
        number: packs are numbered in the order in which the log names them.
        size: bytes of the file.
        differences: whether it holds tensors as differences from others.
        damaged: whether a part of it was found damaged.
    """

    number: int
    size: int
    differences: bool
    damaged: bool = False


class Void(NamedTuple):
    """An entry that contradicts those before it, and so has no effect.

    Attributes:
        ids: the manifests that it names as versions or artifacts.
    """

    seq: int
    at: str
    problem: str
    ids: tuple[str, ...]

    def __str__(self) -> str:
        return f"entry {self.seq} of the log, written {self.at}, has no effect: {self.problem}"


class Ledger:
    """What follows from the entries so far.

    Attributes:
        seq, digest, end: number and digest of the last entry, and where the log ends.
        versions: model and number, by id.
        next: the number that the next version gets, by model.
        missing: the numbers that a model has had and that no readable entry accounts for, by model.
        aliases: the id that a model and a name point at.
        aliases_of: the aliases of a version, by id.
        tags, notes: by id.
        runs: model, time and record, by name.
        artifacts: id, time and record, by key.
        keys_of: the keys under which a manifest is an artifact, by id.
        packs: those that count, by digest.
        doomed: when a pack or a manifest was doomed.
        released: manifests that nothing names any more, and that are not doomed yet.
        texts: number of the entry that carries a manifest, and its place in the folder's log, by id.
        gaps: entries that cannot be read, and that nobody has accepted as lost.
        accepted: numbers of entries that were accepted as lost.
        voids: entries without effect.
        skipped: records that were left out, as they refer to what a gap may have had.
        strays: packs that no entry names, and that count all the same while there are gaps.
    """

    def __init__(self) -> None:
        self.seq = 0
        self.digest = START
        self.end = BEGINNING
        self._undo = Undo()
        self.versions: dict[str, tuple[str, int]] = {}
        self._numbers = Numbers(self._undo)
        self.next, self.missing = self._numbers.next, self._numbers.missing
        self.aliases: dict[tuple[str, str], str] = {}
        self.aliases_of: dict[str, frozenset[str]] = {}
        self.tags: dict[str, dict[str, None]] = {}
        self.notes: dict[str, tuple[tuple[str, str], ...]] = {}
        self.runs: dict[str, tuple[str, str, Record]] = {}
        self.artifacts: dict[str, tuple[str, str, Record]] = {}
        self.keys_of: dict[str, frozenset[str]] = {}
        self.packs: dict[str, LivePack] = {}
        # A dict, so that it can be undone.
        self._counts = {"packs": 0}
        self.doomed: dict[str, str] = {}
        self.released: dict[str, None] = {}
        self.texts: dict[str, tuple[int, Position | None]] = {}
        self.gaps: list[Gap] = []
        self.accepted: list[range] = []
        self.voids: list[Void] = []
        self.skipped: list[Record] = []
        self.strays: dict[str, PackInfo] = {}
        # Model and number of the versions that the present entry has removed, by id.
        self._freed: dict[str, tuple[str, int]] = {}

    def is_live(self, manifest_id: str) -> bool:
        """Whether a manifest is that of a version or an artifact."""
        return manifest_id in self.versions or manifest_id in self.keys_of

    @property
    def is_any_live(self) -> bool:
        """Whether there is a version or an artifact."""
        return bool(self.versions or self.keys_of)

    def ids_of_voids(self) -> set[str]:
        """The manifests that entries without effect name."""
        return {found for void in self.voids for found in void.ids}

    def live_manifests(self) -> list[str]:
        """The ids of the manifests that versions or artifacts have."""
        return [*self.versions, *(found for found in self.keys_of if found not in self.versions)]

    @property
    def pack_count(self) -> int:
        """How many packs the log has named."""
        return self._counts["packs"]

    @property
    def has_gaps(self) -> bool:
        """Whether entries are lost, and nobody has accepted that."""
        return any(gap.last >= gap.first for gap in self.gaps)

    def follow(self, history: Iterable[Any]) -> None:
        """Take in entries in their order, and note what cannot be read."""
        for item in history:
            if isinstance(item, Placed):
                self.take(item.entry, item.start)
                if item.end is not None:
                    self.end = item.end
            elif isinstance(item, Gap):
                self.gaps.append(item)
            elif isinstance(item, End):
                self.end = item.position

    def take(self, entry: Entry, start: Position | None = None) -> None:
        """Take in one entry: whole, or not at all if it contradicts those before it.

        Behind a gap, a record may seem to contradict only because others are lost. There the records are taken in one
        by one, and those that contradict are left out.
        """
        self._undo.begin()
        self._freed.clear()
        try:
            for record in entry.records:
                try:
                    _OPERATIONS[record["op"]](self, record, entry)
                except Refused:
                    if not self.has_gaps:
                        raise
                    self.skipped.append(record)
                else:
                    if record.get("manifest") is not None:
                        self._undo.set(self.texts, record["id"], (entry.seq, start))
        except Refused as error:
            self._undo.take_back()
            ids = tuple(record["id"] for record in entry.records if record["op"] in ("publish", "artifact"))
            self.voids.append(Void(seq=entry.seq, at=entry.at, problem=str(error), ids=ids))
        self.seq, self.digest = entry.seq, entry.digest

    def _pack(self, record: Record, entry: Entry) -> None:
        digest = record["digest"]
        refuse_if(digest in self.packs, f"pack {digest[:12]} is there already")
        refuse_if(digest in self.doomed, f"pack {digest[:12]} was doomed")
        self._undo.set(self._counts, "packs", self.pack_count + 1)
        pack = LivePack(self.pack_count, record["size"], bool(record.get("differences")))
        self._undo.set(self.packs, digest, pack)

    def _damaged(self, record: Record, entry: Entry) -> None:
        pack = self._live_pack(record["pack"])
        self._undo.set(self.packs, record["pack"], pack._replace(damaged=True))

    def _replace(self, record: Record, entry: Entry) -> None:
        old, new = record["old"], record["new"]
        refuse_if(old == new, f"pack {old[:12]} would take its own place")
        self._live_pack(old)
        self._live_pack(new)
        self._undo.drop(self.packs, old)
        self._undo.set(self.doomed, old, entry.at)

    def _doom(self, record: Record, entry: Entry) -> None:
        for digest in record["packs"]:
            self._live_pack(digest)
            self._undo.drop(self.packs, digest)
            self._undo.set(self.doomed, digest, entry.at)
        for manifest_id in record["manifests"]:
            refuse_if(self.is_live(manifest_id), f"manifest {manifest_id[:12]} is needed")
            self._undo.drop(self.released, manifest_id)
            self._undo.set(self.doomed, manifest_id, entry.at)

    def _live_pack(self, digest: str) -> LivePack:
        found = self.packs.get(digest)
        refuse_if(found is None, f"there is no pack {digest[:12]}")
        assert found is not None
        return found

    def _publish(self, record: Record, entry: Entry) -> None:
        manifest_id, model, version = record["id"], record["model"], record["version"]
        refuse_if(manifest_id in self.versions, f"{manifest_id[:12]} is a version already")
        instead = record.get("instead")
        if instead is None:
            self._numbers.give(model, version, is_adopted=bool(record.get("adopted")))
        else:
            freed = self._freed.pop(instead, None)
            if freed is None and self.has_gaps:
                # The entry that gave the removed version its number is lost. This record has the number, too.
                self._numbers.give(model, version, is_adopted=True)
            else:
                refuse_if(freed != (model, version), f"{model}:v{version} is not what {instead[:12]} was")
        self._revive(manifest_id, record)
        self._undo.set(self.versions, manifest_id, (model, version))

    def _revive(self, manifest_id: str, record: Record) -> None:
        """Let a manifest count."""
        refuse_if(
            manifest_id in self.doomed and "manifest" not in record,
            f"manifest {manifest_id[:12]} was doomed, and its text is not there",
        )
        self._undo.drop(self.released, manifest_id)

    def _release(self, manifest_id: str) -> None:
        """Let a manifest go, unless a version or an artifact still has it."""
        if not self.is_live(manifest_id):
            self._undo.drop(self.doomed, manifest_id)
            self._undo.drop(self.texts, manifest_id)
            self._undo.set(self.released, manifest_id, None)

    def _remove(self, record: Record, entry: Entry) -> None:
        manifest_id = record["id"]
        if self.has_gaps and manifest_id not in self.versions:
            # The entry that published it is lost. It is gone all the same.
            self._release(manifest_id)
        model, version = self._version(manifest_id)
        aliases = self.aliases_of.get(manifest_id, frozenset())
        tags = self.tags.get(manifest_id, {})
        differs = set(record["aliases"]) != aliases or set(record["tags"]) != tags.keys()
        refuse_if(differs and not self.has_gaps, f"{model}:v{version} has other aliases or tags")
        for alias in aliases:
            self._undo.drop(self.aliases, (model, alias))
        for table in (self.aliases_of, self.tags, self.notes, self.versions):
            self._undo.drop(table, manifest_id)
        self._freed[manifest_id] = (model, version)
        self._release(manifest_id)

    def _version(self, manifest_id: str) -> tuple[str, int]:
        found = self.versions.get(manifest_id)
        refuse_if(found is None, f"there is no version {manifest_id[:12]}")
        assert found is not None
        return found

    def _next(self, record: Record, entry: Entry) -> None:
        self._numbers.go_on_at(record["model"], record["version"])

    def _alias(self, record: Record, entry: Entry) -> None:
        model, alias, manifest_id = record["model"], record["alias"], record["id"]
        if self.has_gaps and manifest_id not in self.versions:
            # Its new version is lost, but it does not point to the old one any more.
            self._unpoint(model, alias, record["was"])
        refuse_if(self._version(manifest_id)[0] != model, f"{manifest_id[:12]} is not a version of {model}")
        self._unpoint(model, alias, record["was"])
        self._undo.set(self.aliases, (model, alias), manifest_id)
        self._undo.set(self.aliases_of, manifest_id, self.aliases_of.get(manifest_id, frozenset()) | {alias})

    def _unalias(self, record: Record, entry: Entry) -> None:
        self._unpoint(record["model"], record["alias"], record["was"])

    def _unpoint(self, model: str, alias: str, was: str | None) -> None:
        """Take an alias away, if it points where the record says."""
        if self.has_gaps:
            # This record replaces the skipped ones of the alias.
            said = ("alias", model, alias)
            self.skipped = [
                one for one in self.skipped if (one["op"], one.get("model"), one.get("alias")) != said
            ]
        found = self.aliases.get((model, alias))
        refuse_if(found != was and not self.has_gaps, f"{model}@{alias} points elsewhere")
        if found is not None:
            self._undo.drop(self.aliases, (model, alias))
            self._undo.set(self.aliases_of, found, self.aliases_of[found] - {alias})

    def _tag(self, record: Record, entry: Entry) -> None:
        manifest_id = record["id"]
        self._version(manifest_id)
        self._undo.set(self.tags.setdefault(manifest_id, {}), record["tag"], None)

    def _untag(self, record: Record, entry: Entry) -> None:
        manifest_id = record["id"]
        self._version(manifest_id)
        self._undo.drop(self.tags.setdefault(manifest_id, {}), record["tag"])

    def _note(self, record: Record, entry: Entry) -> None:
        manifest_id = record["id"]
        self._version(manifest_id)
        written = (record["at"], record["text"])
        self._undo.set(self.notes, manifest_id, (*self.notes.get(manifest_id, ()), written))

    def _run(self, record: Record, entry: Entry) -> None:
        model, at = record["model"], record["at"]
        before = self.runs.get(record["name"])
        refuse_if(before is not None and before[:2] != (model, at), f"there is another run {record['name']}")
        self._undo.set(self.runs, record["name"], (model, at, record["record"]))

    def _artifact(self, record: Record, entry: Entry) -> None:
        key, manifest_id = record["key"], record["id"]
        before = self._expected_artifact(key, record["was"])
        self._revive(manifest_id, record)
        if before is not None:
            self._unkey(key, before)
        self._undo.set(self.artifacts, key, (manifest_id, record["at"], record["record"]))
        self._undo.set(self.keys_of, manifest_id, self.keys_of.get(manifest_id, frozenset()) | {key})
        if before is not None:
            self._release(before)

    def _drop_artifact(self, record: Record, entry: Entry) -> None:
        before = self._expected_artifact(record["key"], record["was"])
        if before is not None:
            self._unkey(record["key"], before)
            self._release(before)

    def _expected_artifact(self, key: str, was: str | None) -> str | None:
        found = self.artifacts.get(key)
        manifest_id = found[0] if found else None
        refuse_if(manifest_id != was and not self.has_gaps, f"artifact {key[:12]} is another")
        return manifest_id

    def _unkey(self, key: str, manifest_id: str) -> None:
        self._undo.drop(self.artifacts, key)
        self._undo.set_unless_empty(self.keys_of, manifest_id, self.keys_of[manifest_id] - {key})

    def _begin(self, record: Record, entry: Entry) -> None:
        """Nothing follows: the registry is new."""

    def _adopt(self, record: Record, entry: Entry) -> None:
        accepted = [range(first, last + 1) for first, last in record["gaps"]]
        self.accepted += accepted
        self.gaps = [
            gap
            for gap in self.gaps
            if not any(gap.first in numbers and gap.last in numbers for numbers in accepted)
        ]


_OPERATIONS: dict[str, Callable[[Ledger, Record, Entry], None]] = {
    "begin": Ledger._begin,
    "pack": Ledger._pack,
    "damaged": Ledger._damaged,
    "replace": Ledger._replace,
    "doom": Ledger._doom,
    "publish": Ledger._publish,
    "remove": Ledger._remove,
    "next": Ledger._next,
    "alias": Ledger._alias,
    "unalias": Ledger._unalias,
    "tag": Ledger._tag,
    "untag": Ledger._untag,
    "note": Ledger._note,
    "run": Ledger._run,
    "artifact": Ledger._artifact,
    "drop-artifact": Ledger._drop_artifact,
    "adopt": Ledger._adopt,
}
