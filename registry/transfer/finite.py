"""Whether tensors hold numbers alone, and neither NaN nor infinity.

A digest names the bytes of a stored tensor, so one that was found finite stays so, and is not looked at again.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from registry.store.parallel import in_order, portions
from registry.store.tree import is_plain

try:
    from registry.store._split import any_with
except ImportError:
    # No compiler built it. torch's sums do the same.
    any_with = None  # type: ignore[assignment]

_MOST = 1 << 17
"""Digests that are remembered, some 150 bytes each."""

_PART = 1 << 20
"""Elements that a thread takes at a time."""

_INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000}
"""The bits of an exponent that only infinity and NaN have all."""

_found_finite: set[str] = set()
"""State of the process: digests of stored tensors that are finite."""

_Chunk = tuple[Any, int]
"""Elements in a row, read as whole numbers, and the bits that infinity has."""


def first_not_finite(tensors: Sequence[torch.Tensor], digests: Sequence[str | None]) -> int | None:
    """The position of the first tensor that holds NaN or infinity; None if all are finite.

    Args:
        tensors: of which none needs a gradient.
        digests: those of tensors as they are stored, in the same order; None for one that may have changed.
    """
    unknown = [
        place
        for place, (tensor, digest) in enumerate(zip(tensors, digests, strict=True))
        if _can_be_infinite(tensor.dtype) and digest not in _found_finite
    ]
    if not _are_finite([_real(tensors[place]) for place in unknown]):
        # A sum may also have overflowed, so each tensor is looked at.
        for place in unknown:
            if not bool(_real(tensors[place]).isfinite().all()):
                return place
    if len(_found_finite) >= _MOST:
        _found_finite.clear()
    _found_finite.update(digest for place in unknown if (digest := digests[place]) is not None)
    return None


def _can_be_infinite(dtype: torch.dtype) -> bool:
    """Whether a type has NaN or infinity. Of the smallest ones, some have neither, and torch cannot look at those."""
    return dtype.is_complex or (dtype.is_floating_point and (dtype.itemsize > 1 or "float8" in str(dtype)))


def _real(tensor: torch.Tensor) -> torch.Tensor:
    """The parts of a tensor of complex numbers, and float32 for those of 8 bits; any other as it is."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor


def _are_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether tensors are finite; it may be False for large numbers, whose sum is not."""
    rows: list[_Chunk] = []
    others: list[torch.Tensor] = []
    # The last ones come first, as the first ones are copied next, and then are still in the processor's cache.
    for tensor in reversed(tensors):
        row = _row(tensor)
        if row is None:
            others.append(tensor)
        else:
            rows.append((row, _INFINITY[tensor.dtype]))
    failed = threading.Event()

    def look(part: Iterable[_Chunk]) -> None:
        if any(any_with(*chunk) for chunk in part):
            failed.set()

    chunks = (
        (row[start : start + _PART], infinity)
        for row, infinity in rows
        for start in range(0, len(row), _PART)
    )
    # torch would have all its threads wait for one another at every tensor.
    parts = portions(chunks, lambda chunk: len(chunk[0]), _PART)
    in_order(parts, look, size=sum(row.nbytes for row, _ in rows), stop=failed)
    return not failed.is_set() and _have_finite_sums(others)


def _row(tensor: torch.Tensor) -> Any:
    """The elements of a tensor as whole numbers, if the compiled helper can look at them; None otherwise."""
    # Other classes of tensors may have no memory.
    is_usual = type(tensor) is torch.Tensor and tensor.layout is torch.strided
    if any_with is None or not is_usual or tensor.dtype not in _INFINITY or not is_plain(tensor):
        return None
    row = tensor.view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32).numpy().reshape(-1)
    # Elements of a tensor may begin anywhere, such as those of `torch.frombuffer`.
    return row if row.flags.aligned else None


def _have_finite_sums(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether the sum of each tensor is finite, which no sum of NaN or infinity is. Each device is asked once."""
    sums: dict[object, list[torch.Tensor]] = defaultdict(list)
    for tensor in tensors:
        wide = torch.float32 if tensor.dtype.itemsize == 2 else tensor.dtype
        sums[wide, tensor.device].append(tensor.sum(dtype=wide))
    return all(bool(torch.stack(several).isfinite().all()) for several in sums.values())
