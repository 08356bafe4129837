"""A pause of Python's garbage collector, for work that makes many objects which all stay for a while.

The collector looks at every object of the program each time a quarter of them are new. It finds nothing among those of a save of
many tensors, and used to take a third of its time.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Collection, Iterator

MANY = 1 << 12
"""Tensors from which on a save pauses the collector. What trains a network seldom has as many, and its threads are left alone."""

SMALL = 64 << 10
"""Bytes of a tensor on average up to which it does: larger ones take long to write, and few objects for it."""

_is_paused = False
"""State of the process: whether the collector is off because of this module."""


@contextlib.contextmanager
def collector_paused(sizes: Collection[int]) -> Iterator[None]:
    """Pause the collector during work on tensors, if they are many and small.

    Objects without references are freed all the same; only cycles wait. A collector that is off stays off.

    Args:
        sizes: bytes of each tensor.
    """
    if len(sizes) < MANY or sum(sizes) > SMALL * len(sizes):
        yield
        return
    with collector_off():
        yield


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """Pause the collector during work that takes some milliseconds, whatever it is about. A collector that is off stays off."""
    global _is_paused
    if not gc.isenabled():
        yield
        return
    _is_paused = True
    gc.disable()
    try:
        yield
    finally:
        _is_paused = False
        gc.enable()


def _go_on() -> None:
    """Let a forked process collect: the thread that would end the pause stays behind in the parent."""
    if _is_paused:
        gc.enable()


os.register_at_fork(after_in_child=_go_on)
