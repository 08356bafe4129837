"""Scalars of runs, read on from where they were read last; the reader's thread alone uses this."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

from registry.catalog.runs import INNER, RunInfo
from registry.catalog.scalars import SCALARS, Point, read_scalars
from registry.store.errors import RegistryError

_MOST_RUNS = 16
"""Runs whose points are kept."""

_MOST_POINTS = 50_000
"""Points of a tag that are kept. Of more, every other one goes."""

_read: OrderedDict[Path, tuple[int, dict[str, list[Point]]]] = OrderedDict()
"""For each file how far it was read, and its points by tag."""


def scalars_of(info: RunInfo) -> Mapping[str, Sequence[Point]]:
    """The points that a run measured, by tag; none if it has no file of them."""
    if info.folder is None:
        return {}
    path = info.folder / SCALARS
    place, points = _read.pop(path, (0, {}))
    try:
        while True:
            found, following = read_scalars(path, place, inner=INNER)
            for tag, more in found.items():
                kept = points.setdefault(tag, [])
                kept += more
                while len(kept) > _MOST_POINTS:
                    del kept[1::2]
            if following == place:
                break
            place = following
    except (OSError, RegistryError):
        return {}
    _read[path] = (place, points)
    while len(_read) > _MOST_RUNS:
        _read.popitem(last=False)
    return points


def smoothed(points: Sequence[tuple[float, float]], share: float) -> list[tuple[float, float]]:
    """Points with an exponential moving average in the place of each value.

    The average is debiased, as by TensorBoard, so that the first values are not drawn towards zero.

    Args:
        share: how much of the average before stays, from 0 to less than 1.

    >>> smoothed([(1, 1.0), (2, 1.0), (3, 0.0)], 0.5)[:2]
    [(1, 1.0), (2, 1.0)]
    """
    found, average, weight = [], 0.0, 0.0
    for x, y in points:
        # What is not finite breaks the average, so it stays as it is.
        if y - y != 0:
            found.append((x, y))
            continue
        average, weight = share * average + (1 - share) * y, share * weight + (1 - share)
        found.append((x, average / weight))
    return found
