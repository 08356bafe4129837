"""The processes of one training, as `torchrun` starts them, and how they agree on what only one of them does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from registry.store.errors import Conflict, RegistryError

Result = TypeVar("Result")

TIMEOUT = 1_800.0
"""Seconds that processes wait for one another."""


def count() -> int:
    """How many processes train together; 1 unless a process group was set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mine() -> int:
    """The number of this process among them, from 0 on."""
    return dist.get_rank() if count() > 1 else 0


def started() -> int:
    """How many processes `torchrun` started, also before the process group is set up."""
    return count() if count() > 1 else int(os.environ.get("WORLD_SIZE") or 1)


def local() -> int:
    """The number of this process among those of this machine."""
    return int(os.environ.get("LOCAL_RANK") or mine())


def local_count() -> int:
    """How many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or count())


_made = 0
"""How many `Ranks` this process has made; all processes have made as many."""


class Ranks:
    """The processes of a training, which call the same methods in the same order.

    They talk over a group of their own, on the CPU, so that nothing here waits for a device or gets between the
    messages of the training. In a process that trains alone every method only calls what it is given.

    Args:
        timeout: seconds to wait for the others.
        together: False for a process that does everything alone, whatever the others do.

    Raises:
        Conflict: if a process does not make these `Ranks` in time, naming it.
    """

    def __init__(self, timeout: float = TIMEOUT, *, together: bool = True) -> None:
        self.count = count() if together else 1
        self.rank = mine() if together else 0
        self._timeout = timedelta(seconds=timeout)
        self._meetings = 0
        self._group: Any = None
        if self.count > 1:
            self._gather_all()
            self._group = dist.new_group(timeout=self._timeout, backend="gloo")

    @property
    def leads(self) -> bool:
        """Whether this process does what one of them has to do for all: write, log, print."""
        return self.rank == 0

    def leader(self, step: Callable[[], Result], what: str) -> Result:
        """Run a step in the leading process alone; every process returns its result, or raises its error.

        Args:
            what: what the step is part of, for the error if a process does not come to it.

        Raises:
            Conflict: if a process does not come to it in time, naming it.
        """
        if self.count == 1:
            return step()
        self._meet(what)
        outcome = [_Outcome.of(step) if self.leads else None]
        self._talk(
            what,
            lambda: dist.broadcast_object_list(outcome, src=0, group=self._group),
            lambda: [] if self.leads else ["0"],
        )
        assert outcome[0] is not None
        return outcome[0].get()  # type: ignore[no-any-return]

    def gather(self, step: Callable[[], Result], what: str) -> list[Result]:
        """Run a step in every process; each returns all results by rank, or raises the error of one of them.

        Args, Raises: as for `leader`.
        """
        if self.count == 1:
            return [step()]
        outcome = _Outcome.of(step)
        self._meet(what)
        outcomes: list[Any] = [None] * self.count
        self._talk(what, lambda: dist.all_gather_object(outcomes, outcome, group=self._group))
        # This process keeps its own outcome, not the copy that was sent.
        outcomes[self.rank] = outcome
        return [one.get(rank) for rank, one in enumerate(outcomes)]

    def close(self) -> None:
        """Give the group up; the process group of the training stays."""
        if self._group is not None:
            group, self._group = self._group, None
            # The program may have given up all groups already.
            with contextlib.suppress(RuntimeError, ValueError):
                dist.destroy_process_group(group)

    def _gather_all(self) -> None:
        """Wait until every process has begun."""
        global _made
        place = self._sign(f"{_made}")
        _made += 1
        everybody = [str(rank) for rank in range(self.count)]
        self._talk(
            "a run in several processes, each of which has to begin it",
            lambda: place.wait(everybody, self._timeout),
            lambda: self._absent(place),
        )

    def _meet(self, what: str) -> None:
        """Wait until all are here, so that what follows is quick, and an absence is told at once."""
        place = self._sign(f"{self._group.group_name}/{self._meetings}")
        self._meetings += 1

        def wait() -> None:
            dist.monitored_barrier(self._group, timeout=self._timeout, wait_all_ranks=True)

        self._talk(what, wait, lambda: self._absent(place))

    def _sign(self, topic: str) -> Store:
        """Say that this process has come; returns the store in which all of them say so."""
        place = PrefixStore(f"registry/{topic}", _get_default_store())
        place.set(str(self.rank), "here")
        return place

    def _absent(self, place: Store) -> list[str]:
        """The ranks that have not come."""
        return [str(rank) for rank in range(self.count) if not place.check([str(rank)])]

    def _talk(self, what: str, speak: Callable[[], object], absent: Callable[[], list[str]] = list) -> None:
        """Call what all processes have to call together.

        Raises:
            Conflict: if a process does not take part, naming those that `absent` returns.
        """
        try:
            speak()
        except RuntimeError as error:
            names: list[str] = []
            with contextlib.suppress(RuntimeError):
                names = absent()
            who = f"rank {', '.join(names)}" if names else "another process"
            raise Conflict(
                f"{what}: {who} did not come within {self._timeout.total_seconds():g} s, or has ended",
                "its own messages say why",
            ) from error


class _Outcome:
    """What a step returned or raised, to be sent to other processes."""

    def __init__(self, value: Any, error: Exception | None) -> None:
        self._value = value
        self._error = error

    @classmethod
    def of(cls, step: Callable[[], Any]) -> _Outcome:
        """Call a step, and keep what it returns or raises."""
        try:
            return cls(step(), None)
        except Exception as error:
            return cls(None, error)

    def get(self, rank: int = 0) -> Any:
        """Return what the step returned, or raise what it raised, with the rank of the process that it comes from."""
        if self._error is None:
            return self._value
        if rank and mine() != rank and isinstance(self._error, RegistryError):
            raise type(self._error)(f"rank {rank}: {self._error}")
        raise self._error

    def __getstate__(self) -> Mapping[str, Any]:
        error = self._error
        # Another process may not know the class of an error that is not ours.
        if error is not None and not isinstance(error, RegistryError):
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return {"_value": self._value, "_error": error}
