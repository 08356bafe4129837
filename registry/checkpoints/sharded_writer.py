"""The sharded writer: checkpoints of `torch.distributed.checkpoint`, of which each process writes its own shards.

import torch.distributed.checkpoint as dcp

dcp.save(state, storage_writer=RegistryWriter(registry, "gpt", epoch=1))
"""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from registry.checkpoints.checkpoint import Checkpoint
from registry.checkpoints.saving import Facts, save
from registry.checkpoints.sharded_trees import Piece, Share, Tree
from registry.log.reference import check_name
from registry.store.errors import Invalid, RegistryError, Unsupported
from registry.store.manifest import slots_of
from registry.store.store import Written

if TYPE_CHECKING:
    from registry.home import Home
    from registry.log.metrics import Monitor


_ORIGIN = ("config", "lineage", "run", "parent", "provenance")
"""The fields of a version that a session sets."""


class Session(Protocol):
    """What a run that makes versions with a writer decides about each; it can be pickled."""

    def origin(self, home: Home, first: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fields of a version that say where it comes from; `first` are those of the run's first one."""

    def retain(self, home: Home) -> None:
        """Remove, and thin, what the run's rules no longer keep."""


class RegistryWriter(StorageWriter):
    """Lets `dcp.save` and `dcp.async_save` write a version of a model.

    Each process writes the shards that it has, in a pack of its own; what is stored already is not written again.
    Then the first process makes the version known, in one transaction: all processes have it, or none does. The
    mappings at the top of the state dict become components (`model`, `optimizer`); plain values beside them go to
    `extra`, and a state dict without any mapping is the component `model`.

    A writer may be used again, for the next version. `dcp.save(state, checkpoint_id="gpt", storage_writer=writer)`
    names the model where the writer does not.

    Args:
        registry: the registry, in a folder that all processes share.
        model: the model that gets a new version.
        about: what `Registry.save` takes to describe a version: `epoch`, `step`, `loss`, `metrics`, `config`, `run`
            and so on. `Run.sharded` fills it in.
        best_by: as in `Registry.save`.
        saved: called with the checkpoint, in the process that makes it known.
        session: the run that the version belongs to. In `async_save` with a process of its own, too, it says what the
            version goes on from, and which older ones stay.
    """

    def __init__(
        self,
        registry: Home,
        model: str | None = None,
        *,
        saved: Callable[[Checkpoint], object] | None = None,
        best_by: Monitor | None = None,
        session: Session | None = None,
        **about: Any,
    ) -> None:
        self.registry = registry
        self.model = check_name(model, "model") if model is not None else None
        self.checkpoint: Checkpoint | None = None
        self._about = Facts(**about)
        self._best_by = best_by
        self._saved = saved
        self._session = session

    def __getstate__(self) -> dict[str, Any]:
        """For `async_save` in a process of its own, which cannot call back into this one."""
        return self.__dict__ | {"_saved": None, "checkpoint": None}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another save; `checkpoint_id` names its model."""
        if checkpoint_id is not None:
            self.model = check_name(str(checkpoint_id), "model")

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Begin a save in this process.

        Raises:
            Invalid: if no model is named.
            Unsupported: for `use_collectives=False`: no process would know when the others have written their shards.
        """
        self.checkpoint = None
        if self.model is None:
            raise Invalid("which model? name it: RegistryWriter(registry, 'gpt'), or checkpoint_id='gpt'")
        if not kwargs.get("use_collectives", True):
            raise Unsupported(
                "use_collectives=False cannot work: a version is made once all processes have written their parts"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the items of this process; tensors that are stored already are not written again.

        Raises:
            Unsupported: naming what cannot be stored; nothing is written then.
        """
        state = self.registry.store.encode({_shown(item): _value(planner, item) for item in plan.items})
        pack = self.registry.store.add(state)
        if pack and (shared := self.registry.catalog.shared):
            # The process that makes the version known may be on another host.
            shared.upload([pack.digest])
        share = Share(state.tensors(), pack)
        results = []
        for item in plan.items:
            document = state.components[_shown(item)]
            size = sum(share.tensors[slot].size for _, slot in slots_of({"": document}))
            results.append(WriteResult(item.index, size, Piece(document, share)))
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
            tree = Tree(metadata, results)
            written = Written(tree.components, [info for share in shares for info in share.tensors], packs)
            together = {"processes": len(results)} if len(results) > 1 else {}
            origin = {key: getattr(self._about, key) for key in _ORIGIN}
            if self._session:
                origin |= self._session.origin(self.registry, origin)
            origin["provenance"] = {**together, **(origin["provenance"] or {})}
            about = replace(self._about, **origin, dcp=tree.record)
            saved = save(self.registry, self.model, written, about=about, best_by=self._best_by)
        except BaseException:
            self.registry.catalog.discard([pack.digest for pack in packs])
            raise
        self.checkpoint = saved
        # In every process dcp.save returns it.
        metadata.storage_data = saved.name
        if self._saved:
            self._saved(saved)
        if self._session:
            self._session.retain(self.registry)

    def storage_meta(self) -> StorageMeta:
        """What torch records of where a checkpoint lies: the model, and an id for each save."""
        return StorageMeta(checkpoint_id=self.model, save_id=str(uuid.uuid4()))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether an id can name a model."""
        try:
            check_name(str(checkpoint_id), "model")
        except RegistryError:
            return False
        return True


def _shown(item: WriteItem) -> str:
    """What to call an item in an error; no two items of a process have the same name."""
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
        # This planner hands out the value itself; others hand out what torch.save makes of it.
        return planner.lookup_object(item.index)
    data = planner.resolve_data(item)
    assert isinstance(data, io.BytesIO)
    data.seek(0)
    try:
        return torch.load(data, weights_only=True)
    except Exception as error:
        raise Unsupported(
            f"{item.index.fqn}: {own.__qualname__} makes bytes of it that are not plain values of torch.save",
            "store tensors, numbers, strings, or dicts, lists and tuples of them",
        ) from error
