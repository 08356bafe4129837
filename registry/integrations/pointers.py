"""Pointers: small files, where a framework expects its checkpoints, that name the version which has the content."""

from __future__ import annotations

import json
import os
from pathlib import Path

from registry.checkpoints.checkpoint import Checkpoint
from registry.store.digest import is_digest
from registry.store.durable import make_folder, unlink, write_file

_MAX_BYTES = 4096
"""Size of the largest file that may be a pointer."""


def write(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Let a path point at a version, durably; a file that has the path is replaced whole.

    Raises:
        StorageError: if the disk refuses; an earlier file is untouched.
    """
    place = Path(path).absolute()
    make_folder(place.parent)
    if place.is_symlink():
        # Not the file that the link leads to.
        unlink(place)
    pointer = {"torch-registry": checkpoint.name, "id": checkpoint.id}
    write_file(place, json.dumps(pointer).encode())


def read(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """The name and the id of the version that a file points at; None for any other file, or none."""
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(_MAX_BYTES))
        name, version_id = found["torch-registry"], found["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (name, version_id) if isinstance(name, str) and is_digest(version_id) else None


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a pointer; nothing happens where there is none."""
    if read(path) is not None:
        unlink(Path(path).absolute())


def in_folder(folder: str | os.PathLike[str]) -> dict[str, str]:
    """The pointers in a folder: the id of each version by the path."""
    try:
        paths = [entry.path for entry in os.scandir(folder)]
    except OSError:
        return {}
    return {path: found[1] for path in sorted(paths) if (found := read(path))}
