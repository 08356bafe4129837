"""The scalars of a run from the events of TensorBoard, for runs that have no `scalars.jsonl`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from registry.catalog.runs import INNER
from registry.catalog.scalars import Point
from registry.store import places
from registry.store.errors import RegistryError

_LARGEST = 256 << 20
"""Bytes of a file of events that is read."""

_MOST = 1_000_000
"""Points that are read of a run."""


def read_events(folder: Path, *, inner: int = INNER) -> dict[str, list[Point]]:
    """The scalars in a run's files of events, by tag; what is damaged is left out.

    What `add_scalars` wrote lies in folders of its own, and is not read.

    Args:
        folder: the run's folder.
        inner: how many of the last parts of its path belong to a registry.
    """
    found: dict[str, list[Point]] = {}
    left = _MOST
    for name in places.names_in(folder, inner=inner):
        if "tfevents" not in name or not _is_readable(folder / name, inner):
            continue
        # The reader of TensorBoard raises what it likes on a file that was made up.
        with contextlib.suppress(Exception):
            for event in LegacyEventFileLoader(str(folder / name)).Load():
                for tag, point in _points_of(event):
                    if left <= 0:
                        return found
                    left -= 1
                    found.setdefault(tag, []).append(point)
    return found


def _is_readable(path: Path, inner: int) -> bool:
    """Whether something is a regular file, which no link leads to, and not too large."""
    try:
        status = places.status_of(path, inner=inner)
        if status is None or status.st_size > _LARGEST:
            return False
        places.refuse_odd(status, path)
    except RegistryError:
        return False
    return True


def _points_of(event: Any) -> list[tuple[str, Point]]:
    return [
        (value.tag, Point(event.step, event.wall_time, value.simple_value))
        for value in event.summary.value
        if value.HasField("simple_value")
    ]
