"""Splits a difference by the classes of its elements, and joins it again: compiled, or by numpy.

Where an install finds a C compiler it builds `_split.c`, which takes a few instructions for an element. numpy does the
same elsewhere, and takes several times as long. Both give the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from registry.store.errors import Corrupt

Reader = Callable[[Any], None]
"""Fills an array with the differences of a class."""


class Way(NamedTuple):
    """How to split and to join. Elements are floats read as uint16 or uint32; differences are signed.

    Attributes:
        name: what people call it.
        split: makes an array of `new - old` for each class, from `new`, `old`, and the exponents at which a new class
            begins.
        join: writes `old` plus the differences, from `old`, the same exponents, a reader for each class, or None where
            all are zero, and where to write; it may be the memory of `old`. The compiled one raises Corrupt if it sees
            that `old` changes meanwhile.
    """

    name: str
    split: Callable[[Any, Any, bytes], Sequence[Any]]
    join: Callable[[Any, bytes, Sequence[Reader | None], Any], None]


def exponents(values: Any) -> Any:
    """The byte behind the sign of each element, as uint8; `values` are floats read as uint16 or uint32."""
    return ((values << 1) >> (8 * values.itemsize - 8)).astype(np.uint8)


def _split_by_numpy(new: Any, old: Any, limits: bytes) -> Sequence[Any]:
    difference = (new - old).view(_signed(old))
    return [np.take(difference, np.flatnonzero(mask)) for mask in _masks(old, limits)]


def _join_by_numpy(old: Any, limits: bytes, readers: Sequence[Reader | None], out: Any) -> None:
    difference = np.zeros(len(old), _signed(old))
    for read, mask in zip(readers, _masks(old, limits), strict=True):
        if read is not None:
            places = np.flatnonzero(mask)
            values = np.empty(len(places), difference.dtype)
            read(values)
            difference[places] = values
    np.add(old, difference.view(old.dtype), out=out)


def _masks(old: Any, limits: bytes) -> Iterator[Any]:
    """Which elements belong to each class, from the smallest exponents to the largest."""
    exponent = exponents(old)
    before = np.zeros(len(old), bool)
    for limit in limits:
        below = exponent < limit
        yield below ^ before
        before = below
    yield ~before


def _split_compiled(new: Any, old: Any, limits: bytes) -> Sequence[Any]:
    differences = np.empty(len(old), _signed(old))
    try:
        counts = _split.split(new, old, limits, differences)
    except ValueError as error:
        raise Corrupt(f"a difference cannot be made: {error}") from None
    return _parts(differences, counts)


def _join_compiled(old: Any, limits: bytes, readers: Sequence[Reader | None], out: Any) -> None:
    counts = _split.count(old, limits)
    differences = np.empty(len(old), _signed(old))
    for read, part in zip(readers, _parts(differences, counts), strict=True):
        if read is None:
            part.fill(0)
        else:
            read(part)
    try:
        _split.join(old, limits, counts, differences, out)
    except ValueError as error:
        raise Corrupt(f"a difference cannot be joined: {error}") from None


def _parts(values: Any, counts: Sequence[int]) -> list[Any]:
    """The values of each class, of those that stand class after class."""
    ends = itertools.accumulate(counts)
    return [values[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _signed(values: Any) -> Any:
    return np.dtype(f"i{values.itemsize}")


BY_NUMPY = Way("numpy", _split_by_numpy, _join_by_numpy)
COMPILED: Way | None = None
"""None where no compiler built it."""

try:
    from registry.store import _split

    COMPILED = Way("compiled", _split_compiled, _join_compiled)
except ImportError:
    pass
