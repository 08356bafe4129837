"""What `_split.c` makes where an install finds a C compiler. Arrays are contiguous, of elements of 2 or 4 bytes."""

from typing import Any

def count(old: Any, limits: bytes, /) -> tuple[int, ...]:
    """Return how many elements each class has."""

def split(new: Any, old: Any, limits: bytes, out: Any, /) -> tuple[int, ...]:
    """Write `new - old` into `out`, class after class, and return how many elements each has.

    Raises:
        ValueError: if `old` changes meanwhile, or the arrays have several lengths.
    """

def join(old: Any, limits: bytes, counts: tuple[int, ...], values: Any, out: Any, /) -> None:
    """Write `old` plus `values` into `out`; the values stand class after class. `out` may be the memory of `old`.

    Raises:
        ValueError: if a class has another number of elements than `counts` says, or the arrays have several lengths.
    """

def sums(old: Any, new: Any, /) -> tuple[float, float, float, float, int]:
    """Return the sums of squares of `new - old` and of `old`, that of the products of both, the largest distance, and how
    many elements differ. Elements are float32; NaN makes a sum NaN, and is no largest distance.

    Raises:
        ValueError: if the arrays have several lengths, or elements do not begin at a multiple of 4 bytes.
    """

def any_with(values: Any, mask: int, /) -> bool:
    """Return whether an element has all bits of the mask. Elements have 2 or 4 bytes.

    Raises:
        ValueError: if they have others, or do not begin at a multiple of these.
    """
