"""Sharded trees: how the flat state dict of `torch.distributed.checkpoint` lies in the trees of a checkpoint, and back.

What torch keeps in a pickled `.metadata` file is in the checkpoint's manifest here, as JSON: which name of the flat
state dict is where in the trees, and which shards make up each tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.distributed.checkpoint.storage import WriteResult

from registry.store.errors import Corrupt, Invalid, Unsupported
from registry.store.manifest import Listed, Manifest, TensorInfo, renumbered, slots_of
from registry.store.pack import PackInfo
from registry.store.text import quoted
from registry.store.tree import torch_type

RECORD = "dcp"
"""The key of a manifest's record that says which flat name is where."""

KeyPath = tuple[str | int, ...]
"""The keys that lead to a place in a state dict or in the trees of a checkpoint."""


class Share(NamedTuple):
    """What one process has stored: its distinct tensors, and the pack with those that were new."""

    tensors: Sequence[TensorInfo]
    pack: PackInfo | None


class Piece(NamedTuple):
    """One item that a process has stored: its document, which refers to tensors of its share."""

    document: Any
    share: Share


class Tree:
    """The components that are made from flat names and their paths, and the record of where each name went.

    Args:
        metadata: what the planner says of each flat name.
        results: what each process has stored; `storage_data` of each is a `Piece`.

    Attributes:
        components: documents by name.
        record: `tensors` and `values` give the place in the trees of each flat name. `paths` gives the planner's own
            path of a name where that is not its place; it is None if the planner has no paths.

    Raises:
        Unsupported: if the planner keeps data of its own.
        Invalid: if a plain value has no place beside the components.
    """

    def __init__(self, metadata: Metadata, results: Sequence[Sequence[WriteResult]]) -> None:
        self._pieces: dict[MetadataIndex, Any] = {}
        base = 0
        for rank in filter(None, results):
            for result in rank:
                document = renumbered(result.storage_data.document, base.__add__)
                self._pieces[result.index] = document
            base += len(rank[0].storage_data.share.tensors)
        planned = _paths(metadata)
        places = _places(metadata.state_dict_metadata, planned or {}, self._document)
        self.record: dict[str, Any] = {"tensors": {}, "values": {}}
        self.record["paths"] = planned if planned is None else {}
        tree: dict[Any, Any] = {}
        for name, place in places.items():
            about = metadata.state_dict_metadata[name]
            kind = "values" if isinstance(about, BytesStorageMetadata) else "tensors"
            self.record[kind][name] = list(place)
            if planned is not None and planned.get(name) != place:
                self.record["paths"][name] = list(planned[name]) if name in planned else None
            inside = tree
            for key in place[:-1]:
                inside = inside.setdefault(key, {})
            inside[place[-1]] = _Document(self._document(name, about))
        self.components = {str(name): _as_document(node) for name, node in tree.items()}

    def _document(self, name: str, about: Any) -> Any:
        if isinstance(about, BytesStorageMetadata):
            return self._pieces[MetadataIndex(name)]
        shards = [
            (chunk, self._pieces[MetadataIndex(name, chunk.offsets)]["$tensor"]) for chunk in about.chunks
        ]
        if len(shards) == 1 and shards[0][0].sizes == about.size:
            return {"$tensor": shards[0][1]}
        filled = [(chunk, slot) for chunk, slot in shards if chunk.sizes.numel()] or shards[:1]
        return {"$shards": [[list(chunk.offsets), slot] for chunk, slot in filled], "shape": list(about.size)}


class FlatNames:
    """The flat names of a checkpoint's state dict, as `dcp` sees it.

    Attributes:
        tensors: what the manifest lists of each tensor, by flat name.
        values: documents of everything else, by flat name.

    Raises:
        Corrupt: if the record does not fit the manifest.
    """

    def __init__(self, manifest: Manifest) -> None:
        record = manifest.record[RECORD]
        self._record = record
        self._sizes = [info.shape for info in manifest.tensors]
        self.tensors: dict[str, Listed] = {}
        self.values: dict[str, Any] = {}
        try:
            for name, place in record["tensors"].items():
                # Components of an older version may have been dropped.
                if place[0] in manifest.components:
                    (self.tensors[name],) = manifest.entries({name: _at(manifest.components, place)})
            for name, place in record["values"].items():
                if place[0] in manifest.components:
                    self.values[name] = _at(manifest.components, place)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise Corrupt(f"the manifest's list of names is malformed: {error}") from error

    def metadata(self) -> Metadata:
        """What a planner of torch needs to know of the checkpoint: each tensor's dtype, shape and shards."""
        names: dict[str, Any] = {name: BytesStorageMetadata() for name in self.values}
        for name, one in self.tensors.items():
            shape = torch.Size(one.info.shape)
            properties = TensorProperties(dtype=torch_type(one.info.dtype))
            names[name] = TensorStorageMetadata(properties, shape, [*self._chunks(one)])
        paths = self._record["paths"]
        if paths is not None:
            places = {**self._record["tensors"], **self._record["values"]}
            changed = {name: paths.get(name, place) for name, place in places.items() if name in names}
            paths = {name: tuple(path) for name, path in changed.items() if path is not None}
        return Metadata(names, paths)

    def slots(self, item: ReadItem) -> list[int]:
        """The positions of the tensors that an item is read from."""
        name, offset = item.storage_index.fqn, item.storage_index.offset
        if item.type == LoadItemType.BYTE_IO:
            return [slot for _, slot in slots_of({"": self.values[name]})]
        shards = self.tensors[name].shards
        return [slot for offsets, slot in shards if offsets is None or offsets == tuple(offset or ())]

    def _chunks(self, one: Listed) -> Iterator[ChunkStorageMetadata]:
        if one.is_whole:
            shape = torch.Size(one.info.shape)
            yield ChunkStorageMetadata(torch.Size([0] * len(shape)), shape)
            return
        for offsets, slot in one.shards:
            yield ChunkStorageMetadata(torch.Size(offsets or ()), torch.Size(self._sizes[slot]))


class _Document(NamedTuple):
    """A leaf of a tree that is a document already."""

    document: Any


def _as_document(node: Any) -> Any:
    """The document of a node; keys that are all whole numbers make a list."""
    if isinstance(node, _Document):
        return node.document
    if node and all(isinstance(key, int) for key in node):
        return [_as_document(node[i]) if i in node else None for i in range(max(node) + 1)]
    if any(str(key).startswith("$") for key in node):
        return {"$dict": [[key, _as_document(child)] for key, child in node.items()]}
    return {str(key): _as_document(child) for key, child in node.items()}


def _paths(metadata: Metadata) -> dict[str, KeyPath] | None:
    """The path in the user's state dict of each flat name; None where the planner did not flatten."""
    data = metadata.planner_data
    if data is None:
        return None
    if isinstance(data, Mapping) and all(
        isinstance(path, tuple | list) and all(isinstance(key, str | int) for key in path)
        for path in data.values()
    ):
        return {str(name): tuple(path) for name, path in data.items()}
    raise Unsupported(
        "the planner keeps data of its own, which is not the path of each name", "use another planner"
    )


def _places(
    names: Mapping[str, Any], paths: Mapping[str, KeyPath], document: Callable[[str, Any], Any]
) -> dict[str, KeyPath]:
    """Where in the components' trees each flat name goes.

    A name at the top that is no tree goes into `extra`, or into `model` if there is no other component.
    """
    found = {name: paths.get(name, (name,)) for name in names}
    loose = {
        name for name, path in found.items() if len(path) == 1 and not _is_tree(document(name, names[name]))
    }
    others = {path[0] for name, path in found.items() if name not in loose}
    home = "extra" if others else "model"
    taken = {
        path[1] for name, path in found.items() if name not in loose and path[0] == home and len(path) > 1
    }
    for name in loose:
        (key,) = found[name]
        if key in taken or (home,) in found.values():
            raise Invalid(f"{quoted(str(key))} stands beside {quoted(home)}", f"put it into {quoted(home)}")
        found[name] = (home, key)
    return found


def _is_tree(document: Any) -> bool:
    """Whether a document is that of a mapping, which can be a component."""
    if not isinstance(document, dict):
        return False
    tag = next(iter(document), "")
    return not tag.startswith("$") or tag in ("$dict", "$ordered")


def _at(components: Mapping[str, Any], place: Sequence[str | int]) -> Any:
    """The document at a place in the components' trees."""
    node: Any = components
    for key in place:
        if isinstance(node, Mapping) and "$dict" in node:
            node = dict(map(tuple, node["$dict"]))
        node = node[key]
    return node
