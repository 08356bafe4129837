"""The loaders of a Lightning trainer: their positions, and putting these back with the random numbers."""

from __future__ import annotations

from typing import Any

import torch

from registry.checkpoints.checkpoint import Checkpoint
from registry.integrations import check_release
from registry.live import ranks, rng
from registry.live.resumable import ResumableLoader
from registry.store.errors import Incompatible, Invalid

check_release("lightning")

from lightning.fabric.utilities.data import _set_sampler_epoch  # noqa: E402
from lightning.fabric.utilities.types import _Stateful  # noqa: E402
from lightning.pytorch import Trainer  # noqa: E402

_AT_THE_BEGINNING = {"taken": 0, "start": None, "before": None}
"""What the state of a `ResumableLoader` has where an epoch begins."""


class Positions:
    """Where the training loaders of a trainer are, in this process.

    Lightning asks a loader for its state if it has one. The generators of any other `DataLoader`, which choose the order
    of the next epoch, are kept here.

    Raises:
        Invalid: if the data of a `ResumableLoader` is not split over the processes.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._fit = trainer.fit_loop
        self._loaders = self._fit._combined_loader.flattened
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            for loader in self._loaders:
                _check_split(loader, trainer.world_size)
        self._orders = [_order_of(loader) for loader in self._loaders]

    def orders(self) -> list[Any]:
        """The states of the generators of each loader; None for one that knows them itself."""
        return [one and one.state_dict() for one in self._orders]

    def put_back(self, checkpoint: Checkpoint) -> None:
        """Put loaders and random numbers of this process where they were; the last thing before the first batch.

        Lightning has made an iterator of the loaders already, which drew random numbers. It is made again. Where an epoch
        begins, it has to draw what it would have drawn without a break; inside an epoch that has happened before the save.

        Raises:
            Incompatible: if there are other loaders, or inside an epoch another number of processes.
        """
        for loader in self._loaders:
            _set_sampler_epoch(loader, self._fit.epoch_progress.current.processed)
        begins = self._fit.epoch_loop.batch_progress.is_last_batch
        stateful = [loader for loader in self._loaders if isinstance(loader, _Stateful)]
        states, orders = self._recorded(checkpoint, len(stateful), inside=not begins)
        checkpoint.restore(rng=True)
        now = rng.capture()
        for loader, state in zip(stateful, states, strict=bool(states)):
            if not begins:
                loader.load_state_dict(state)
            elif isinstance(loader, ResumableLoader):
                loader.load_state_dict({**state, **_AT_THE_BEGINNING})
        if begins:
            self._put_orders_back(orders)
            rng.restore(now)
        iter(self._fit._data_fetcher)
        if not begins:
            self._put_orders_back(orders)
            rng.restore(now)

    def _put_orders_back(self, states: list[Any]) -> None:
        for order, state in zip(self._orders, states, strict=bool(states)):
            if order is not None and state is not None:
                order.load_state_dict({**state, **_AT_THE_BEGINNING})

    def _recorded(self, checkpoint: Checkpoint, count: int, *, inside: bool) -> tuple[list[Any], list[Any]]:
        """The states and the orders of this process's loaders; none if other processes go on with a new epoch."""
        if "loaders" not in checkpoint.components:
            return [], []
        everyone = checkpoint.load("loaders", copy=True)["loaders"]
        if len(everyone) != ranks.count():
            if not inside:
                return [], []
            raise Incompatible(
                f"{checkpoint.name}: {len(everyone)} processes were in the middle of an epoch, which {ranks.count()} cannot "
                f"go on with",
                f"start {len(everyone)}, or resume from the end of an epoch",
            )
        mine = everyone[ranks.mine()]
        if len(mine["loaders"]) != count or len(mine["orders"]) != len(self._orders):
            raise Incompatible(
                f"{checkpoint.name} has the positions of {len(mine['loaders'])} of {len(mine['orders'])} loaders, the "
                f"trainer has {count} of {len(self._orders)} that know theirs",
                "use the same loaders",
            )
        return mine["loaders"], mine["orders"]


def _check_split(loader: Any, count: int) -> None:
    """See that each of several processes gets a part of the data of a `ResumableLoader`, which Lightning does not split.

    Raises:
        Invalid: if each gets all of it.
    """
    if not isinstance(loader, ResumableLoader) or isinstance(
        loader.dataset, torch.utils.data.IterableDataset
    ):
        return
    if not hasattr(loader.sampler, "set_epoch"):
        raise Invalid(
            f"a ResumableLoader gives all its data to each of {count} processes",
            "make its loader with sampler=DistributedSampler(data)",
        )


def _order_of(loader: Any) -> ResumableLoader | None:
    """What knows the generators of a loader; None for a loader that knows them itself, or is no `DataLoader`."""
    is_plain = isinstance(loader, torch.utils.data.DataLoader)
    return ResumableLoader(loader) if is_plain and not loader.persistent_workers else None
