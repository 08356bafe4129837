"""Artifacts: results of cached functions in the registry, by key."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from registry.cache.contents import Seen, mark
from registry.catalog.attached import MARK
from registry.catalog.commit import publish
from registry.catalog.documents import data_of
from registry.catalog.lookups import batches, marks, parsed
from registry.catalog.runs import Runs
from registry.log.entries import now
from registry.log.facts import sound_artifact
from registry.store.errors import Conflict, Invalid, NotFound
from registry.store.manifest import record_document
from registry.store.text import quoted

if TYPE_CHECKING:
    from registry.cache.keys import Key
    from registry.catalog.transactions import View
    from registry.home import Home
    from registry.log.entries import Record

COMPONENT = "result"
"""The component that holds the result in an artifact's manifest."""

_TOUCH_SECONDS = 600.0
"""Seconds within which a second load does not record its time."""


class Artifact(NamedTuple):
    """A stored result.

    Attributes:
        key: digest of what it depends on.
        id: digest of its content, which a run records as its dataset.
        created: time of the save, in UTC, ISO 8601.
        used: time of the last load, in seconds since the epoch, accurate to ten minutes.
        size: bytes of its tensors.
        tensors: how many tensors it has.
        runs: names of the runs that were trained on it.
        record: the function, its parameters, digests of its files, and the seconds that it took.
    """

    key: str
    id: str
    created: str
    used: float
    size: int
    tensors: int
    runs: tuple[str, ...]
    record: Mapping[str, Any]

    @property
    def function(self) -> str:
        """The name of the function that computed it."""
        return str(self.record.get("function", "?"))

    @property
    def document(self) -> dict[str, Any]:
        """The same in the shape that `--json` prints."""
        return {**self._asdict(), "function": self.function}


class UsedData(NamedTuple):
    """Data that something was made with.

    Attributes:
        digest: of its content.
        function, key: of the cached result that it is; empty if it is none.
    """

    digest: str
    function: str
    key: str


class Artifacts:
    """The artifacts of a registry."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def find(self) -> list[Artifact]:
        """All results of cached functions, the newest first."""
        rows = self._home.catalog.query(
            "SELECT a.key, a.id, a.created, m.size, m.tensors, a.record FROM artifacts a "
            "JOIN manifests m ON m.id = a.id "
            "ORDER BY a.created DESC, a.key"
        )
        users = self._users()
        found = [self._artifact(users, *row) for row in rows]
        return [one for one in found if MARK not in one.record]

    def __getitem__(self, prefix: str) -> Artifact:
        """The artifact whose key or id begins with some hex digits.

        Raises:
            Invalid: if these are no hex digits.
            NotFound, Conflict: if there is none, or several.
        """
        if not prefix or set(prefix) - set("0123456789abcdef"):
            raise Invalid(f"{quoted(prefix)} is not a key", "registry cache list shows the keys")
        found = [one for one in self.find() if one.key.startswith(prefix) or one.id.startswith(prefix)]
        if not found:
            raise NotFound(
                f"there is no artifact {quoted(prefix)}", "registry cache list shows what there is"
            )
        if len(found) > 1:
            raise Conflict(f"{quoted(prefix)} is the beginning of {len(found)} artifacts", "give more digits")
        return found[0]

    def id_for(self, key: str) -> str | None:
        """The id of the artifact under a key."""
        rows = self._home.catalog.query("SELECT id FROM artifacts WHERE key = ?", [key])
        return str(rows[0][0]) if rows else None

    def used_by(self, record: Mapping[str, Any]) -> list[UsedData]:
        """The data that something was made with.

        Args:
            record: a run's, or the provenance of a version.
        """
        ids = data_of(record)
        made: dict[str, tuple[str, str]] = {}
        for batch in batches(ids):
            rows = self._home.catalog.query(
                f"SELECT id, key, record FROM artifacts WHERE id IN ({marks(batch)}) ORDER BY created DESC, key",
                batch,
            )
            for artifact_id, key, text in rows:
                about = sound_artifact(parsed(text))
                if MARK not in about:
                    made[artifact_id] = str(about.get("function", "?")), key
        return [UsedData(one, *made.get(one, ("", ""))) for one in ids]

    def put(self, key: Key, tree: Any, *, version: str | int | None, seconds: float) -> str:
        """Store a result under its key; returns the artifact's id.

        Raises:
            Unsupported: if a part of it cannot be stored.
            StorageError: if the disk is full or refuses.
        """
        about = {
            "function": key.function,
            "version": version,
            "parameters": key.parameters,
            "files": {
                name: [{"path": str(content.path), "digest": content.digest} for content in found]
                for name, found in key.contents.items()
            },
            "seconds": round(seconds, 6),
        }
        about = {name: value for name, value in about.items() if value not in (None, {}, [])}
        line = {"op": "artifact", "key": key.digest, "at": now(), "record": record_document(about)}

        def records(view: View, artifact_id: str, text: Mapping[str, str]) -> list[Record]:
            rows = view.query("SELECT id FROM artifacts WHERE key = ?", [key.digest])
            return [{**line, "id": artifact_id, "was": rows[0][0] if rows else None, **text}]

        store = self._home.store
        artifact_id, _ = publish(
            self._home.catalog,
            store,
            store.encode({COMPONENT: tree}),
            record={"kind": "artifact"},
            records=records,
            what=key.function,
        )
        return artifact_id

    def load(self, id: str, *, verify: bool | Literal["once"] = "once") -> Any:
        """The tree of an artifact, mapped.

        Args:
            verify: check every byte against its digest: `True` always, `False` never, `once` unless that was done
                before and the sizes, times and inodes of its packs are as they were then.

        Raises:
            NotFound, Corrupt: if it is not there any more, or not what was saved.
        """
        store = self._home.store
        once = verify == "once"
        seen = Seen(self._home.root, f"packs of {id}") if once else None
        packs = self._packs(id) if once else {}
        check = seen.entries != packs if seen else bool(verify)
        tree = store.get(id, verify=check, label=f"artifact {id[:12]}")[COMPONENT]
        if seen and check:
            seen.keep(packs)
        path = store.manifest_path(id)
        # An artifact may be dropped and collected by now; what was read is whole.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _TOUCH_SECONDS and os.access(path, os.W_OK):
                # The file's time says when the artifact was last of use.
                os.utime(path)
        return tree

    def remove(self, keys: Iterable[str]) -> int:
        """Remove cached artifacts by their whole keys; returns how many there were."""
        chosen = list(dict.fromkeys(keys))

        def compute(view: View) -> list[Record]:
            rows = (
                row
                for part in batches(chosen)
                for row in view.query(f"SELECT key, id FROM artifacts WHERE key IN ({marks(part)})", part)
            )
            return [{"op": "drop-artifact", "key": key, "was": artifact_id} for key, artifact_id in rows]

        entry = self._home.catalog.commit(compute)
        return len(entry.records) if entry else 0

    def clear(self, *, older_than: float | None = None, unused: bool = False) -> list[Artifact]:
        """Remove all cached artifacts, or only some.

        Args:
            older_than: only those that were not loaded for this many seconds.
            unused: only those that no run names.

        Returns:
            What was removed; its bytes are freed by the next `gc`.
        """
        limit = time.time() - (older_than or 0.0)
        chosen = [
            one
            for one in self.find()
            if (older_than is None or one.used < limit) and not (unused and one.runs)
        ]
        self.remove(one.key for one in chosen)
        return chosen

    def _packs(self, artifact_id: str) -> dict[str, tuple[str, str]]:
        """The packs of an artifact, and what shows that one has changed; without those that cannot be looked at."""
        rows = self._home.catalog.query(
            "SELECT p.digest FROM uses u JOIN packs p ON p.number = u.pack WHERE u.id = ?", [artifact_id]
        )
        found = {}
        for (name,) in rows:
            # Reading it will say what is wrong with it.
            with contextlib.suppress(OSError):
                found[name] = mark(self._home.store.pack_path(name)), name
        return found

    def _artifact(
        self,
        users: Mapping[str, tuple[str, ...]],
        key: str,
        artifact_id: str,
        created: str,
        size: int,
        tensors: int,
        record: str,
    ) -> Artifact:
        used = 0.0
        try:
            used = self._home.store.manifest_path(artifact_id).stat().st_mtime
        except OSError:
            # Such as after a power cut, or on another computer.
            with contextlib.suppress(ValueError, OverflowError):
                used = datetime.fromisoformat(created).timestamp()
        return Artifact(
            key=key,
            id=artifact_id,
            created=created,
            used=used,
            size=size,
            tensors=tensors,
            runs=users.get(artifact_id, ()),
            record=sound_artifact(parsed(record)),
        )

    def _users(self) -> dict[str, tuple[str, ...]]:
        """The names of the runs that used an artifact, by its id."""
        found: dict[str, tuple[str, ...]] = {}
        for run in Runs(self._home.catalog, self._home.root).find():
            for artifact_id in {run.record.get("dataset"), *run.record.get("artifacts", ())}:
                if artifact_id:
                    found[artifact_id] = (*found.get(artifact_id, ()), run.name)
        return found
