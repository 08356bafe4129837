"""Lossless coding of a tensor as its difference from another one of the same type and shape, or by itself.

The elements of both are read as whole numbers without a sign, and subtracted. A tensor that is coded by itself is the
difference from one of zeros. There are two codings of the result:

    planes     planes of bytes, by zstd
    classes    classes of elements, by pcodec; it is smaller for most floats, and slower to make

A few runs of elements are tried with both, to choose one for a tensor. `docs/FORMAT.md` describes the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from registry.store import classes, planes, splitting
from registry.store.pack import version_of
from registry.store.planes import ITEM_SIZES as ITEM_SIZES

if TYPE_CHECKING:
    from registry.store.parallel import Run

DEEPEST = 4
"""How many differences rest on one another, at most, where a new one is made."""

LEVEL_WORTH_IT = 0.03
"""Part of a tensor's bytes that resting on one more difference must save, as each slows a load."""

_RUNS, _RUN = 16, 4 << 10
"""How many runs of a tensor are tried, and their bytes."""

_ALIGNMENT = 8
"""Bytes of the largest element, so that a run begins with a whole one."""

_GAIN = 0.01
"""Part of a difference that classes must save, as they slow a load."""


class Decoding(Protocol):
    """A difference that is turned back chunk by chunk; chunks may be turned back on several threads at once.

    Attributes:
        chunks, chunk: how many there are, and the elements of each but the last.
    """

    chunks: int
    chunk: int

    def work(self, i: int) -> None:
        """Turn a chunk back. Where `base` and `out` are the same memory, it takes the place of the base.

        Raises:
            Corrupt: if it is malformed.
        """
        ...


def decoding(coded: memoryview, base: memoryview, item_size: int, out: memoryview) -> Decoding:
    """How to turn back bytes that `encode` made.

    Args:
        coded: the bytes.
        base: those that the difference was taken from; zeros for one that is coded by itself.
        item_size: bytes of an element: one of `ITEM_SIZES`.
        out: where the original bytes go; as long as `base`, and perhaps the same memory.

    Raises:
        Corrupt: if the bytes are malformed.
    """
    kind = planes.Decoding if version_of(coded) == 1 else classes.Decoding
    return kind(coded, base, item_size, out)


def encode(data: memoryview, base: memoryview | None, item_size: int, run: Run, *, is_float: bool) -> bytes:
    """Code `data` as its difference from `base`; the result may be longer than `data`.

    Args:
        data, base: contiguous bytes, of the same length. Without a base `data` is coded by itself.
        item_size: bytes of an element: one of `ITEM_SIZES`.
        run: does the work, chunk by chunk.
        is_float: whether the elements are real floats; others are coded in planes.
    """
    is_alone = base is None
    if base is None:
        # The system gives zeros that take no memory until they are written to.
        base = memoryview(bytes(len(data)))
    if not is_float or item_size not in classes.ITEM_SIZES:
        return planes.encode(data, base, item_size, run)
    new, old = sampled(data), sampled(base)
    in_planes = planes.encode(new, old, item_size, _one_by_one)
    in_one_class = classes.encode(new, old, item_size, _one_by_one, limits=b"")
    if len(new) == len(data):
        return min(in_planes, in_one_class, key=len)
    if is_alone:
        coder = planes.encode if len(in_planes) <= len(in_one_class) else partial(classes.encode, limits=b"")
        return coder(data, base, item_size, run)
    limits = classes.limits_of(base, item_size)
    gain = _gain(np.frombuffer(new, f"u{item_size}"), np.frombuffer(old, f"u{item_size}"), limits)
    if len(in_planes) <= len(in_one_class) - gain:
        return planes.encode(data, base, item_size, run)
    is_worth_it = gain > _GAIN * len(in_one_class)
    return classes.encode(data, base, item_size, run, limits=limits if is_worth_it else b"")


def sampled(data: memoryview) -> memoryview:
    """Some runs of a tensor's bytes, from the first to the last; all of a small one."""
    if len(data) <= _RUNS * _RUN:
        return data
    step = (len(data) - _RUN) // (_RUNS - 1) // _ALIGNMENT * _ALIGNMENT
    return memoryview(b"".join(data[i * step : i * step + _RUN] for i in range(_RUNS)))


def _gain(new: Any, old: Any, limits: bytes) -> float:
    """Bytes that classes save, without what a stream costs by itself.

    It is the mutual information of an element's class, and the sign and the number of bits of its difference: see Cover and
    Thomas, Elements of Information Theory, section 2.3.
    """
    difference = (new - old).view(f"i{new.itemsize}")
    bits = 2 * np.frexp(difference.astype(np.float64))[1] + (difference < 0)
    of_class = (np.arange(256)[:, None] >= np.frombuffer(limits, np.uint8)).sum(1)[splitting.exponents(old)]
    kinds = 2 * 8 * new.itemsize + 2
    counts = np.bincount(of_class * kinds + bits, minlength=(len(limits) + 1) * kinds)
    joint = counts.reshape(-1, kinds) / len(new)
    alone = joint.sum(0) * joint.sum(1)[:, None]
    known = joint > 0
    return float((joint[known] * np.log2(joint[known] / alone[known])).sum() * len(new) / 8)


def _one_by_one(jobs: Sequence[Any], work: Callable[[Any], None]) -> None:
    for job in jobs:
        work(job)
