"""Rebuilding: recreate a lost or damaged catalog from packs, manifests and the journal."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.catalog import BUSY_SECONDS
from registry.catalog import NAME as CATALOG
from registry.progress import Progress, silent
from registry.store import durable
from registry.store.durable import storage_errors
from registry.store.errors import Corrupt, NotFound, StorageError
from registry.store.pack import PackInfo, read_pack_info

if TYPE_CHECKING:
    from registry.registry import Registry


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What a rebuilt catalog holds, and what could not be brought back."""

    models: int
    versions: int
    packs: int
    adopted: int
    damaged: tuple[str, ...]
    set_aside: str | None


def rebuild(registry: Registry, *, adopt: bool = False, progress: Progress = silent) -> Rebuilt:
    """Recreate the catalog from packs, manifests and the journal.

    A catalog file that SQLite cannot read is set aside under another name. Manifests that the journal does not
    know are adopted only where the journal itself is missing or damaged; otherwise they are what interrupted
    saves left behind.

    Args:
        adopt: take in manifests that the journal does not know in any case, such as after an older journal was
            restored from a backup.
    """
    catalog = registry.catalog
    damaged: list[str] = []
    with storage_errors(registry.root):
        packs = list(_readable_packs(registry, damaged, progress))
        lines = list(catalog.journal.read())
        lost = [line for line in lines if line.record is None]
        if lost:
            lines_were = "line was" if len(lost) == 1 else "lines were"
            damaged.append(f"{catalog.journal.path}: {len(lost)} damaged {lines_were} skipped")
        records = [line.record for line in lines if line.record]
        adopted = _unlisted(registry, records) if adopt or lost or not lines else []
        set_aside = _set_aside_unreadable(catalog.path)
        if set_aside or not catalog.path.exists():
            catalog.close()
        catalog.rebuild(packs, adopted)
    ((versions,),) = catalog.query("SELECT COUNT(*) FROM versions")
    ((models,),) = catalog.query("SELECT COUNT(DISTINCT model) FROM versions")
    published = {record.get("id", "") for record in (*records, *adopted) if record.get("op") == "publish"}
    removed = {record.get("id", "") for record in records if record.get("op") == "remove"}
    present = {id for (id,) in catalog.query("SELECT id FROM versions")}
    for id in sorted(published - removed - present):
        damaged.append(f"checkpoint {id[:12]}: its manifest or tensors are missing")
    taken_in = sum(record["id"] in present for record in adopted)
    return Rebuilt(models, versions, len(packs), taken_in, tuple(damaged), set_aside)


def _readable_packs(registry: Registry, damaged: list[str], progress: Progress) -> Iterable[PackInfo]:
    names = list(registry.store.pack_digests())
    for i, name in enumerate(names):
        try:
            yield read_pack_info(registry.store.pack_path(name))
        except Corrupt as error:
            damaged.append(f"pack {error}")
        progress(i + 1, len(names))


def _unlisted(registry: Registry, records: list[dict[str, Any]]) -> list[Mapping[str, Any]]:
    """Publish records for manifests that the journal does not name, in the order of their creation."""
    known = {record.get("id") for record in records}
    following: dict[str, int] = {}
    for record in records:
        if record.get("op") == "publish":
            following[record["model"]] = max(following.get(record["model"], 1), record["version"] + 1)
    found = []
    for id in registry.store:
        if id in known:
            continue
        with contextlib.suppress(Corrupt, NotFound):
            about = registry.store.manifest(id).record
            if about.get("kind") == "checkpoint":
                found.append((str(about.get("created")), id, str(about.get("model"))))
    adopted: list[Mapping[str, Any]] = []
    for _, id, model in sorted(found):
        version = following.get(model, 1)
        following[model] = version + 1
        adopted.append({"op": "publish", "id": id, "model": model, "version": version})
    return adopted


def _set_aside_unreadable(path: Path) -> str | None:
    """Rename a catalog that is no SQLite database, so that a new one can take its place."""
    if not path.exists():
        return None
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
            if connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok":
                return None
    except sqlite3.DatabaseError as error:
        if "locked" in str(error):
            raise StorageError(
                f"{path}: another process keeps the catalog locked; repeat when it has ended"
            ) from error
    aside = path.with_name(f"{CATALOG}.damaged-{int(time.time())}")
    durable.disk.rename(path, aside)
    journal = path.with_name(f"{CATALOG}-journal")
    if journal.exists():
        durable.disk.rename(journal, aside.with_name(f"{aside.name}-journal"))
    durable.disk.sync_folder(path.parent)
    return aside.name
