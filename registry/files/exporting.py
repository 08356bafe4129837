"""Exporting: a checkpoint, or one component of it, as a file that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from registry.files.formats import SUFFIXES, format_of, listed
from registry.files.outgoing import Outgoing
from registry.progress import Progress, silent
from registry.store.errors import Unsupported
from registry.store.text import printable

if TYPE_CHECKING:
    from registry.checkpoints.checkpoint import Checkpoint


def export(
    checkpoint: Checkpoint,
    path: Path | str,
    *,
    component: str | None = None,
    force: bool = False,
    verify: bool = True,
    progress: Progress = silent,
) -> Path:
    """Write a checkpoint to a file, whole or not at all.

    A symbolic link at `path` is followed; the file's mode follows the umask.

    >>> export(registry["lenet5@best"], "lenet5.safetensors")  # doctest: +SKIP
    PosixPath('lenet5.safetensors')

    Args:
        path: its suffix decides the format, a row of `registry.files.formats.FORMATS`.
        component: write this component alone. By default a file holds the whole checkpoint, or `model` if the format
            holds one component.
        force: replace a file that is there.
        verify: check the digests of what is read.
        progress: called with the bytes of tensors that are written, and of all.

    Returns:
        `path`, as a Path.

    Raises:
        Conflict: if there is a file and `force` is false, or something at `path` that is no file.
        NotFound: if the folder or the component does not exist.
        Unsupported: if the suffix is unknown, or the format cannot hold a value, naming its path.
        Corrupt: if a stored byte is not what was saved.
        StorageError: if the system refuses; nothing is left behind.
    """
    path = Path(path)
    form = format_of(path.suffix)
    if form is None:
        raise Unsupported(
            f"{printable(str(path))}: unknown kind of file; name one that ends in {listed(SUFFIXES)}"
        )
    form.write(checkpoint, component, Outgoing(path, force=force, progress=progress), verify=verify)
    return path
