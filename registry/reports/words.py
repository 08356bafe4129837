"""Words: how numbers, sizes, counts and times are written for people."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime


def number(value: float) -> str:
    """A measured value with five significant digits.

    >>> number(0.123456789), number(12.0)
    ('0.12346', '12')
    """
    return f"{value:.5g}"


def measured(value: float) -> str:
    """A measured value with four decimals; a huge or tiny one with five significant digits.

    >>> measured(0.961), measured(0), measured(1e-9), measured(1e300)
    ('0.9610', '0.0000', '1e-09', '1e+300')
    """
    is_plain = value == 0 or 1e-4 <= abs(value) < 1e5
    return f"{value:.4f}" if is_plain else number(value)


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


def ago(stamp: str | float) -> str:
    """Roughly how long ago something was, such as `12 s ago`. A question mark for a text that is no time.

    Args:
        stamp: a stored time, or seconds since the epoch.
    """
    try:
        then = stamp if isinstance(stamp, float) else datetime.fromisoformat(stamp).timestamp()
    except (ValueError, OverflowError):
        return "?"
    passed = max(0.0, time.time() - then)
    for length, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if passed >= length:
            return f"{passed // length:.0f} {unit} ago"
    return f"{passed:.0f} s ago"


def ranges(numbers: list[int]) -> str:
    """Ascending numbers as ranges.

    >>> ranges([0, 1, 2, 3, 5])
    '0-3,5'
    """
    found: list[list[int]] = []
    for one in numbers:
        if found and one == found[-1][1] + 1:
            found[-1][1] = one
        else:
            found.append([one, one])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
