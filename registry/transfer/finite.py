"""Whether tensors hold numbers alone, and neither NaN nor infinity.

A digest names the bytes of a stored tensor, so one that was found finite stays so, and is not looked at again.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy
import torch

from registry.store.parallel import in_order
from registry.store.tree import is_plain

_MOST = 1 << 17
"""Digests that are remembered, some 150 bytes each."""

_CHUNK = 1 << 18
"""Elements that are looked at at once."""

_PART = 4 * _CHUNK
"""Elements that a thread takes at a time."""

_FEW = 1 << 14
"""Elements below which tensors are joined, as a call takes longer than the look."""

_BLOCK = 1 << 12
"""Elements of one scalar product, too few for the linear algebra library to use its threads."""

_MULTIPLIED = (torch.float32, torch.float64)
"""Types that the linear algebra library knows."""

_INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}
"""The bits of infinity. Without their sign, those of NaN are above, and those of numbers below."""

_found_finite: set[str] = set()
"""State of the process: digests of stored tensors that are finite."""

_Chunk = tuple[torch.dtype, Any]
"""A type and elements in a row; those of 16 bits are read as whole numbers with a sign."""


def first_not_finite(tensors: Sequence[torch.Tensor], digests: Sequence[str | None]) -> int | None:
    """The position of the first tensor that holds NaN or infinity; None if all are finite.

    Args:
        tensors: of which none needs a gradient.
        digests: those of tensors as they are stored, in the same order; None for one that may have changed.
    """
    unknown = [
        place
        for place, (tensor, digest) in enumerate(zip(tensors, digests, strict=True))
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and digest not in _found_finite
    ]
    if not _are_finite([tensors[place] for place in unknown]):
        # A sum may also have overflowed, so each tensor is looked at.
        for place in unknown:
            if not bool(tensors[place].isfinite().all()):
                return place
    if len(_found_finite) >= _MOST:
        _found_finite.clear()
    _found_finite.update(digest for place in unknown if (digest := digests[place]) is not None)
    return None


def _are_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether tensors are finite; it may be False for large numbers, whose squares or sums are not."""
    plain: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for tensor in tensors:
        # Other classes of tensors may have no memory.
        is_usual = type(tensor) is torch.Tensor and tensor.layout is torch.strided
        is_near = is_usual and (tensor.dtype in _MULTIPLIED or tensor.dtype in _INFINITY) and is_plain(tensor)
        (plain if is_near else others).append(tensor)
    failed = threading.Event()

    def look(part: Iterable[_Chunk]) -> None:
        if not all(_is_finite(*chunk) for chunk in part):
            failed.set()

    # The last ones come first, as the first ones are copied next, and then are still in the processor's cache. torch would have
    # all its threads wait for one another at every tensor.
    parts = _parts(_chunks(plain[::-1]))
    in_order(parts, look, size=sum(tensor.nbytes for tensor in plain), stop=failed)
    return not failed.is_set() and _have_finite_sums(others[::-1])


# Infinity and NaN are no errors here.
@numpy.errstate(over="ignore", invalid="ignore")
def _is_finite(dtype: torch.dtype, row: Any) -> bool:
    """Whether all numbers of a row are finite; it may be False for large ones."""
    if dtype in _INFINITY:
        # The largest with a sign is a positive number, and without a sign a negative one.
        infinity = _INFINITY[dtype]
        return int(row.max()) < infinity and int(row.view(numpy.uint16).max()) < 0x8000 | infinity
    # No sum of squares loses NaN or infinity, and nothing reads memory faster.
    whole = len(row) // _BLOCK * _BLOCK
    blocks = row[:whole].reshape(-1, 1, _BLOCK)
    sums = blocks @ blocks.transpose(0, 2, 1)
    return bool(numpy.isfinite(sums).all()) and bool(numpy.isfinite(row[whole:]).all())


def _chunks(tensors: Iterable[torch.Tensor]) -> Iterator[_Chunk]:
    """The elements of plain tensors in chunks; small ones are joined."""
    few: dict[torch.dtype, list[Any]] = defaultdict(list)
    counts: dict[torch.dtype, int] = defaultdict(int)
    for tensor in tensors:
        dtype = tensor.dtype
        # numpy has no bfloat16.
        row = (tensor.view(torch.int16) if dtype in _INFINITY else tensor).numpy().reshape(-1)
        if len(row) >= _FEW:
            for start in range(0, len(row), _CHUNK):
                yield dtype, row[start : start + _CHUNK]
        elif len(row):
            few[dtype].append(row)
            counts[dtype] += len(row)
            if counts[dtype] >= _CHUNK:
                yield dtype, numpy.concatenate(few.pop(dtype))
                counts[dtype] = 0
    for dtype, rows in few.items():
        yield dtype, numpy.concatenate(rows)


def _parts(chunks: Iterable[_Chunk]) -> Iterator[list[_Chunk]]:
    """Chunks in lists of about `_PART` elements."""
    part: list[_Chunk] = []
    size = 0
    for chunk in chunks:
        part.append(chunk)
        size += len(chunk[1])
        if size >= _PART:
            yield part
            part, size = [], 0
    if part:
        yield part


def _have_finite_sums(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether the sum of each tensor is finite, which no sum of NaN or infinity is. Each device is asked once."""
    sums: dict[object, list[torch.Tensor]] = defaultdict(list)
    for tensor in tensors:
        wide = torch.float32 if tensor.dtype.itemsize == 2 else tensor.dtype
        sums[wide, tensor.device].append(tensor.sum(dtype=wide))
    return all(bool(torch.stack(several).isfinite().all()) for several in sums.values())
