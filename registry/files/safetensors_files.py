"""`.safetensors` files: the tensors of one component, by name, and a table of strings beside them.

The format is <https://github.com/huggingface/safetensors#format>. It cannot tie tensors: tied ones are written once for
each name.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from registry.files.foreign import kind_of
from registry.files.imported import Imported, check_content, file_status, source_of, stamp_of
from registry.store import header
from registry.store.dtypes import ELEMENT_TYPES, from_safetensors, to_safetensors
from registry.store.errors import Invalid, Unsupported, naming
from registry.store.loading import view
from registry.store.manifest import TensorInfo
from registry.store.pack import map_file
from registry.store.places import open_regular
from registry.store.text import printable, quoted
from registry.store.tree import Leaf

if TYPE_CHECKING:
    from registry.checkpoints.checkpoint import Checkpoint
    from registry.files.outgoing import Outgoing, Write

_ALIGNMENT = 64
"""The first tensor starts at a multiple of this many bytes."""

_MAX_METADATA = 16 << 10
"""Characters of the longest `__metadata__`, as JSON, that the catalog keeps; a longer one becomes component `extra`."""


def read(path: Path) -> Imported:
    """What a safetensors file holds: the component `model`, its tensors mapped from the file copy-on-write.

    Raises:
        NotFound: if there is no such file.
        Invalid: if a rule of the format is broken, or it holds no tensors.
        Unsupported: if torch has no such element type.
    """
    status = file_status(path)
    with naming(printable(str(path))):
        data, tensors, metadata = _contents(path, status.st_size)
    source = source_of(path, status, "safetensors", data=data)
    components: dict[str, Any] = {"model": tensors}
    if len(json.dumps(metadata)) > _MAX_METADATA or any(key.startswith("$") for key in metadata):
        components["extra"] = {"metadata": metadata}
    elif metadata:
        source["metadata"] = metadata
    check_content(path, components)
    return Imported(components, source=source, stamps={path: stamp_of(status)})


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name; raises as `read`, but does not name the file."""
    return _contents(path, file_status(path).st_size)[1]


def write(checkpoint: Checkpoint, component: str | None, file: Outgoing, *, verify: bool = True) -> None:
    """Write one component of a checkpoint, `model` unless told otherwise, as a safetensors file.

    Tensors are written contiguous, those with the largest elements first, so that each starts at a multiple of its
    element's size.

    Raises:
        NotFound: if the checkpoint has no such component.
        Unsupported: if the component is no dict of tensors, or the format has no such dtype or name.
        Corrupt: if a stored byte is not what was saved.
        Conflict, StorageError: as `Outgoing.opened`.
    """
    name = component or "model"
    leaves = flat(checkpoint.state_dict(name, verify=verify), name)
    with file.opened(sum(leaf.size for leaf in leaves.values())) as take:
        write_tensors(leaves, metadata_of(checkpoint, name), take)


def _contents(path: Path, size: int) -> tuple[mmap.mmap, dict[str, torch.Tensor], dict[str, str]]:
    """A safetensors file mapped copy-on-write, its tensors as views of that, and its `__metadata__`.

    Raises:
        Invalid: if a rule of the format is broken.
        Unsupported: if torch has no such element type.
    """
    real = Path(os.path.realpath(path))
    with open_regular(real) as file:
        head = file.read(8)
        try:
            head += file.read(header.announced_length(head, size))
            parsed = header.parse(head, size)
        except Invalid as error:
            kind = kind_of(real)
            if kind:
                raise kind from error
            if head[:4] == b"PK\x03\x04" or head[:2] == b"\x80\x02":
                raise Invalid("a file of torch.save, not safetensors", "rename it to end in .pt") from error
            raise
    data = map_file(real, size)
    return data, {entry.name: _tensor(data, entry) for entry in parsed.entries}, dict(parsed.metadata)


def _tensor(data: mmap.mmap, entry: header.Entry) -> torch.Tensor:
    found = from_safetensors(entry.code, entry.shape)
    if found is None:
        raise Unsupported(
            f"tensor {quoted(entry.name)} has dtype {entry.code} and shape {list(entry.shape)}, which torch cannot "
            "represent",
            "convert it with the program that wrote it",
        )
    dtype, shape = found
    info = TensorInfo(dtype, shape, "")
    start, size = entry.start, entry.end - entry.start
    # The format allows a tensor at any byte, but not every processor does.
    if size and start % ELEMENT_TYPES[dtype].size:
        with memoryview(data) as whole:
            tensor = view(memoryview(bytearray(whole[start : start + size])), info, 0)
    else:
        tensor = view(data, info, start)
    if dtype == "bool" and size and bool((tensor.view(torch.uint8) > 1).any()):
        raise Invalid(f"tensor {quoted(entry.name)} is BOOL but holds bytes other than 0 and 1")
    return tensor


def metadata_of(checkpoint: Checkpoint, component: str) -> dict[str, str]:
    """`__metadata__` for a safetensors file: what the imported one had, for its own component."""
    source = checkpoint.record.get("source") or {}
    kept: Mapping[str, Any] = {}
    if source.get("format") == "safetensors" and component == "model":
        kept = source.get("metadata") or {}
        if "extra" in checkpoint.components:
            kept = checkpoint.state_dict("extra").get("metadata", {})
    return {"format": "pt", **{str(key): str(value) for key, value in kept.items()}}


def flat(tree: Any, component: str) -> dict[str, Leaf]:
    """The tensors of a component by name.

    Raises:
        Unsupported: for what the format cannot hold, naming it.
    """
    if not isinstance(tree, dict):
        raise Unsupported(f"{quoted(component)} is not a dict of tensors", "export it to a .pt file")
    leaves = {}
    for name, value in tree.items():
        where = quoted(f"{component}/{name}")
        if not isinstance(value, torch.Tensor):
            raise Unsupported(
                f"{where} is of type {type(value).__name__}, and a safetensors file holds tensors only",
                "export to a .pt file",
            )
        if not isinstance(name, str) or name == "__metadata__":
            raise Unsupported(f"{where}: a safetensors file cannot hold this name", "export to a .pt file")
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
            f"{where}: safetensors has no dtype for {leaf.dtype} of shape {list(leaf.shape)}",
            "export to a .pt file",
        )
    return found


def write_tensors(leaves: Mapping[str, Leaf], metadata: Mapping[str, str], take: Write) -> None:
    """Write tensors, and a table of strings, as the bytes of a safetensors file."""
    ordered = sorted(leaves.items(), key=lambda item: (-ELEMENT_TYPES[item[1].dtype].size, item[0]))
    entries = []
    position = 0
    for name, leaf in ordered:
        code, shape = _code_and_shape(leaf)
        entries.append((name, code, shape, position, position + leaf.size))
        position += leaf.size
    text = header.render(entries, metadata)
    take(header.framed(text, -(-(len(text) + 8) // _ALIGNMENT) * _ALIGNMENT))
    for _, leaf in ordered:
        take(leaf.buffer())
