"""How numbers, sizes, shapes and times are written, in the terminal, on pages and in reports."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime


def number(value: float) -> str:
    """A measured value with five significant digits.

    >>> number(0.123456789), number(12.0)
    ('0.12346', '12')
    """
    return f"{value:.5g}"


def size(count: float) -> str:
    """Bytes in decimal units.

    >>> size(999), size(307_212_000)
    ('999 B', '307 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if count >= 99.5 or unit == "B" else f"{count:.3g} {unit}"
        count /= 1_000
    return f"{count:.3g} TB"


def counted(count: int, thing: str, things: str | None = None) -> str:
    """A count with its noun.

    >>> counted(1, "version"), counted(2, "version")
    ('1 version', '2 versions')
    """
    return f"{count:,} {thing if count == 1 else things or thing + 's'}"


def shape(sizes: Sequence[int]) -> str:
    """The shape of a tensor.

    >>> shape((10, 84)), shape(())
    ('10×84', 'scalar')
    """
    return "×".join(map(str, sizes)) or "scalar"


def time_of(stamp: str) -> str:
    """A stored time in the local time zone, to the minute. A question mark for a text that is no time."""
    try:
        return f"{datetime.fromisoformat(stamp).astimezone():%Y-%m-%d %H:%M}"
    except (ValueError, OverflowError):
        return "?"
