"""Places: what kind of file system a folder is on, and where in a registry a user's own file does not belong."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from registry.store.errors import Invalid
from registry.store.text import printable

_SETTINGS = "registry.toml"
_FOLDERS = frozenset(("journal", "manifests", "packs", "tmp"))
_FILES = ("catalog.sqlite", _SETTINGS)
"""What a registry keeps to itself: its folders, and how the names of its files begin."""
_LOCAL = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "tmpfs", "ramfs", "overlay", "jfs")
)
"""File systems of one machine: what one program writes, another sees at once, the time of the change included."""


def refuse_inside(path: Path) -> None:
    """See that a user's own file does not come to lie among those that a registry keeps to itself.

    Args:
        path: without links.

    Raises:
        Invalid: if it would.
    """
    for folder in path.parents:
        name = path.relative_to(folder).parts[0]
        if (name in _FOLDERS or name.startswith(_FILES)) and (folder / _SETTINGS).is_file():
            raise Invalid(f"{printable(str(path))}: {name} belongs to the registry; choose another place")


def is_local(path: Path) -> bool:
    """Whether a folder is on a file system that is known to belong to this machine alone."""
    try:
        return _kind(os.path.realpath(path), os.stat(path).st_dev) in _LOCAL
    except OSError:
        return False


@functools.lru_cache(maxsize=64)
def _kind(place: str, _device: int) -> str:
    """The kind of file system; empty if it cannot be told."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            best, kind = "", ""
            for line in mounts:
                left, _, right = line.partition(" - ")
                point = left.split(" ")[4].encode().decode("unicode_escape", "replace")
                inside = point == "/" or place == point or place.startswith(point + "/")
                if inside and len(point) >= len(best):
                    best, kind = point, right.split(" ")[0]
        return kind
    except (OSError, IndexError):
        return ""
