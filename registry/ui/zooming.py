"""Zooming: the part of a curve that an address asks for, as `from=100&to=200`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

from registry.store.errors import Invalid
from registry.ui.page import Args

T = TypeVar("T")

NAMES = ("from", "to")
"""The arguments of an address that say where a curve begins and ends."""

_LONGEST = 30


class Stretch(NamedTuple):
    """A part of the horizontal axis, with both of its ends."""

    first: float = -math.inf
    last: float = math.inf

    @property
    def is_all(self) -> bool:
        """Whether it is the whole axis."""
        return self == Stretch()

    def of(self, points: Iterable[tuple[float, T]]) -> list[tuple[float, T]]:
        """Those of some points that lie in it.

        >>> Stretch(2, 3).of([(1, "a"), (2, "b"), (3, "c"), (4, "d")])
        [(2, 'b'), (3, 'c')]
        """
        return [point for point in points if self.first <= point[0] <= self.last]


def stretch_of(args: Args) -> Stretch:
    """The part that an address asks for; an end that it leaves out is that of the curve.

    Raises:
        Invalid: if an end is no number.
    """
    first, last = (_end(args, name) for name in NAMES)
    ends = (-math.inf if first is None else first, math.inf if last is None else last)
    return Stretch(min(ends), max(ends))


def _end(args: Args, name: str) -> float | None:
    text = args.get(name, "").strip()
    if not text:
        return None
    try:
        # The version v120 stands at 120.
        found = float(text.removeprefix("v")) if len(text) <= _LONGEST else math.nan
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise Invalid(f"{name} is not a number", "leave it out, or give a place of the curve")
    return found
