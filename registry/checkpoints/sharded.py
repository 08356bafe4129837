"""Storage for `torch.distributed.checkpoint`: checkpoints that several processes write, each its own shards.

    import torch.distributed.checkpoint as dcp

    dcp.save(state, storage_writer=RegistryWriter(registry, "gpt", epoch=1))
    dcp.load(state, storage_reader=RegistryReader(registry, "gpt"))

What torch keeps in a pickled `.metadata` file is in the checkpoint's manifest here, as JSON: which name of the flat
state dict is where in the trees, and which shards make up each tensor.
"""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from registry.checkpoints.checkpoint import Checkpoint
from registry.checkpoints.saving import Facts, save
from registry.log.reference import check_name, parse_reference
from registry.store.errors import Conflict, Corrupt, Incompatible, Invalid, RegistryError, Unsupported
from registry.store.manifest import Listed, Manifest, TensorInfo, renumbered, slots_of
from registry.store.pack import PackInfo
from registry.store.store import Written
from registry.store.text import quoted
from registry.store.tree import box, decode, torch_type

if TYPE_CHECKING:
    from registry.home import Home
    from registry.log.metrics import Monitor

RECORD = "dcp"
"""The key of a manifest's record that says which flat name is where."""

Path = tuple[str | int, ...]


class RegistryWriter(StorageWriter):
    """Lets `dcp.save` and `dcp.async_save` write a version of a model.

    Each process writes the shards that it has, in a pack of its own; what is stored already is not written again.
    Then the first process makes the version known, in one transaction: it is there for all, or for nobody. The
    mappings at the top of the state dict become components (`model`, `optimizer`); plain values beside them go to
    `extra`, and a state dict without any mapping is the component `model`.

    A writer may be used again, for the next version. `dcp.save(state, checkpoint_id="gpt", storage_writer=writer)`
    names the model where the writer does not.

    Args:
        registry: in a folder that all processes share.
        model: the model that gets a new version.
        about: what `Registry.save` takes to describe a version: `epoch`, `step`, `loss`, `metrics`, `config`, `run`
            and so on. `Run.sharded` fills it in.
        best_by: as in `Registry.save`.
        saved: called with the checkpoint, in the process that makes it known.
    """

    def __init__(
        self,
        registry: Home,
        model: str | None = None,
        *,
        saved: Callable[[Checkpoint], object] | None = None,
        best_by: Monitor | None = None,
        **about: Any,
    ) -> None:
        self.registry = registry
        self.model = check_name(model, "model") if model is not None else None
        self.checkpoint: Checkpoint | None = None
        self._about = Facts(**about)
        self._best_by = best_by
        self._saved = saved

    def __getstate__(self) -> dict[str, Any]:
        """For `async_save` in a process of its own, which cannot call back into this one."""
        return self.__dict__ | {"_saved": None, "checkpoint": None}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another save; an id names its model."""
        if checkpoint_id is not None:
            self.model = check_name(str(checkpoint_id), "model")

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """
        Raises:
            Invalid: if no model is named.
            Unsupported: for `use_collectives=False`, under which nobody would know that all is written.
        """
        self.checkpoint = None
        if self.model is None:
            raise Invalid("which model? name it: RegistryWriter(registry, 'gpt'), or checkpoint_id='gpt'")
        if not kwargs.get("use_collectives", True):
            raise Unsupported(
                "use_collectives=False: a version is made once all processes have written theirs"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write what is new of the items of this process.

        Raises:
            Unsupported: naming what cannot be stored; nothing is written then.
        """
        state = self.registry.store.encode({_shown(item): _value(planner, item) for item in plan.items})
        pack = self.registry.store.add(state)
        share = _Share(state.tensors(), pack)
        results = []
        for item in plan.items:
            document = state.components[_shown(item)]
            size = sum(share.tensors[slot].size for _, slot in slots_of({"": document}))
            results.append(WriteResult(item.index, size, _Piece(document, share)))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Make the version known; in the first process alone.

        Raises:
            RegistryError: if that fails; no version is made.
        """
        assert self.model is not None
        shares = [rank[0].storage_data.share for rank in results if rank]
        packs = list({share.pack.digest: share.pack for share in shares if share.pack}.values())
        try:
            tree = _Tree(metadata, results)
            written = Written(tree.components, [info for share in shares for info in share.tensors], packs)
            together = {"processes": len(results)} if len(results) > 1 else {}
            provenance = {**together, **(self._about.provenance or {})}
            about = replace(self._about, provenance=provenance, dcp=tree.record)
            saved = save(self.registry, self.model, written, about, best_by=self._best_by)
        except BaseException:
            named = self.registry.catalog.ledger().packs  # The log may have the version all the same.
            for pack in packs:
                if pack.digest not in named:
                    self.registry.store.discard_pack(pack.digest)
            raise
        self.checkpoint = saved
        metadata.storage_data = saved.name  # which dcp.save returns in every process
        if self._saved:
            self._saved(saved)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self.model, save_id=str(uuid.uuid4()))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether an id can name a model."""
        try:
            check_name(str(checkpoint_id), "model")
        except RegistryError:
            return False
        return True


class RegistryReader(StorageReader):
    """Lets `dcp.load` read a checkpoint that `RegistryWriter` wrote, in as many processes as there are now.

    Each process reads the shards that it needs, or the parts of them, from mapped packs. Nothing is changed before
    all that a process reads is verified.

    Args:
        registry: in a folder that all processes share.
        reference: the checkpoint; `dcp.load(state, checkpoint_id="gpt:v3", storage_reader=reader)` names it too.
        verify: check every byte against its digest.

    Raises:
        NotFound: if there is no such checkpoint.
        Incompatible: if it is not one that `dcp.save` wrote.
    """

    def __init__(self, registry: Home, reference: str | None = None, *, verify: bool = True) -> None:
        self.registry = registry
        self.checkpoint: Checkpoint | None = None
        self._verify = verify
        if reference is not None:
            self._open(reference)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another load; an id names the checkpoint."""
        if checkpoint_id is not None:
            self._open(str(checkpoint_id))

    def _open(self, reference: str) -> None:
        checkpoint = Checkpoint.named(self.registry, reference)
        self._manifest = self.registry.store.manifest(checkpoint.id)
        if RECORD not in self._manifest.record:
            raise Incompatible(
                f"{checkpoint.name} was not written by dcp.save; restore it before the network is sharded: "
                f"registry['{checkpoint.name}'].restore(model=model)"
            )
        self._flat = _Flat(self._manifest)
        self.checkpoint = checkpoint

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self.checkpoint is None:
            raise Invalid(
                "which checkpoint? name it: RegistryReader(registry, 'gpt'), or checkpoint_id='gpt'"
            )
        return self._flat.metadata()

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        assert self.checkpoint is not None
        return replace(plan, storage_data=self.checkpoint.name)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """
        Raises:
            Conflict: if the processes have found different checkpoints under one name.
        """
        names = sorted({str(plan.storage_data) for plan in plans})
        if len(names) > 1:
            raise Conflict(
                f"the processes would read different checkpoints, {', '.join(names)}; name the version"
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy into the live tensors what this process asks for.

        Raises:
            Corrupt: if a byte is not what was saved; nothing was changed in this process.
        """
        assert self.checkpoint is not None
        slots = {slot: item.storage_index.fqn for item in plan.items for slot in self._flat.slots(item)}
        store, id, label = self.registry.store, self.checkpoint.id, self.checkpoint.name
        tensors = store.tensors_at(id, slots, verify=self._verify, label=label)
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                value = decode(self._flat.values[item.storage_index.fqn], tensors.__getitem__)
                planner.load_bytes(item, _as_planners_expect(value))
            else:
                (slot,) = self._flat.slots(item)
                part = box(tensors[slot], item.storage_offsets, item.lengths)
                target = planner.resolve_tensor(item).detach()
                target.copy_(part)
                planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether an id can be a reference."""
        try:
            parse_reference(str(checkpoint_id))
        except RegistryError:
            return False
        return True


# -- what a process writes -----------------------------------------------------------------------------------


class _Share(NamedTuple):
    """What one process has stored: its distinct tensors, and the pack with those that were new."""

    tensors: Sequence[TensorInfo]
    pack: PackInfo | None


class _Piece(NamedTuple):
    """One item that a process has stored: its document, which refers to tensors of its share."""

    document: Any
    share: _Share


def _shown(item: WriteItem) -> str:
    """What to call an item in an error; different for those of a process."""
    index = item.index
    is_shard = item.type == WriteItemType.SHARD
    return f"{index.fqn} at {list(index.offset)}" if is_shard and index.offset else index.fqn


def _value(planner: SavePlanner, item: WriteItem) -> Any:
    """What is to be stored for an item."""
    if item.type != WriteItemType.BYTE_IO:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, torch.Tensor)
        return tensor.detach()
    own, usual = type(planner), DefaultSavePlanner
    if (
        isinstance(planner, usual)
        and own.resolve_data is usual.resolve_data
        and type(planner).transform_object is usual.transform_object
    ):
        return planner.lookup_object(
            item.index
        )  # as it is, where others hand out what torch.save makes of it
    data = planner.resolve_data(item)
    assert isinstance(data, io.BytesIO)
    data.seek(0)
    try:
        return torch.load(data, weights_only=True)
    except Exception as error:
        raise Unsupported(
            f"{item.index.fqn}: {own.__qualname__} makes bytes of it that are no plain values of torch.save; "
            "store tensors, numbers, strings, or dicts, lists and tuples of them"
        ) from error


def _as_planners_expect(value: Any) -> io.BytesIO:
    data = io.BytesIO()
    torch.save(value, data)
    data.seek(0)
    return data


# -- the trees of a checkpoint, and the flat names of its state dict -----------------------------------------


class _Tree:
    """The components that flat names and their paths make up, and the record of how.

    Attributes:
        components: documents by name.
        record: `tensors` and `values`, each with the place in the trees of every flat name; and `paths`, those of
            them that the planner knows as another path, or None if it knows none.
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


class _Document(NamedTuple):
    """A leaf of a tree that is a document already."""

    document: Any


def _as_document(node: Any) -> Any:
    if isinstance(node, _Document):
        return node.document
    if node and all(isinstance(key, int) for key in node):
        return [_as_document(node[i]) if i in node else None for i in range(max(node) + 1)]
    if any(str(key).startswith("$") for key in node):
        return {"$dict": [[key, _as_document(child)] for key, child in node.items()]}
    return {str(key): _as_document(child) for key, child in node.items()}


def _paths(metadata: Metadata) -> dict[str, Path] | None:
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
        "the planner keeps data of its own, which is not the path of each name; use another planner"
    )


def _places(
    names: Mapping[str, Any], paths: Mapping[str, Path], document: Callable[[str, Any], Any]
) -> dict[str, Path]:
    """Where in the components' trees each flat name goes."""
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
            raise Invalid(f"{quoted(str(key))} stands beside {quoted(home)}; put it in")
        found[name] = (home, key)
    return found


def _is_tree(document: Any) -> bool:
    """Whether a document is that of a mapping, which can be a component."""
    if not isinstance(document, dict):
        return False
    tag = next(iter(document), "")
    return not tag.startswith("$") or tag in ("$dict", "$ordered")


class _Flat:
    """The flat names of a checkpoint's state dict, as `dcp` sees it."""

    def __init__(self, manifest: Manifest) -> None:
        record = manifest.record[RECORD]
        self._record = record
        self._sizes = [info.shape for info in manifest.tensors]
        self.tensors: dict[str, Listed] = {}
        self.values: dict[str, Any] = {}
        try:
            for name, place in record["tensors"].items():
                if place[0] in manifest.components:  # those of an older version may have been dropped
                    (self.tensors[name],) = manifest.entries({name: _at(manifest.components, place)})
            for name, place in record["values"].items():
                if place[0] in manifest.components:
                    self.values[name] = _at(manifest.components, place)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise Corrupt(f"the manifest's list of names is malformed: {error}") from error

    def metadata(self) -> Metadata:
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


def _at(components: Mapping[str, Any], place: Sequence[str | int]) -> Any:
    node: Any = components
    for key in place:
        if isinstance(node, Mapping) and "$dict" in node:
            node = dict(map(tuple, node["$dict"]))
        node = node[key]
    return node
