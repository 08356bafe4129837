"""Whether tensors hold numbers alone, and neither NaN nor infinity.

A digest names the bytes of a stored tensor, so one that was found finite stays so, and is not looked at again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch

_MOST = 1 << 17
"""Digests that are remembered, some 150 bytes each."""

_found_finite: set[str] = set()
"""State of the process: digests of stored tensors that are finite."""


def first_not_finite(tensors: Sequence[torch.Tensor], digests: Sequence[str | None]) -> int | None:
    """The position of the first tensor that holds NaN or infinity; None if all are finite.

    Args:
        digests: those of tensors as they are stored, in the same order; None for one that may have changed.
    """
    unknown = [
        place
        for place, (tensor, digest) in enumerate(zip(tensors, digests, strict=True))
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and digest not in _found_finite
    ]
    # The last one is summed first, as the first ones are copied next, and then are still in the processor's cache.
    if not _have_finite_sums(tensors[place] for place in reversed(unknown)):
        # A sum may also have overflowed, so each tensor is looked at.
        for place in unknown:
            if not bool(tensors[place].isfinite().all()):
                return place
    if len(_found_finite) >= _MOST:
        _found_finite.clear()
    _found_finite.update(digest for place in unknown if (digest := digests[place]) is not None)
    return None


def _have_finite_sums(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether the sum of each tensor is finite, which no sum of NaN or infinity is. Each device is asked once."""
    sums: dict[object, list[torch.Tensor]] = defaultdict(list)
    for tensor in tensors:
        wide = torch.float32 if tensor.dtype.itemsize == 2 else tensor.dtype
        sums[wide, tensor.device].append(tensor.sum(dtype=wide))
    return all(bool(torch.stack(several).isfinite().all()) for several in sums.values())
