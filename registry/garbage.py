"""Garbage collection: free what no checkpoint, artifact or running save needs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from registry.schema import UNUSED
from registry.store import durable
from registry.store.digest import is_digest
from registry.store.durable import storage_errors

if TYPE_CHECKING:
    from registry.registry import Registry

GRACE = 3_600.0
"""Seconds that something unneeded is left alone, so that a running save can still come to rely on it."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What gc removed, or would remove, and what waits for its grace period."""

    packs: int
    manifests: int
    temporary: int
    bytes: int
    waiting: int
    waiting_bytes: int
    wait_seconds: float


def collect_garbage(
    registry: Registry,
    *,
    grace: float = GRACE,
    dry_run: bool = False,
    tell: Callable[[Path, int], None] | None = None,
    now: float | None = None,
) -> Collected:
    """Remove what no checkpoint, artifact or running save needs.

    Unneeded packs are marked, left alone for the grace period, checked again, and then removed; so are files
    that no row names. A save checks in its own transaction that what it relies on is still there, so nothing it
    needs is lost even with a grace of 0.

    Args:
        grace: seconds.
        dry_run: only report.
        tell: called with the path and the bytes of each file that goes.
        now: the time, for tests.
    """
    return _Sweep(registry, grace, dry_run, tell, time.time() if now is None else now).run()


class _Sweep:
    def __init__(
        self,
        registry: Registry,
        grace: float,
        dry_run: bool,
        tell: Callable[[Path, int], None] | None,
        now: float,
    ) -> None:
        self._catalog = registry.catalog
        self._store = registry.store
        self._grace = grace
        self._dry_run = dry_run
        self._tell = tell
        self._now = now
        self._counts = {"packs": 0, "manifests": 0, "temporary": 0}
        self._bytes = self._waiting = self._waiting_bytes = 0
        self._wait = 0.0

    def run(self) -> Collected:
        with storage_errors(self._store.root):
            folders = self._store.packs, self._store.manifests
            durable.refuse_links(
                self._store.root,
                self._store.tmp,
                *folders,
                *(path for one in folders for path in one.glob("*")),
            )
            if not self._dry_run:
                self._mark()
            self._sweep_packs()
            self._sweep_files(
                "packs", self._store.packs, ".safetensors", "SELECT 1 FROM packs WHERE digest = ?"
            )
            self._sweep_files(
                "manifests", self._store.manifests, ".json", "SELECT 1 FROM manifests WHERE id = ?"
            )
            self._sweep_temporary()
        return Collected(
            **self._counts,
            bytes=self._bytes,
            waiting=self._waiting,
            waiting_bytes=self._waiting_bytes,
            wait_seconds=self._wait,
        )

    def _mark(self) -> None:
        with self._catalog.change() as change:
            change.connection.execute(
                f"UPDATE packs SET condemned = ? WHERE condemned IS NULL AND {UNUSED}",
                (self._now,),
            )

    def _sweep_packs(self) -> None:
        unused = self._catalog.query(
            f"SELECT digest, size, condemned FROM packs WHERE {UNUSED} ORDER BY number"
        )
        told = set()
        for digest, size, condemned in unused:
            since = self._now if condemned is None else condemned
            if not self._is_due(since, size):
                continue
            if not self._dry_run and not self._forget(digest):
                continue
            self._count("packs", self._store.pack_path(digest), size)
            told.add(digest)
        if self._dry_run:
            return
        for (digest,) in self._catalog.query("SELECT digest FROM doomed"):
            path = self._store.pack_path(digest)
            with self._catalog.change() as change:
                row = change.connection.execute("SELECT 1 FROM packs WHERE digest = ?", (digest,)).fetchone()
                if not row and os.path.lexists(path):
                    if digest not in told:  # damaged and replaced, or left by a gc that was killed
                        self._count("packs", path, path.lstat().st_size)
                    durable.unlink(path)
                change.connection.execute("DELETE FROM doomed WHERE digest = ?", (digest,))

    def _forget(self, digest: str) -> bool:
        """Take a pack out of the catalog if it is still unused; its file goes in a later transaction."""
        with self._catalog.change() as change:
            rows = change.connection.execute(
                f"DELETE FROM packs WHERE digest = ? AND {UNUSED}",
                (digest,),
            ).rowcount
            if rows:
                change.connection.execute(
                    "INSERT INTO doomed (digest) VALUES (?) ON CONFLICT (digest) DO NOTHING", (digest,)
                )
        return rows > 0

    def _sweep_files(self, kind: str, folder: Path, suffix: str, known: str) -> None:
        for path in sorted(folder.glob(f"??/*{suffix}")):
            digest = path.name.removesuffix(suffix)
            if not is_digest(digest) or self._catalog.query(known, [digest]):
                continue
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                if not self._is_due(status.st_mtime, status.st_size):
                    continue
                if not self._dry_run:
                    with self._catalog.change() as change:
                        if change.connection.execute(known, (digest,)).fetchone():
                            continue
                        durable.unlink(path)
                self._count(kind, path, status.st_size)

    def _sweep_temporary(self) -> None:
        for path in sorted(self._store.tmp.iterdir()) if self._store.tmp.is_dir() else []:
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                patience = max(self._grace, GRACE)  # its save may be going on
                if _writer_is_dead(path.name) or self._is_due(status.st_mtime, status.st_size, patience):
                    if not self._dry_run:
                        durable.unlink(path)
                    self._count("temporary", path, status.st_size)

    def _is_due(self, since: float, size: int, grace: float | None = None) -> bool:
        grace = self._grace if grace is None else grace
        age = self._now - since
        if age >= grace and age >= 0:
            return True
        self._waiting += 1
        self._waiting_bytes += size
        self._wait = max(self._wait, min(grace, grace - age))
        return False

    def _count(self, kind: str, path: Path, size: int) -> None:
        if self._tell:
            self._tell(path, size)
        self._counts[kind] += 1
        self._bytes += size


def _writer_is_dead(name: str) -> bool:
    """Whether a temporary file belongs to a process of this machine that has ended."""
    machine, _, pid = name.rpartition("-")[0].rpartition("-")
    return durable.is_gone(machine, pid)
