"""Exporting: a checkpoint, or one component of it, as a file or a folder that other programs read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from registry.files.formats import SUFFIXES, format_of, listed
from registry.files.outgoing import Outgoing
from registry.progress import Progress, silent
from registry.store.errors import Invalid, Unsupported
from registry.store.text import printable

if TYPE_CHECKING:
    from registry.checkpoints.checkpoint import Checkpoint


def export(
    checkpoint: Checkpoint,
    path: Path | str,
    *,
    component: str | None = None,
    force: bool = False,
    max_shard_size: int | None = None,
    verify: bool = True,
    progress: Progress = silent,
) -> Path:
    """Write a checkpoint to a file, or to a folder, whole or not at all.

    A symbolic link at `path` is followed; the file's mode follows the umask. A path without a suffix, or with a slash at its
    end, is a folder: see `registry.files.folder_writing.export_folder`.

    >>> export(registry["lenet5@best"], "lenet5.safetensors")  # doctest: +SKIP
    PosixPath('lenet5.safetensors')

    Args:
        path: its suffix decides the format, a row of `registry.files.formats.FORMATS`.
        component: write this component alone. By default a file holds the whole checkpoint, or `model` if the format
            holds one component.
        force: replace a file that is there; a folder is never replaced.
        max_shard_size: bytes of tensors in one file of a folder, 5 GB by default.
        verify: check the digests of what is read.
        progress: called with the bytes of tensors that are written, and of all.

    Returns:
        `path`, as a Path.

    Raises:
        Conflict: if there is a file and `force` is false, something at `path` that is no file, or a folder that is not
            empty.
        Invalid: if `max_shard_size` is given for a file.
        NotFound: if the folder or the component does not exist.
        Unsupported: if the suffix is unknown, or the format cannot hold a value, naming its path.
        Corrupt: if a stored byte is not what was saved.
        StorageError: if the system refuses; nothing is left behind.
    """
    is_folder = names_folder(path)
    path = Path(path)
    if is_folder:
        # Lazy: loads torch.
        from registry.files.folder_writing import SHARD, export_folder

        return export_folder(
            checkpoint,
            path,
            component=component,
            max_shard_size=SHARD if max_shard_size is None else max_shard_size,
            verify=verify,
            progress=progress,
        )
    form = format_of(path.name)
    if form is None:
        raise Unsupported(
            f"{printable(str(path))}: unknown kind of file",
            f"name one that ends in {listed(SUFFIXES)}, or end it in / for a folder",
        )
    if max_shard_size is not None:
        raise Invalid(f"{printable(str(path))}: only a folder has shards", "end it in / for a folder")
    form.write(checkpoint, component, Outgoing(path, force=force, progress=progress), verify=verify)
    return path


def names_folder(path: Path | str) -> bool:
    """Whether a checkpoint that is exported to this path becomes a folder: a name without a suffix, or with a / at its end."""
    if str(path).endswith(os.sep):
        return True
    path = Path(path)
    return format_of(path.name) is None and (not path.suffix or path.is_dir())
