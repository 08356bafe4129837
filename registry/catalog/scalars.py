"""Scalars: what a run measured, step by step, from the file `scalars.jsonl` in its folder. No torch, no TensorBoard.

A line is one point: `{"s": 45, "t": 1732690000.1, "k": "Training/Loss", "v": 0.26}`, with the step, the seconds since
the epoch, the tag and the value. NaN and the infinities are the texts `NaN`, `Infinity` and `-Infinity`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from registry.store import places

SCALARS = "scalars.jsonl"
"""The name of the file."""

MOST_AT_ONCE = 4 << 20
"""Bytes that one call of `read_scalars` reads."""

_LONGEST_LINE = 4_096
"""Bytes of a line; longer ones are passed over."""

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_LARGEST_STEP = 2**53
"""The largest step, which a program that knows only floats reads exactly, too."""


class Point(NamedTuple):
    """One value.

    Attributes:
        time: seconds since the epoch.
    """

    step: int
    time: float
    value: float


class Bucket(NamedTuple):
    """Points that follow one another, as one.

    Attributes:
        first, last: the steps of the first and the last one.
        time: of the last one.
        low, high: the smallest and the largest value; NaN where none is a number.
    """

    first: int
    last: int
    time: float
    low: float
    high: float


def write_line(point: Point, tag: str) -> bytes:
    """A point as a line of the file."""
    value = point.value
    told = (
        value
        if math.isfinite(value)
        else next(name for name, one in _NOT_FINITE.items() if _same(one, value))
    )
    line = json.dumps({"s": point.step, "t": round(point.time, 3), "k": tag, "v": told}, allow_nan=False)
    return f"{line}\n".encode()


def read_scalars(path: Path, offset: int = 0, *, inner: int = 0) -> tuple[dict[str, list[Point]], int]:
    """The points from a place of the file on, by tag, and the place to go on from next time.

    A call reads at most `MOST_AT_ONCE` bytes, so whoever wants all repeats it until the place stays. A line that is not
    complete yet is left for next time, and one that is no point is passed over.

    Args:
        offset: a place that an earlier call gave; any other is harmless.
        inner: how many of the folders that the file is in belong to a registry; links to these are not followed.

    Raises:
        Corrupt: if there is no regular file of this name.
        FileNotFoundError: if there is nothing.
    """
    fd = places.open_file(path, os.O_RDONLY, inner=inner)
    try:
        data = os.pread(fd, MOST_AT_ONCE, max(0, offset)) if offset < os.fstat(fd).st_size else b""
    finally:
        os.close(fd)
    end = data.rfind(b"\n") + 1
    if not end and len(data) > _LONGEST_LINE:
        # No line is as long, so whatever this is has to be passed over.
        end = len(data)
    found: dict[str, list[Point]] = {}
    for line in data[:end].splitlines():
        if (parsed := _parsed(line)) is not None:
            tag, point = parsed
            found.setdefault(tag, []).append(point)
    return found, max(0, offset) + end


def buckets(points: Sequence[Point], count: int = 1_000) -> list[Bucket]:
    """Points as at most so many buckets, which keep the smallest and the largest value of each stretch.

    >>> [bucket.high for bucket in buckets([Point(i, 0.0, i % 5) for i in range(20)], 4)]
    [4, 4, 4, 4]
    """
    count = min(count, len(points))
    found = []
    for i in range(count):
        part = points[i * len(points) // count : (i + 1) * len(points) // count]
        values = [point.value for point in part if not math.isnan(point.value)] or [math.nan]
        found.append(Bucket(part[0].step, part[-1].step, part[-1].time, low=min(values), high=max(values)))
    return found


def _parsed(line: bytes) -> tuple[str, Point] | None:
    """The tag and the point of a line; None if it is no point."""
    if len(line) > _LONGEST_LINE:
        return None
    try:
        given = json.loads(line)
        if not isinstance(given, dict):
            return None
        step, moment, tag, value = (given.get(key) for key in "stkv")
        if not isinstance(tag, str) or type(step) is not int or abs(step) > _LARGEST_STEP:
            return None
        # A page in UTF-8 cannot hold half a character.
        tag.encode()
        return tag, Point(step, _finite(moment), _number(value))
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None


def _number(value: Any) -> float:
    if isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if type(value) not in (int, float):
        raise TypeError
    return float(value)


def _finite(value: Any) -> float:
    number = _number(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))
