"""Imported: what a file of another program holds, ready to be saved, and where it came from."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from registry.store.digest import digest
from registry.store.errors import Invalid, NotFound, storage_errors
from registry.store.pack import map_file
from registry.store.text import printable

Stamp = tuple[int, int, int]
"""Inode, size in bytes, and time of the last change in nanoseconds of a file."""


@dataclass(frozen=True)
class Imported:
    """What a file holds, ready for `Registry.save`; tensors are mapped from the file where possible."""

    components: dict[str, Any]
    epoch: int | None = None
    step: int | None = None
    loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    source: dict[str, Any] = field(default_factory=dict)
    """File name, format, size and digest (for shards: of the index), and the layout of a `.pt` file."""
    stamps: Mapping[Path, Stamp] = field(default_factory=dict, repr=False)
    """The stamp of every file that was read, as it was before the reading."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """How its network is made again, and how many processes saved it, where the file says so."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Why something in a folder is not kept, by its name; empty for a file."""


def file_status(path: Path) -> os.stat_result:
    """Status of a regular file that is not empty; links are followed.

    Raises:
        NotFound: if there is nothing at `path`.
        Invalid: if it is a folder, a pipe, a device or an empty file.
        StorageError: if the system refuses.
    """
    shown = printable(str(path))
    try:
        with storage_errors(path):
            try:
                status = os.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                raise NotFound(f"{shown}: there is no such file") from None
    except ValueError:
        raise Invalid(f"{shown}: a path cannot hold this character") from None
    if not stat.S_ISREG(status.st_mode):
        raise Invalid(f"{shown}: not a regular file")
    if status.st_size == 0:
        raise Invalid(f"{shown}: the file is empty")
    return status


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp of a file, by its status."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def source_of(path: Path, status: os.stat_result, form: str, data: mmap.mmap | None = None) -> dict[str, Any]:
    """What a checkpoint records of the file that it came from: its name without the folder, and its content.

    Args:
        status: of the file, as it was before the reading.
        form: the name of the file's format.
        data: the file's bytes, if they are mapped already.
    """
    data = data or map_file(Path(os.path.realpath(path)), status.st_size)
    with memoryview(data) as whole:
        return {"file": printable(path.name), "format": form, "size": status.st_size, "digest": digest(whole)}


def check_content(path: Path, components: Mapping[str, Any]) -> None:
    """Refuse what is no checkpoint at all, such as a number or an empty dict.

    Raises:
        Invalid: if there is no component of a known name but `model` and `extra`, and no tensor in these.
    """
    if set(components) <= {"model", "extra"} and not any(
        isinstance(value, torch.Tensor) for value in values(components)
    ):
        raise Invalid(f"{printable(str(path))}: holds no tensors, so it is not a checkpoint")


def values(tree: Any) -> Iterator[Any]:
    """Every value in a tree, dict keys included, without recursion; endless if the tree holds itself."""
    stack = [tree]
    while stack:
        value = stack.pop()
        yield value
        if isinstance(value, Mapping):
            for key, item in value.items():
                stack += (item, key)
            stack += vars(value).values() if hasattr(value, "__dict__") else ()
        elif isinstance(value, list | tuple | set):
            stack += value
