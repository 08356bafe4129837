"""Charts of characters: bars, curves in one line, and graphs as lanes. They load nothing, as commands start with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

_EIGHTHS = " ▏▎▍▌▋▊▉█"


def text_bar(share: float, width: int = 24) -> str:
    """A bar of block characters, to an eighth of one; a share that is not 0 has at least that.

    >>> text_bar(0.5, 4), text_bar(0.4, 4), text_bar(0.001, 4)
    ('██', '█▋', '▏')
    """
    eighths = round(8 * width * min(1.0, max(0.0, share)))
    eighths = max(eighths, 1 if share > 0 else 0)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


_LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 8) -> str:
    """Draw how values went as one short text; empty for fewer than two. What is not finite is left out.

    Args:
        width: characters at most. Each stands for the mean of the values at its place.

    >>> sparkline([0.81, 0.91, 0.95, 0.96])
    '▁▆██'
    """
    finite = [value for value in values if math.isfinite(value)]
    count = min(width, len(finite))
    if len(finite) < 2:
        return ""
    means = []
    for i in range(count):
        part = finite[i * len(finite) // count : (i + 1) * len(finite) // count]
        # Divided first, as the sum of huge numbers may be infinite.
        means.append(sum(value / len(part) for value in part))
    low, high = min(means), max(means)
    top = len(_LEVELS) - 1
    if low == high:
        return _LEVELS[top // 2] * count
    return "".join(_LEVELS[round(top * ((mean / 2 - low / 2) / (high / 2 - low / 2)))] for mean in means)


class LaneLine(NamedTuple):
    """A line of a graph that is drawn as lanes.

    Attributes:
        text: the line, such as `│ ●`; lane `i` is its character `2 * i`.
        key: of the row; empty for a line between two rows, where lanes meet.
        up: the lanes that go on above.
        down: the lanes that go on below.
    """

    text: str
    key: str
    up: frozenset[int]
    down: frozenset[int]


def lane_lines(rows: Sequence[tuple[str, Sequence[str], bool]]) -> list[LaneLine]:
    """Draw a graph as lanes, like those of a version control system. All lines are equally wide.

    Args:
        rows: for each row its key, the keys of the rows further down that it leads to, and whether to fill its circle.
    """
    lines: list[LaneLine] = []
    open_lanes: list[str | None] = []
    for key, after, is_filled in rows:
        mine = [i for i, waited in enumerate(open_lanes) if waited == key]
        if len(mine) > 1:
            text, up = _joined(open_lanes, mine), _open(open_lanes)
            for i in mine[1:]:
                open_lanes[i] = None
            lines.append(LaneLine(text, "", up, _open(open_lanes)))
        up = _open(open_lanes)
        if not mine:
            mine = [open_lanes.index(None) if None in open_lanes else len(open_lanes)]
            open_lanes[mine[0] :] = [key, *open_lanes[mine[0] + 1 :]]
        signs = ["│" if waited else " " for waited in open_lanes]
        signs[mine[0]] = "●" if is_filled else "○"
        open_lanes[mine[0]] = after[0] if after else None
        before, others = list(open_lanes), []
        for other in after[1:]:
            if other not in open_lanes:
                free = open_lanes.index(None) if None in open_lanes else len(open_lanes)
                open_lanes[free:] = [other, *open_lanes[free + 1 :]]
            others.append(open_lanes.index(other))
        if others:
            lines.append(LaneLine(" ".join(signs), key, up, _open(before)))
            text = _parted(before, mine[0], others)
            lines.append(LaneLine(text, "", _open(before), _open(open_lanes)))
            continue
        while open_lanes and open_lanes[-1] is None:
            open_lanes.pop()
        lines.append(LaneLine(" ".join(signs), key, up, _open(open_lanes)))
    width = max((len(line.text) for line in lines), default=0)
    return [line._replace(text=line.text.ljust(width)) for line in lines]


def lanes(rows: Sequence[tuple[str, Sequence[str], bool]]) -> list[tuple[str, str]]:
    """The lines of `lane_lines`, each with the key of its row.

    >>> [line for line, _ in lanes([("b", ["a"], True), ("c", ["a"], False), ("a", [], False)])]
    ['●  ', '│ ○', '├─╯', '○  ']
    """
    return [(line.text, line.key) for line in lane_lines(rows)]


def _parted(before: Sequence[str | None], mine: int, others: Sequence[int]) -> str:
    """The line below a row that leads to several rows: its lane `mine`, and those of the others, open already or not."""
    ends = [mine, *others]
    first, last = min(ends), max(ends)
    text = ""
    for i in range(max(last + 1, len(before))):
        is_open = i < len(before) and before[i] is not None
        if i not in ends:
            text += ("┼" if is_open else "─") if first < i < last else "│" if is_open else " "
        elif i in (first, last):
            text += ("├" if is_open else "╭") if i == first else ("┤" if is_open else "╮")
        else:
            text += "┼" if is_open else "┬"
        text += "─" if first <= i < last else " "
    return text.rstrip()


def _open(open_lanes: Sequence[str | None]) -> frozenset[int]:
    return frozenset(i for i, waited in enumerate(open_lanes) if waited is not None)


def _joined(open_lanes: Sequence[str | None], mine: Sequence[int]) -> str:
    """The line in which several lanes become the first of them."""
    first, last = mine[0], mine[-1]
    text = ""
    for i, waited in enumerate(open_lanes):
        inside = first < i < last
        if i == first:
            text += "├"
        elif i == last:
            text += "╯"
        elif i in mine:
            text += "┴"
        elif inside:
            text += "┼" if waited else "─"
        else:
            text += "│" if waited else " "
        text += "─" if first <= i < last else " "
    return text.rstrip()
