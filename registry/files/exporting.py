"""Exporting: a checkpoint, or one component of it, as a file that other programs read.

A `.safetensors` file holds the tensors of one component. A `.pt` file holds the checkpoint in the layout of the
file that it was imported from, or else as a dict of its components and of `epoch`, `step`, `loss`, `metrics` and
`config` where they are recorded. Tensors come contiguous and without `requires_grad`; tied tensors stay tied in
a `.pt` file, and are written once for each name in a `.safetensors` file, which cannot tie.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.progress import Progress, silent
from registry.store import header
from registry.store.dtypes import ELEMENT_TYPES, to_safetensors
from registry.store.durable import Buffer, NewFile
from registry.store.errors import Conflict, Invalid, NotFound, Unsupported, fix, naming, storage_errors
from registry.store.places import refuse_inside
from registry.store.text import printable, quoted

if TYPE_CHECKING:
    from registry.checkpoints.checkpoint import Checkpoint
    from registry.store.tree import Leaf

_ALIGNMENT = 64
_HEAD = 64


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
        path: ends in `.safetensors`, or in `.pt`, `.pth`, `.ckpt` or `.bin`.
        component: write this component alone; a `.safetensors` file holds `model` unless told otherwise.
        force: replace a file that is there.
        verify: check the digests of what is read.
        progress: called with bytes of tensors, written and in all.

    Returns:
        `path`, as a Path.

    Raises:
        Conflict: if there is a file and `force` is false, or something at `path` that is no file.
        NotFound: if the folder or the component does not exist.
        Unsupported: if the suffix is unknown, or the format cannot hold a value, naming its path.
        Corrupt: if a stored byte is not what was saved.
        StorageError: if the system refuses; nothing is left behind.
    """
    from registry.files.torch_files import TORCH_SUFFIXES, write_torch_file

    path = Path(path)
    suffix = path.suffix.lower()
    if suffix != ".safetensors" and suffix not in TORCH_SUFFIXES:
        raise Unsupported(
            f"{printable(str(path))}: unknown kind of file; name one that ends in {', '.join(TORCH_SUFFIXES)} "
            "or .safetensors"
        )
    _check_target(path, force)
    if suffix == ".safetensors":
        name = component or "model"
        leaves = _flat(checkpoint.state_dict(name, verify=verify), name)
        total = sum(leaf.size for leaf in leaves.values())
        with _new_file(path, force, total, progress) as file:
            _write_safetensors(file, leaves, _metadata(checkpoint, name))
    else:
        tree = _tree(checkpoint, component, verify)
        contents = checkpoint.record["components"]
        total = sum(held["bytes"] for name, held in contents.items() if component in (None, name))
        with _new_file(path, force, total, progress) as file:
            write_torch_file(tree, file.write)
    return path


def _check_target(path: Path, force: bool) -> None:
    shown = printable(str(path))
    try:
        with storage_errors(path):
            target = Path(os.path.realpath(path))
            refuse_inside(target)
            try:
                status = os.stat(target)
            except (FileNotFoundError, NotADirectoryError):
                if not target.parent.is_dir():
                    raise NotFound(f"{printable(str(target.parent))}: there is no such folder") from None
                return
    except ValueError:
        raise Invalid(f"{shown}: a path cannot hold this character") from None
    if not stat.S_ISREG(status.st_mode):
        raise Conflict(f"{shown}: there is something that is not a regular file; choose another name")
    if not force:
        overwrite = fix("or overwrite it", force=True)
        raise Conflict(f"{shown}: the file exists; choose another name", overwrite)


class _Output:
    """A new file, its first bytes for the check that the disk kept them, and word of how far it is."""

    def __init__(self, file: NewFile, total: int, progress: Progress) -> None:
        self._file = file
        self._total = total
        self._progress = progress
        self._done = 0
        self.head = b""

    def write(self, data: Buffer) -> None:
        self.head += bytes(memoryview(data).cast("B")[: max(_HEAD - len(self.head), 0)])
        self._file.write(data)
        self._done += memoryview(data).nbytes
        self._progress(min(self._done, self._total), self._total)


@contextlib.contextmanager
def _new_file(path: Path, force: bool, total: int, progress: Progress) -> Iterator[_Output]:
    """A file beside its target that takes the target's name when the block ends well, and goes otherwise."""
    target = Path(os.path.realpath(path))
    with storage_errors(path):
        try:
            file = NewFile(target.parent, inner=0)
        except OSError as error:
            error.filename = str(target.parent)  # what refuses is the folder, not our temporary name
            raise
        try:
            output = _Output(file, total, progress)
            yield output
            _check_target(path, force)
            file.sync(output.head, read_only=False)
            file.publish(target, inner=0)
        except BaseException:
            file.discard()
            raise


def _tree(checkpoint: Checkpoint, component: str | None, verify: bool) -> Any:
    from registry.files.layouts import join

    if component is not None:
        return checkpoint.state_dict(component, verify=verify)
    components = checkpoint.load(verify=verify)
    source = checkpoint.record.get("source") or {}
    if source.get("format") == "torch" and "layout" in source:
        with naming(checkpoint.name):
            return join(source["layout"], components, is_thin="thinned-from" in checkpoint.record)
    metrics = {key: math.nan if value is None else value for key, value in checkpoint.metrics.items()}
    fields = {"epoch": checkpoint.epoch, "step": checkpoint.step, "loss": _loss(checkpoint)}
    recorded = {**fields, "metrics": metrics or None, "config": checkpoint.config or None}
    missing = {key for key, value in recorded.items() if value is not None} - set(components)
    return {**components, **{key: recorded[key] for key in recorded if key in missing}}


def _loss(checkpoint: Checkpoint) -> float | None:
    return math.nan if checkpoint.record.get("loss_is_nan") else checkpoint.loss


def _metadata(checkpoint: Checkpoint, component: str) -> dict[str, str]:
    """`__metadata__` for a safetensors file: what the imported one had, for its own component."""
    source = checkpoint.record.get("source") or {}
    kept: Mapping[str, Any] = {}
    if source.get("format") == "safetensors" and component == "model":
        kept = source.get("metadata") or {}
        if "extra" in checkpoint.components:
            kept = checkpoint.state_dict("extra").get("metadata", {})
    return {"format": "pt", **{str(key): str(value) for key, value in kept.items()}}


def _flat(tree: Any, component: str) -> dict[str, Leaf]:
    import torch

    from registry.store.tree import Leaf

    if not isinstance(tree, dict):
        raise Unsupported(f"{quoted(component)} is no dict of tensors; export it to a .pt file")
    leaves = {}
    for name, value in tree.items():
        where = quoted(f"{component}/{name}")
        if not isinstance(value, torch.Tensor):
            raise Unsupported(
                f"{where} is of type {type(value).__name__}, and a safetensors file holds tensors only; "
                "export to a .pt file"
            )
        if not isinstance(name, str) or name == "__metadata__":
            raise Unsupported(f"{where}: a safetensors file cannot hold this name; export to a .pt file")
        header.check_name(name)
        leaf = Leaf.of(value)
        leaves[name] = leaf
        _code_and_shape(leaf, where)
    return leaves


def _code_and_shape(leaf: Leaf, where: str = "") -> tuple[str, tuple[int, ...]]:
    """The safetensors dtype, and the shape in its elements."""
    found = to_safetensors(leaf.dtype, leaf.shape)
    if found is None:
        raise Unsupported(
            f"{where}: safetensors has no dtype for {leaf.dtype} of shape {list(leaf.shape)}; export to a .pt file"
        )
    return found


def _write_safetensors(file: _Output, leaves: Mapping[str, Leaf], metadata: Mapping[str, str]) -> None:
    """Largest alignment first, so that every tensor starts at a multiple of its element size."""
    ordered = sorted(leaves.items(), key=lambda item: (-ELEMENT_TYPES[item[1].dtype].size, item[0]))
    entries = []
    position = 0
    for name, leaf in ordered:
        code, shape = _code_and_shape(leaf)
        entries.append((name, code, shape, position, position + leaf.size))
        position += leaf.size
    text = header.render(entries, metadata)
    file.write(header.framed(text, -(-(len(text) + 8) // _ALIGNMENT) * _ALIGNMENT))
    for _, leaf in ordered:
        file.write(leaf.buffer())
