"""Pointers: small files, where a framework expects its checkpoints, that name the version which has the content."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from registry.catalog.naming import remove
from registry.catalog.versions import Version, with_descendants
from registry.checkpoints.checkpoint import Checkpoint
from registry.registry import Registry
from registry.remote.bucket import Unreachable
from registry.store.digest import is_digest
from registry.store.durable import make_folder, unlink, write_file
from registry.store.errors import Conflict, NotFound
from registry.upkeep.garbage import collect_garbage

_logger = logging.getLogger(__name__)

_MAX_BYTES = 4096
"""Size of the largest file that may be a pointer."""


class Pointers:
    """The pointers to the versions of a registry, as one program writes and removes them.

    A version goes with its last pointer in a folder, as a file would, unless an alias, a tag or a descendant holds it. A
    pointer goes before its version, so that a program that is killed leaves none that leads nowhere.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._folders: set[str] = set()

    def write(self, path: str, checkpoint: Checkpoint) -> None:
        """Let a path point at a version, durably. What had the path before is removed.

        Raises:
            StorageError: if the disk refuses; an earlier file is untouched.
        """
        place, replaced = Path(path).absolute(), read(path)
        make_folder(place.parent)
        if place.is_symlink():
            # Not the file that the link leads to.
            unlink(place)
        pointer = {"torch-registry": checkpoint.name, "id": checkpoint.id}
        write_file(place, json.dumps(pointer).encode())
        self._folders.add(str(place.parent))
        if replaced and replaced[1] != checkpoint.id:
            self._release(replaced, place.parent)

    def remove(self, path: str) -> None:
        """Remove a pointer, and the version if nothing else holds it; nothing happens where there is no pointer."""
        pointer, place = read(path), Path(path).absolute()
        if pointer is not None:
            unlink(place)
            self._release(pointer, place.parent)

    def remove_all(self, versions: Iterable[Version]) -> None:
        """Remove each pointer to some versions, in the folders that this program has written to."""
        going = {version.record.get("thinned-from") or version.id for version in versions}
        for folder in self._folders if going else ():
            for path, version_id in in_folder(folder).items():
                if version_id in going:
                    unlink(Path(path))

    def _release(self, pointer: tuple[str, str], folder: Path) -> None:
        """Remove a version that no pointer in a folder leads to, unless something else holds it."""
        if pointer[1] in in_folder(folder).values():
            return
        found = checkpoint_at(self._registry, pointer)
        if found is None:
            return
        home = self._registry.outbox.home if found.row.is_pending else self._registry
        if with_descendants(home.catalog, [found.id]):
            return
        try:
            remove(home.catalog, found.id)
        except (Conflict, NotFound) as reason:
            _logger.info("a version stays: %s", reason)
        except Unreachable as reason:
            _logger.warning(
                "%s; %s, which no file in %s points at any more, stays", reason, found.name, folder
            )
        else:
            collect_garbage(home.catalog, home.store)


def checkpoint_at(registry: Registry, pointer: tuple[str, str]) -> Checkpoint | None:
    """The version that a pointer leads to, also if it has been thinned since; None if it is gone."""
    name, version_id = pointer
    with contextlib.suppress(NotFound):
        return registry[version_id]
    with contextlib.suppress(NotFound):
        thinned = registry[name]
        return thinned if thinned.row.record.get("thinned-from") == version_id else None
    return None


def read(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """The name and the id of the version that a file points at; None for any other file, or none."""
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(_MAX_BYTES))
        name, version_id = found["torch-registry"], found["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (name, version_id) if isinstance(name, str) and is_digest(version_id) else None


def in_folder(folder: str | os.PathLike[str]) -> dict[str, str]:
    """The pointers in a folder: the id of each version by the path."""
    try:
        paths = [entry.path for entry in os.scandir(folder)]
    except OSError:
        return {}
    return {path: found[1] for path in sorted(paths) if (found := read(path))}
