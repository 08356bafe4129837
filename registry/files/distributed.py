"""Folders that torch.distributed.checkpoint wrote, by `dcp.save` or `dcp.async_save`, read in a single process.

The shards of a tensor become one tensor, and the flat names become the tree that was saved, as `dcp.load` gives it:
keys are text, and a tuple that holds tensors is a list. Nothing that a file names is run. What is made in memory is no larger than the files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from registry.files.distributed_metadata import Entry, Place, parse
from registry.files.imported import Imported, check_content, file_status, source_of, stamp_of
from registry.files.layouts import fields_of, split
from registry.files.shards import inside, read_whole
from registry.files.torch_files import read_torch_bytes
from registry.store.errors import Invalid, NotFound, RegistryError, naming, storage_errors
from registry.store.places import open_regular
from registry.store.text import printable, quoted
from registry.store.tree import encode

METADATA = ".metadata"
"""The file that says what is in the others; it is written last."""

PARTS = ".distcp"
"""What the names of the others end in."""

_NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,200}}{re.escape(PARTS)}")

_MAX_METADATA = 256 << 20


def read_distributed(path: Path) -> Imported:
    """What a folder of torch.distributed.checkpoint holds, by the path of its `.metadata`.

    The tree is taken apart as that of a `.pt` file. A value beside the tensors that cannot be stored, or that would need
    code to run, is left out and named.

    Raises:
        NotFound: if a file that the metadata names is not there.
        Invalid: if the metadata is malformed, names a file elsewhere, or the files hold something else.
        Unsupported: if the metadata needs code to run.
        StorageError: if the system refuses.
    """
    status = file_status(path)
    left_out: dict[str, str] = {}
    with naming(printable(str(path))):
        entries = parse(read_whole(path, _MAX_METADATA))
        folder = path.parent
        names = sorted({piece.place.file for entry in entries for piece in entry.pieces})
        files = {name: _file(folder, name) for name in names}
        stamps = {path: stamp_of(status)}
        sizes = {}
        for name, place in files.items():
            one = file_status(place)
            stamps[place], sizes[name] = stamp_of(one), one.st_size
        _check_lengths(entries, sizes)
        tree = _tree(entries, _values(entries, files, left_out))
    components, layout = split(tree)
    check_content(path, components)
    source = source_of(path, status, "torch.distributed") | {"shards": len(files), "layout": layout}
    return Imported(components, **fields_of(tree), source=source, stamps=stamps, left_out=left_out)


def _file(folder: Path, name: str) -> Path:
    """The path of a file that the metadata names."""
    if not _NAME.fullmatch(name):
        raise Invalid(f"names the file {quoted(name)}, which is not called like one that dcp.save writes")
    path = inside(folder, name)
    if not os.path.exists(path):
        raise NotFound(f"the file {quoted(name)} that it names is not there", "copy the whole folder")
    return path


def _check_lengths(entries: list[Entry], sizes: Mapping[str, int]) -> None:
    """Refuse places behind the end of their file."""
    for place in (piece.place for entry in entries for piece in entry.pieces):
        if place.offset + place.length > sizes[place.file]:
            size = sizes[place.file]
            raise Invalid(
                f"the file {quoted(place.file)} is cut short: it has {size:,} bytes", "copy it again"
            )


def _values(entries: list[Entry], files: Mapping[str, Path], left_out: dict[str, str]) -> dict[str, Any]:
    """The tensors and the other values, by flat name."""
    found: dict[str, Any] = {}
    for entry in entries:
        if entry.dtype is not None:
            found[entry.name] = _whole(entry, files)
            continue
        (piece,) = entry.pieces
        try:
            value = _read(files, piece.place)
            encode({entry.name: value})
            found[entry.name] = value
        except RegistryError as error:
            left_out[entry.name] = str(error)
    return found


def _whole(entry: Entry, files: Mapping[str, Path]) -> torch.Tensor:
    """A tensor, put together from its pieces."""
    whole: torch.Tensor | None = None
    for piece in entry.pieces:
        part = _read(files, piece.place)
        if (
            not isinstance(part, torch.Tensor)
            or part.dtype != entry.dtype
            or tuple(part.shape) != piece.sizes
        ):
            raise Invalid(
                f"{quoted(piece.place.file)} holds something else in the place of {quoted(entry.name)}"
            )
        if piece.sizes == entry.shape:
            return part
        if whole is None:
            whole = torch.empty(entry.shape, dtype=entry.dtype)
        box = tuple(
            slice(start, start + size) for start, size in zip(piece.offsets, piece.sizes, strict=True)
        )
        whole[box] = part
    return torch.empty(entry.shape, dtype=entry.dtype) if whole is None else whole


def _read(files: Mapping[str, Path], place: Place) -> Any:
    """What lies at a place, which is a file of `torch.save` in the file."""
    path = files[place.file]
    with open_regular(Path(os.path.realpath(path))) as file, storage_errors(path):
        os.lseek(file.fileno(), place.offset, os.SEEK_SET)
        data = file.read(place.length)
    return read_torch_bytes(data, f"{quoted(place.file)} from byte {place.offset:,}")


def _tree(entries: list[Entry], values: Mapping[str, Any]) -> Any:
    """The tree of all entries; one without a value is left out, in a list it is None."""
    root: dict[str | int, Any] = {}
    for entry in entries:
        node = root
        for key in entry.path[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise Invalid(f"{quoted(entry.name)} stands inside of another value")
        if entry.path[-1] in node:
            raise Invalid(f"{quoted(entry.name)} stands in the place of another value")
        node[entry.path[-1]] = entry
    return _plain(root, values)


def _plain(node: Any, values: Mapping[str, Any]) -> Any:
    """A node of the tree with its values; keys that are numbers make a list."""
    if isinstance(node, Entry):
        return values.get(node.name)
    kinds = {type(key) for key in node}
    if kinds == {int}:
        if max(node) != len(node) - 1:
            raise Invalid("a list in it has gaps")
        return [_plain(node[place], values) for place in range(len(node))]
    if kinds != {str}:
        raise Invalid("the same thing is a list and a dict in it")
    return {
        key: _plain(child, values)
        for key, child in node.items()
        if not isinstance(child, Entry) or child.name in values
    }
