"""How long work reports that it goes on."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all, in the same unit."""


def silent(done: int, total: int) -> None:
    """Report to nobody."""
