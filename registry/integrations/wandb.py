"""Weights & Biases: a version as an artifact that refers to it, and artifacts as versions.

    from registry.integrations.wandb import import_artifact, log

    log("lenet5@best")
    import_artifact(api.artifact("team/project/lenet5:v3"), "lenet5")

An artifact holds the address of the version and what is recorded of it; its content stays in the registry. W&B prints that
it cannot check such a reference. The id is the check: it is a digest of the content. A reference with `file://` would tell
the path of the registry to all who see the project, and would help none of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from registry.checkpoints.checkpoint import Checkpoint
from registry.files.importing import import_checkpoint
from registry.files.reading import read_checkpoint_file
from registry.integrations import check_release
from registry.integrations.storing import recordable
from registry.integrations.tracked import SCHEME, address, facts, version_of, warn_of
from registry.registry import Registry
from registry.store.errors import Invalid

check_release("wandb")

import wandb  # noqa: E402


def log(
    reference: str | Checkpoint, registry: Registry | None = None, run: Any = None
) -> wandb.Artifact | None:
    """Log a version to W&B as an artifact of type `model`, which has the model's name and the version's aliases.

    Log a version again after an alias has moved to it. An artifact that is the same as before becomes no new one.

    Args:
        reference: a version, such as `run.save` returns, or a reference such as `lenet5@best`.
        registry: where the reference leads; as for `Registry()` unless given.
        run: the run of W&B; the active one unless given.

    Returns:
        The artifact, which W&B uploads behind the training; None if W&B failed, which the log tells. A version is stored
        before W&B hears of it, so it is never lost.

    Raises:
        Invalid: if no run of W&B is active, or the text is no reference.
        NotFound, Conflict: if the reference leads to no version, or to several.
    """
    checkpoint = version_of(reference, registry)
    run = wandb.run if run is None else run
    if run is None:
        raise Invalid("no run of W&B is active", "call wandb.init(...) first, or give run=")
    try:
        artifact = wandb.Artifact(checkpoint.model, type="model", metadata=facts(checkpoint))
        artifact.add_reference(address(checkpoint), name=f"{checkpoint.model}-v{checkpoint.version}")
        return run.log_artifact(artifact, aliases=list(checkpoint.aliases))
    # Whatever fails at a tracker, training goes on.
    except Exception as error:
        warn_of(checkpoint, "W&B", error)
        return None


def import_artifact(source: Any, model: str, registry: Registry | None = None) -> Checkpoint:
    """Store an artifact of W&B as the next version of a model.

    Args:
        source: an artifact, which is downloaded first, or the folder that one was downloaded to. It holds one checkpoint
            file, or is a folder that `registry import` takes.
        model: the model that gets the version.
        registry: the registry that gets it; as for `Registry()` unless given.

    Returns:
        The version. Its lineage says `imported-from` and names the artifact; the metadata of an artifact are its `meta`.

    Raises:
        Invalid: if the artifact holds no tensors, or was logged by `log`, so that it refers to a version.
        NotFound, Unsupported, Conflict, StorageError: as `registry.files.importing.import_checkpoint`.
    """
    meta = {}
    if isinstance(source, wandb.Artifact):
        for entry in source.manifest.entries.values():
            if entry.ref and entry.ref.startswith(SCHEME):
                version_id = entry.ref.removeprefix(SCHEME)
                raise Invalid(
                    f"the artifact {source.name} refers to a version and does not hold it",
                    f"in the registry that has it: registry[{version_id!r}]",
                )
        origin, folder = source.qualified_name, Path(source.download())
        meta = recordable(source.metadata)
    else:
        folder = Path(source)
        origin = folder.absolute().name
    imported = read_checkpoint_file(folder)
    return import_checkpoint(registry or Registry(), imported, model, origin=f"wandb:{origin}", meta=meta)
