"""Progress: how a long operation reports how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with the amount that is done and the total, in the same unit."""


def silent(done: int, total: int) -> None:
    """Ignore the progress."""
