"""Folders as a Trainer of transformers writes them: what a version keeps of one, and one made from a version."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from registry.checkpoints.checkpoint import Checkpoint
from registry.files.exporting import export
from registry.store.errors import Corrupt, Unsupported
from registry.store.text import quoted

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
        Corrupt: if a stored byte is not what was saved, or the name of a file leads out of the folder.
        StorageError: if the system refuses.
    """
    files = checkpoint.load("files")["files"] if "files" in checkpoint.components else {}
    if STATE not in files:
        raise Unsupported(
            f"{checkpoint.name} was not saved by RegistryCallback, so a Trainer cannot go on from it; begin with its network: "
            f"registry[{checkpoint.name!r}].restore(model=model)"
        )
    if "optimizer" not in checkpoint.components:
        raise Unsupported(
            f"{checkpoint.name} has no optimizer, as it was thinned or saved with save_only_model=True; "
            "go on from a version that has one"
        )
    for name, data in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise Corrupt(f"{checkpoint.name}: the file name {quoted(name)} leads out of the folder")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    state = json.loads(files[STATE])
    state["stateful_callbacks"][RESUMED] = {"resumed": checkpoint.id}
    (folder / STATE).write_text(json.dumps(state))
    network, file = ("adapter", "adapter_model") if "adapter" in checkpoint.components else ("model", "model")
    export(checkpoint, folder / f"{file}.safetensors", component=network)
    for name in {"optimizer", "scheduler", "scaler"} & set(checkpoint.components):
        torch.save(checkpoint.state_dict(name), folder / f"{name}.pt")
    states = _random_states(checkpoint)
    for rank, random_state in enumerate(states):
        name = "rng_state.pth" if len(states) == 1 else f"rng_state_{rank}.pth"
        torch.save(_as_theirs(random_state, is_alone=len(states) == 1), folder / name)


def _random_states(checkpoint: Checkpoint) -> list[Mapping[str, Any]]:
    """The random numbers of each process, by rank."""
    first = checkpoint.state_dict("rng", copy=True)
    if "ranks" not in checkpoint.components:
        return [first]
    ranks = checkpoint.load("ranks/*/rng", copy=True)["ranks"]
    return [first, *(ranks[str(rank)]["rng"] for rank in range(1, len(ranks) + 1))]


def _as_theirs(state: Mapping[str, Any], *, is_alone: bool) -> dict[str, Any]:
    """Captured random numbers in the form of a Trainer.

    Args:
        is_alone: whether a single process trains; it keeps the numbers of one device.
    """
    python, numpy = state["python"], state["numpy"]
    keys = numpy["keys"].numpy().astype(np.uint32)
    found = {
        "python": (python["version"], tuple(python["state"].tolist()), python["gauss"]),
        "numpy": (numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]),
        "cpu": state["torch"],
    }
    if "cuda" in state:
        found["cuda"] = state["cuda"][0] if is_alone else state["cuda"]
    return found
