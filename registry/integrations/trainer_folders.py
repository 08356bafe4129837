"""Folders as a Trainer of transformers writes them: what a version keeps of one, and one made from a version."""

from __future__ import annotations

import json
import re
from pathlib import Path

from registry.checkpoints.checkpoint import Checkpoint
from registry.files.folder_writing import checkout
from registry.store.errors import Unsupported

STATE = "trainer_state.json"

RESUMED = "torch-registry"
"""The entry of a Trainer's state, among those of its callbacks, that says which version a folder was made from."""

_HELD = re.compile(
    r"((adapter_)?model|pytorch_model)[^/]*\.(safetensors|bin)(\.index\.json)?|training_args\.bin"
    r"|(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth"
)
"""Files whose content a version holds otherwise: as components, and as the configuration."""


def files_of(folder: Path) -> dict[str, bytes]:
    """The small files of a Trainer's checkpoint, such as those of the tokenizer, by relative name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and not _HELD.fullmatch(path.name):
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def write_folder(checkpoint: Checkpoint, folder: Path) -> None:
    """Write what `Trainer.train(resume_from_checkpoint=folder)` goes on from.

    Parameters have the names of the live network, which is what the Trainer loads them into.

    Args:
        folder: an empty folder.

    Raises:
        Unsupported: if the checkpoint was not saved by `RegistryCallback`, or has no optimizer.
        Corrupt, StorageError: as `registry.files.folder_writing.checkout`.
    """
    files = checkpoint.files
    if STATE not in files:
        raise Unsupported(
            f"{checkpoint.name} was not saved by RegistryCallback, so a Trainer cannot go on from it",
            f"begin with its network: registry[{checkpoint.name!r}].restore(model=model)",
        )
    if "optimizer" not in checkpoint.components:
        raise Unsupported(
            f"{checkpoint.name} has no optimizer, as it was thinned or saved with save_only_model=True",
            "go on from a version that has one",
        )
    checkout(checkpoint, folder)
    state = json.loads(files[STATE])
    state["stateful_callbacks"][RESUMED] = {"resumed": checkpoint.id}
    (folder / STATE).write_text(json.dumps(state))
