"""A data loader that knows its position, so that training resumes at the very batch, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from registry.live import ranks, rng
from registry.store.errors import Incompatible, Unsupported


class ResumableLoader:
    """A `DataLoader` with a position that is saved with a checkpoint, in the middle of an epoch too.

    Save it as a component: `run.save(model=model, optimizer=optimizer, loader=loader, ...)`. After a restore the
    next `for` over it goes on behind the last batch that was taken before the save, in the same order and with
    the same augmentation; the one after that begins a new epoch.

    Without workers, batches that were taken are skipped by their indices alone. With workers they are loaded
    again and dropped, since each worker's random numbers depend on what it has loaded.

    Where several processes train together, each records its own position; give the `DataLoader` a
    `DistributedSampler`, and tell it the epoch with `set_epoch` before each `for`.

    Raises:
        Unsupported: for `persistent_workers`, whose random state no checkpoint can hold.
    """

    per_rank = True

    def __init__(self, loader: DataLoader[Any]) -> None:
        if loader.num_workers and loader.persistent_workers:
            raise Unsupported(
                "persistent_workers=True keeps random numbers in processes that no checkpoint can reach; "
                "use persistent_workers=False to resume exactly"
            )
        self.loader = loader
        self._start: dict[str, Any] | None = None
        self._taken = 0
        self._pending = False

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        # While it is unpickled, it has no loader yet.
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    @property
    def position(self) -> int:
        """How many batches of the epoch were taken; 0 between epochs."""
        return self._taken

    def __iter__(self) -> Iterator[Any]:
        if self._pending and self._start is not None:
            batches = self._at_position(self._start, self._taken)
        else:
            self._start, self._taken = self._random_state(), 0
            batches = iter(self.loader)
        self._pending = False
        for batch in batches:
            self._taken += 1
            yield batch
        self._start, self._taken = None, 0

    def state_dict(self) -> dict[str, Any]:
        """The position, and the random state at the beginning of the epoch."""
        state = {"taken": self._taken, "start": self._start, "generators": self._generator_states()}
        return state | ({"processes": ranks.count()} if ranks.count() > 1 else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a recorded position with the next iteration.

        Raises:
            Incompatible: if this loader has other generators of its own than the recorded one, or another number
                of processes goes on in the middle of an epoch.
        """
        before = state.get("processes", 1)
        if before != ranks.count() and state["start"] is not None:
            raise Incompatible(
                f"{before} processes were in the middle of an epoch, which {ranks.count()} cannot go on with; start "
                f"{before}, or resume from the end of an epoch"
            )
        if len(state["generators"]) != len(self._generators()):
            raise Incompatible(
                f"the recorded loader has {len(state['generators'])} generators of its own, this one "
                f"{len(self._generators())}"
            )
        self._taken, self._start = state["taken"], state["start"]
        self._pending = self._start is not None
        self._set_generators(state["generators"])

    def _at_position(self, start: Mapping[str, Any], taken: int) -> Iterator[Any]:
        """An iterator of the recorded epoch behind the batches that were taken; leaves random states alone."""
        now = self._random_state()
        self._set_random_state(start)
        batches = iter(self.loader)
        by_index = self.loader.num_workers == 0 and not isinstance(self.loader.dataset, IterableDataset)
        for _ in range(taken):
            next(batches._sampler_iter if by_index else batches)
        self._set_random_state(now)
        return batches

    def _random_state(self) -> dict[str, Any]:
        return {"global": rng.capture(), "generators": self._generator_states()}

    def _set_random_state(self, state: Mapping[str, Any]) -> None:
        rng.restore(state["global"])
        self._set_generators(state["generators"])

    def _generators(self) -> list[torch.Generator]:
        """Generators that the user gave the loader or its samplers."""
        batches = self.loader.batch_sampler
        owners = [self.loader, self.loader.sampler, batches, getattr(batches, "sampler", None)]
        found = [getattr(owner, "generator", None) for owner in owners]
        distinct = {id(one): one for one in found if isinstance(one, torch.Generator)}
        return list(distinct.values())

    def _generator_states(self) -> list[torch.Tensor]:
        return [generator.get_state() for generator in self._generators()]

    def _set_generators(self, states: list[torch.Tensor]) -> None:
        for generator, state in zip(self._generators(), states, strict=True):
            generator.set_state(state.clone())
