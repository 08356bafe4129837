"""A data loader that knows its position, so that training resumes at the very batch, bit for bit."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from registry.live import ranks, rng
from registry.store.errors import Incompatible, Unsupported

_logger = logging.getLogger(__name__)

_PARTS = ("base_dataloader", "sampler", "batch_sampler")
"""Attributes by which loaders and samplers hold one another."""

_DEPTH = 4
"""How many of them may hold one another."""

_COUNTERS = ("iteration", "epoch", "initial_seed")
"""Numbers by which loaders and samplers of frameworks choose the order of an epoch."""


class ResumableLoader:
    """A `DataLoader` with a position that is saved with a checkpoint, in the middle of an epoch too.

    Save it as a component: `run.save(model=model, optimizer=optimizer, loader=loader, ...)`. After a restore the
    next `for` over it goes on behind the last batch that was taken before the save, in the same order and with
    the same augmentation; the one after that begins a new epoch.

    Without workers, batches that were taken are skipped by their indices alone. With workers they are loaded
    again and dropped, since each worker's random numbers depend on what it has loaded.

    It goes around a `StatefulDataLoader` of torchdata, and around a loader that Accelerate has prepared, as well. Where
    the data set of a `StatefulDataLoader` has a state of its own, such as the cursor of a stream, that state is saved
    and nothing is loaded again. What the workers of such a loader draw at random is then not the same.

    Where several processes train together, each records its own position; give the `DataLoader` a
    `DistributedSampler`, and tell it the epoch with `set_epoch` before each `for`.

    Raises:
        Unsupported: for `persistent_workers`, whose random state no checkpoint can hold.
    """

    per_rank = True

    def __init__(self, loader: DataLoader[Any]) -> None:
        if loader.num_workers and loader.persistent_workers:
            raise Unsupported(
                "persistent_workers=True keeps random numbers in processes that no checkpoint can reach",
                "use persistent_workers=False to resume exactly",
            )
        self.loader = loader
        self._start: dict[str, Any] | None = None
        self._taken = 0
        self._pending = False
        self._before: dict[str, Any] | None = None
        """The random state before the last batch was asked for, where the loader reads one batch ahead."""
        self._loaded: Any = None
        """The loader's own state, between a restore and the next iteration."""
        if _has_state(loader.dataset) and not _has_state(loader):
            _logger.warning(
                "the data set has a state_dict(), which a DataLoader does not keep: wrap torchdata's StatefulDataLoader "
                "to resume exactly"
            )

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
        if self._loaded is not None:
            batches = self._from_own_state()
        elif self._pending and self._start is not None:
            batches = self._at_position(self._start, self._taken, self._before)
        else:
            self._start, self._taken = self._random_state(), 0
            self._start["begun"] = not self._is_begun_by_a_state
            batches = iter(self.loader)
        self._pending, self._loaded = False, None
        reads_ahead = not hasattr(batches, "_sampler_iter") and self.loader.num_workers == 0
        while True:
            if reads_ahead:
                self._before = rng.capture()
            try:
                batch = next(batches)
            except StopIteration:
                break
            self._taken += 1
            yield batch
        self._start, self._taken, self._before = None, 0, None

    def state_dict(self) -> dict[str, Any]:
        """The position, and the random state at the beginning of the epoch or the loader's own state."""
        now = self._random_state()
        state = {
            "taken": self._taken,
            "before": self._before,
            "generators": now["generators"],
            "counters": now["counters"],
            "begun": not self._is_begun_by_a_state,
        }
        if self._keeps_own_state:
            state |= {"start": None, "loader": self._own_state()}
            self._set_random_state(now)
        else:
            state["start"] = self._start
        return state | ({"processes": ranks.count()} if ranks.count() > 1 else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a recorded position with the next iteration.

        Raises:
            Incompatible: if this loader has other generators of its own than the recorded one, only one of the two keeps
                the state of its data set, or another number of processes goes on in the middle of an epoch.
        """
        before = state.get("processes", 1)
        if before != ranks.count() and (state["start"] is not None or state["taken"]):
            raise Incompatible(
                f"{before} processes were in the middle of an epoch, which {ranks.count()} cannot go on with",
                f"start {before}, or resume from the end of an epoch",
            )
        if ("loader" in state) != self._keeps_own_state:
            kept, other = ("recorded", "this") if "loader" in state else ("present", "the recorded")
            raise Incompatible(
                f"the {kept} loader keeps the state of its data set, {other} one does not",
                "use the same data set and kind of loader",
            )
        generators = self._matched(state["generators"])
        self._taken, self._start = state["taken"], state["start"]
        self._pending = self._start is not None
        self._before = state.get("before")
        self._loaded = state.get("loader")
        if (state["start"] or state).get("begun", True) and self._is_begun_by_a_state:
            self._base.load_state_dict({})
        _set_generators(generators)
        self._set_counters(state.get("counters", {}))

    def end_epoch(self) -> None:
        """Begin a new epoch with the next `for`, where a trainer has taken all batches and asks for no more."""
        if self._loaded is not None:
            for _ in self:
                pass
        self._start, self._taken, self._before, self._pending = None, 0, None, False

    @property
    def _base(self) -> Any:
        """The loader inside one that Accelerate has prepared."""
        return getattr(self.loader, "base_dataloader", self.loader)

    @property
    def _is_begun_by_a_state(self) -> bool:
        """Whether the next epoch draws no number as it begins, as Accelerate has asked torchdata's loader for its state."""
        return bool(getattr(self._base, "_initial_iter_for_state_dict", False))

    @property
    def _keeps_own_state(self) -> bool:
        """Whether the loader's own state is saved, as the data set or a sampler of the user's has a part in it."""
        parts = [self.loader.dataset, *self._parts().values()]
        return _has_state(self.loader) and any(_has_state(part) and not _is_loader(part) for part in parts)

    def _own_state(self) -> Any:
        """The loader's own state; None if it has not begun, as asking it would begin the first epoch."""
        if self._loaded is not None:
            return self._loaded
        if getattr(self._base, "_iterator", self._base) is None:
            return None
        return self.loader.state_dict()  # type: ignore[attr-defined]

    def _from_own_state(self) -> Iterator[Any]:
        """An iterator that goes on from the loader's own state.

        Making one draws random numbers. In the middle of an epoch that has happened before the save. Between epochs a
        loader of torchdata makes two, of which the first only reads the state, so the second draws what it would have
        drawn without a restore.
        """
        now = self._random_state()
        self.loader.load_state_dict(self._loaded)  # type: ignore[attr-defined]
        if self._taken:
            batches = iter(self.loader)
            self._set_random_state(now)
            return batches
        with _before_each_iterator(self._base, lambda: self._set_random_state(now)):
            return iter(self.loader)

    def _at_position(
        self, start: Mapping[str, Any], taken: int, before: Mapping[str, Any] | None
    ) -> Iterator[Any]:
        """An iterator of the recorded epoch behind the batches that were taken; leaves random states alone.

        Args:
            before: the random state in which a loader that reads ahead has loaded the batch behind these.
        """
        now = self._random_state()
        self._set_random_state(start)
        batches = iter(self.loader)
        by_index = self.loader.num_workers == 0 and not isinstance(self.loader.dataset, IterableDataset)
        indices = getattr(batches, "_sampler_iter", None) if by_index else None
        for i in range(taken):
            if i and i == taken - 1 and before is not None:
                rng.restore(before)
            next(batches if indices is None else indices)
        # Counters that have moved since the epoch began stay as they are now.
        rng.restore(now["global"])
        _set_generators(self._matched(now["generators"]))
        return batches

    def _random_state(self) -> dict[str, Any]:
        return {
            "global": rng.capture(),
            "generators": {place: one.get_state() for place, one in self._generators().items()},
            "counters": self._counters(),
        }

    def _set_random_state(self, state: Mapping[str, Any]) -> None:
        rng.restore(state["global"])
        _set_generators(self._matched(state["generators"]))
        self._set_counters(state.get("counters", {}))

    def _parts(self) -> dict[str, Any]:
        """The loader and its samplers by their attributes, each once."""
        found: dict[str, Any] = {"": self.loader}
        places = [""]
        while places:
            place = places.pop(0)
            for name in _PARTS if place.count(".") < _DEPTH else ():
                part, inner = getattr(found[place], name, None), f"{place}.{name}".strip(".")
                if part is not None and all(part is not one for one in found.values()):
                    found[inner] = part
                    places.append(inner)
        return found

    def _generators(self) -> dict[str, torch.Generator]:
        """Generators of the loader's own or its samplers', by the part that has them."""
        found: dict[str, torch.Generator] = {}
        for place, part in self._parts().items():
            one = getattr(part, "generator", None)
            if isinstance(one, torch.Generator) and all(one is not other for other in found.values()):
                found[place] = one
        return found

    def _matched(self, states: Mapping[str, Any] | list[Any]) -> list[tuple[torch.Generator, torch.Tensor]]:
        """This loader's generators with their recorded states.

        A sampler that seeds itself, as those of Accelerate do, gets its generator if it has not made it yet, and needs
        no state for one that it has made since.

        Raises:
            Incompatible: if the two do not have the same generators.
        """
        live = self._generators()
        # Version 0.1.0 recorded a list.
        given = dict(zip(live, states, strict=False)) if isinstance(states, list) else states
        parts = self._parts()
        seeded = {place for place, part in parts.items() if hasattr(part, "initial_seed")}
        new = {place for place in seeded if place in given and place not in live}
        if len(states) != len(given) or (live.keys() | new) - seeded != given.keys() - seeded:
            raise Incompatible(
                f"the recorded loader has {len(states)} generators of its own, this one {len(live)}"
            )
        for place in new:
            parts[place].generator = live[place] = torch.Generator()
        return [(live[place], state) for place, state in given.items() if place in live]

    def _counters(self) -> dict[str, int]:
        """Numbers by which parts of the loader choose the order of an epoch."""
        return {
            f"{place}.{name}": value
            for place, part in self._parts().items()
            for name in _COUNTERS
            if type(value := vars(part).get(name) if hasattr(part, "__dict__") else None) is int
        }

    def _set_counters(self, counters: Mapping[str, int]) -> None:
        parts = self._parts()
        for place, value in counters.items():
            part, _, name = place.rpartition(".")
            if part in parts and name in _COUNTERS:
                setattr(parts[part], name, value)


def _set_generators(states: list[tuple[torch.Generator, torch.Tensor]]) -> None:
    for generator, state in states:
        generator.set_state(state.clone())


def _has_state(part: Any) -> bool:
    return callable(getattr(part, "state_dict", None)) and callable(getattr(part, "load_state_dict", None))


def _is_loader(part: Any) -> bool:
    """Whether a part is a loader, or a sampler that a library puts into its own loaders."""
    library = type(part).__module__.partition(".")[0]
    return hasattr(part, "num_workers") or library in ("torchdata", "accelerate")


@contextlib.contextmanager
def _before_each_iterator(loader: Any, prepare: Callable[[], None]) -> Iterator[None]:
    """Call something before a `StatefulDataLoader` makes an iterator."""
    make = getattr(loader, "_get_iterator", None)
    if make is None:
        yield
        return

    def prepared() -> Any:
        prepare()
        return make()

    loader._get_iterator = prepared
    try:
        yield
    finally:
        del loader._get_iterator
