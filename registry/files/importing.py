"""Importing: files that other programs wrote become checkpoints.

The layout of a file of `torch.save` is recorded, so that `registry.files.exporting` gives the same tree back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.catalog.naming import remove
from registry.checkpoints.checkpoint import Checkpoint
from registry.checkpoints.saving import Facts, save
from registry.files.imported import Imported, Stamp, stamp_of
from registry.progress import Progress, silent
from registry.store.errors import Conflict
from registry.store.text import printable

if TYPE_CHECKING:
    from registry.home import Home


def import_checkpoint(
    home: Home,
    imported: Imported,
    model: str,
    *,
    epoch: int | None = None,
    step: int | None = None,
    loss: float | None = None,
    metrics: Mapping[str, float] | None = None,
    config: Mapping[str, Any] | None = None,
    meta: Mapping[str, Any] | None = None,
    origin: str | None = None,
    progress: Progress = silent,
) -> Checkpoint:
    """Store a file as the next version of a model. Arguments override what the file says, metrics one by one.

        imported = read_checkpoint_file("best.pt")
        import_checkpoint(registry, imported, "lenet5", epoch=3)

    Args:
        imported: what `registry.files.reading.read_checkpoint_file` gave.
        model: the model that gets a new version.
        epoch, step, loss, metrics, config, meta: as for `registry.Registry.save`.
        origin: where it came from, for the lineage; the name of the file unless given.
        progress: told the bytes done and the bytes in all.

    Raises:
        Conflict: if somebody wrote to the file meanwhile; no version is left.
        Unsupported, Invalid, StorageError: as `Registry.save`.
    """
    about = Facts(
        epoch=imported.epoch if epoch is None else epoch,
        step=imported.step if step is None else step,
        loss=imported.loss if loss is None else loss,
        metrics={**imported.metrics, **(metrics or {})},
        config=imported.config if config is None else config,
        meta=meta,
        lineage=[{"kind": "imported-from", "parent": printable(origin or imported.source["file"])}],
        source=imported.source,
        provenance=imported.provenance,
    )
    checkpoint = save(home, model, imported.components, about=about, progress=progress)
    for path, stamp in imported.stamps.items():
        if _was_rewritten(path, stamp):
            remove(home.catalog, [checkpoint.name], force=True)
            shown = printable(str(path))
            raise Conflict(
                f"{shown}: the file was written to during the import", "repeat it when that is done"
            )
    return checkpoint


def _was_rewritten(path: Path, before: Stamp) -> bool:
    """Whether the file that was read has other bytes now; one that took its place does not count."""
    try:
        now = stamp_of(os.stat(path))
    except OSError:
        return False
    return now[0] == before[0] and now != before
