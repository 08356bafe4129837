"""The sharded reader: checkpoints of `torch.distributed.checkpoint`, read by as many processes as there are now.

import torch.distributed.checkpoint as dcp

dcp.load(state, storage_reader=RegistryReader(registry, "gpt"))
"""

from __future__ import annotations

import io
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from registry.checkpoints.checkpoint import Checkpoint
from registry.checkpoints.sharded_trees import RECORD, FlatNames
from registry.log.reference import parse_reference
from registry.store.errors import Conflict, Incompatible, Invalid, RegistryError
from registry.store.tree import box, decode

if TYPE_CHECKING:
    from registry.home import Home


class RegistryReader(StorageReader):
    """Lets `dcp.load` read a checkpoint that `RegistryWriter` wrote, in as many processes as there are now.

    Each process reads the shards that it needs, or the parts of them, from mapped packs. It verifies all of them before
    it changes a tensor.

    Args:
        registry: the registry, in a folder that all processes share.
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
        """Begin another load; `checkpoint_id` names the checkpoint."""
        if checkpoint_id is not None:
            self._open(str(checkpoint_id))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the planner needs to know of the checkpoint.

        Raises:
            Invalid: if no checkpoint is named.
        """
        if self.checkpoint is None:
            raise Invalid(
                "which checkpoint? name it: RegistryReader(registry, 'gpt'), or checkpoint_id='gpt'"
            )
        return self._flat.metadata()

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing is to be set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan, with the name of the checkpoint that this process has found."""
        assert self.checkpoint is not None
        return replace(plan, storage_data=self.checkpoint.name)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are, if all processes read one checkpoint.

        Raises:
            Conflict: if the processes have found different checkpoints under one name.
        """
        names = sorted({str(plan.storage_data) for plan in plans})
        if len(names) > 1:
            raise Conflict(
                f"the processes would read different checkpoints, {', '.join(names)}", "name the version"
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy into the live tensors what this process asks for.

        Raises:
            Corrupt: if a byte is not what was saved; nothing was changed in this process.
        """
        assert self.checkpoint is not None
        slots = {slot: item.storage_index.fqn for item in plan.items for slot in self._flat.slots(item)}
        tensors = self.checkpoint.store.tensors_at(
            self.checkpoint.id, slots, verify=self._verify, label=self.checkpoint.name
        )
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

    def _open(self, reference: str) -> None:
        checkpoint = Checkpoint.named(self.registry, reference)
        self._manifest = checkpoint.store.manifest(checkpoint.id)
        if RECORD not in self._manifest.record:
            raise Incompatible(
                f"{checkpoint.name} was not written by dcp.save",
                f"restore it before the network is sharded: "
                f"registry['{checkpoint.name}'].restore(model=model)",
            )
        self._flat = FlatNames(self._manifest)
        self.checkpoint = checkpoint


def _as_planners_expect(value: Any) -> io.BytesIO:
    """A plain value as the bytes that `torch.save` makes of it, in memory."""
    data = io.BytesIO()
    torch.save(value, data)
    data.seek(0)
    return data
