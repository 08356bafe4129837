"""What a registry holds, and how much sharing saved."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from registry.catalog.schema import UNUSED
from registry.reports.words import counted, size
from registry.store.errors import StorageError

if TYPE_CHECKING:
    from registry.catalog.catalog import Catalog
    from registry.reports.notebook import Part


class Status(NamedTuple):
    """Sums over a registry; sizes in bytes."""

    root: str
    models: int
    versions: int
    artifacts: int
    tensors: int
    packs: int
    logical: int
    """What the versions and artifacts would take as separate files."""
    stored: int
    """What the packs take."""
    differences: int
    """Tensors that are stored as differences."""
    alone: int
    """Tensors that are coded by themselves."""
    unused: int
    """What gc can free."""
    free: int
    """Free space on the device."""

    @property
    def saved(self) -> int:
        """What sharing and coding saved."""
        return max(self.logical - self.stored, 0)

    @property
    def coded(self) -> str:
        """How many tensors are not stored as they are, in words; empty if none is."""
        counts = ((self.differences, "of them as differences"), (self.alone, "coded by themselves"))
        found = [f"{count:,} {what}" for count, what in counts if count]
        return f", {' and '.join(found)}" if found else ""

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        # Lazy: start-up.
        from registry.reports.notebook import bundle

        return bundle(repr(self), self._parts())

    def _parts(self) -> Iterator[Part]:
        # Lazy: start-up.
        from registry.reports.notebook import Piece, facts, heading, pieces

        held = f"{counted(self.models, 'model')}, {counted(self.versions, 'version')}"
        artifacts = f", {counted(self.artifacts, 'artifact')}" if self.artifacts else ""
        yield heading(f"Status of {self.root}", held + artifacts)
        used = max(self.stored - self.unused, 0)
        yield pieces(
            [
                Piece("in use", used, size(used)),
                Piece("unused", self.unused, f"{size(self.unused)}, which gc can free", "warn"),
                Piece("saved by sharing", self.saved, size(self.saved), "dim"),
            ]
        )
        yield facts(
            [
                (
                    "stored",
                    f"{counted(self.tensors, 'tensor')} in {counted(self.packs, 'pack')}{self.coded}",
                ),
                ("on disk", f"{size(self.stored)} for {size(self.logical)} of checkpoints"),
                ("free space", size(self.free)),
            ]
        )


def status(root: Path, catalog: Catalog) -> Status:
    """Sum up what a registry holds, from the catalog alone."""
    query = catalog.query
    ((models, versions),) = query("SELECT COUNT(DISTINCT model), COUNT(*) FROM versions")
    ((logical,),) = query("SELECT COALESCE(SUM(size), 0) FROM manifests")
    ((artifacts,),) = query("SELECT COUNT(*) FROM artifacts")
    ((tensors,),) = query("SELECT COUNT(DISTINCT digest) FROM tensors")
    ((packs, stored),) = query("SELECT COUNT(*), COALESCE(SUM(size), 0) FROM packs")
    ((differences,),) = query("SELECT COUNT(*) FROM tensors WHERE base IS NOT NULL")
    ((alone,),) = query("SELECT COUNT(*) FROM tensors WHERE base IS NULL AND coded IS NOT NULL")
    ((unused,),) = query(f"SELECT COALESCE(SUM(size), 0) FROM packs WHERE {UNUSED}")
    return Status(
        root=str(root),
        models=models,
        versions=versions,
        artifacts=artifacts,
        tensors=tensors,
        packs=packs,
        logical=logical,
        stored=stored,
        differences=differences,
        alone=alone,
        unused=unused,
        free=free_space(root),
    )


def free_space(root: Path) -> int:
    """Bytes that are free where a registry is.

    Raises:
        StorageError: if the system does not say.
    """
    try:
        return shutil.disk_usage(root).free
    except OSError as error:
        raise StorageError(f"{root}: {error.strerror}") from error
