"""Forking: a process is not forked while one of its threads changes a registry.

SQLite remembers which locks a process has, and flock belongs to an open file. A child would inherit both: it would wait
for its parent's locks without end, or keep them when the parent is gone.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

_PATIENCE = 10.0
"""Seconds that a fork waits for changes, and a change for a fork. They go on then, as it is better than to hang."""


class _Gate:
    """Lets changes in beside one another, and a fork in alone."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._is_closed = False
        self._inside: dict[int, int] = {}
        """How many changes each thread is in."""
        self.locks: set[tuple[int, int]] = set()
        """Thread and descriptor of each file that is locked, or about to be."""

    def enter(self) -> None:
        me = threading.get_ident()
        with self._condition:
            if me not in self._inside:
                self._condition.wait_for(lambda: not self._is_closed, _PATIENCE)
            self._inside[me] = self._inside.get(me, 0) + 1

    def leave(self) -> None:
        me = threading.get_ident()
        with self._condition:
            self._inside[me] -= 1
            if not self._inside[me]:
                del self._inside[me]
            self._condition.notify_all()

    def close(self) -> None:
        me = threading.get_ident()
        with self._condition:
            self._is_closed = True
            self._condition.wait_for(lambda: not self._inside.keys() - {me}, _PATIENCE)

    def open(self) -> None:
        with self._condition:
            self._is_closed = False
            self._condition.notify_all()


_gate = _Gate()
"""State of the process: that of a child begins anew."""


@contextlib.contextmanager
def no_fork() -> Iterator[None]:
    """Keep other threads from forking this process until the block is left."""
    gate = _gate
    gate.enter()
    try:
        yield
    finally:
        # A child that was forked inside the block has a gate of its own.
        if gate is _gate:
            gate.leave()


@contextlib.contextmanager
def only_here(fd: int) -> Iterator[None]:
    """Close a file that is to be locked in every child that another thread forks inside the block."""
    gate, mine = _gate, (threading.get_ident(), fd)
    gate.locks.add(mine)
    try:
        yield
    finally:
        gate.locks.discard(mine)


def _in_child() -> None:
    global _gate
    inherited, _gate = _gate, _Gate()
    for thread, fd in inherited.locks:
        if thread != threading.get_ident():
            with contextlib.suppress(OSError):
                os.close(fd)


os.register_at_fork(
    before=lambda: _gate.close(), after_in_parent=lambda: _gate.open(), after_in_child=_in_child
)
