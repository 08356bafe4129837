"""Charts: bars and curves as SVG, which is part of an HTML page and needs no script, and curves as a line of text."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from registry.reports.blocks import Bars, Curves
from registry.store.text import printable

_COLOURS = ("#0b62d6", "#d1570a", "#1a7f4b", "#8a3ffc", "#b42332", "#5f6870")
_WIDTH, _HEIGHT = 720, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 20, 20, 40
"""The margins around the curves, where the axes are."""
_NAME, _BAR, _ROW = 240, 320, 22
"""Bars: the width of the names, that of the longest bar, and the height of a row."""


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


def lanes(rows: Sequence[tuple[str, Sequence[str], bool]]) -> list[tuple[str, str]]:
    """Draw a graph as lanes of text, like those of a version control system.

    Args:
        rows: for each row its key, the keys of the rows further down that it leads to, and whether to fill its circle.

    Returns:
        Lines of equal width, each with the key of its row; lines between two rows, where lanes meet, have an empty key.

    >>> [line for line, _ in lanes([("b", ["a"], True), ("c", ["a"], False), ("a", [], False)])]
    ['●  ', '│ ○', '├─╯', '○  ']
    """
    lines: list[tuple[str, str]] = []
    open_lanes: list[str | None] = []
    for key, after, is_filled in rows:
        mine = [i for i, waited in enumerate(open_lanes) if waited == key]
        if len(mine) > 1:
            lines.append((_joined(open_lanes, mine), ""))
            for i in mine[1:]:
                open_lanes[i] = None
        if not mine:
            mine = [open_lanes.index(None) if None in open_lanes else len(open_lanes)]
            open_lanes[mine[0] :] = [key, *open_lanes[mine[0] + 1 :]]
        signs = ["│" if waited else " " for waited in open_lanes]
        signs[mine[0]] = "●" if is_filled else "○"
        lines.append((" ".join(signs), key))
        open_lanes[mine[0]] = after[0] if after else None
        for other in after[1:]:
            if other not in open_lanes:
                free = open_lanes.index(None) if None in open_lanes else len(open_lanes)
                open_lanes[free:] = [other, *open_lanes[free + 1 :]]
        while open_lanes and open_lanes[-1] is None:
            open_lanes.pop()
    width = max((len(line) for line, _ in lines), default=0)
    return [(line.ljust(width), key) for line, key in lines]


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


def bars(block: Bars) -> str:
    """Draw bars, the largest of which fills the width; the end of a long name says more than its beginning."""
    top = max((value for _, value in block.bars), default=0.0) or 1.0
    parts = []
    for i, (name, value) in enumerate(block.bars):
        width = _BAR * value / top
        parts.append(
            f'<text x="0" y="{i * _ROW + 15}">{_escaped(name[-34:])}</text>'
            f'<rect class="bar" x="{_NAME}" y="{i * _ROW + 3}" width="{width:.1f}" height="15" rx="2">'
            f"<title>{_escaped(name)}: {value:.4g}</title></rect>"
            f'<text x="{_NAME + 6 + width:.1f}" y="{i * _ROW + 15}">{value:.3g}</text>'
        )
    return _svg(block.title, width=_NAME + _BAR + 80, height=len(block.bars) * _ROW + 4, parts=parts)


def curves(block: Curves) -> str:
    """Draw curves over one pair of axes, with a legend below. What is not finite is left out."""
    points = [(x, y) for _, curve in block.curves for x, y in curve.items() if math.isfinite(y)]
    axes = _Axes(points)
    parts = [*axes.drawn()]
    for i, (name, curve) in enumerate(block.curves):
        colour = _COLOURS[i % len(_COLOURS)]
        places = [axes.place(x, y) for x, y in curve.items() if math.isfinite(y)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        y = _HEIGHT + 16 + 20 * i
        parts.append(f'<rect x="{_LEFT}" y="{y - 10}" width="14" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{_LEFT + 20}" y="{y}">{_escaped(name)}</text>')
    return _svg(block.title, width=_WIDTH, height=_HEIGHT + 20 + 20 * len(block.curves), parts=parts)


class _Axes:
    """Where a point lies in the picture."""

    def __init__(self, points: Sequence[tuple[int, float]]) -> None:
        xs = [x for x, _ in points] or [0]
        ys = [y for _, y in points] or [0.0, 1.0]
        self.first, self.last = min(xs), max(xs)
        self.low, self.high = min(ys), max(ys)
        if self.low == self.high:
            self.low, self.high = self.low - 0.5, self.high + 0.5

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.first) / max(1, self.last - self.first)
        # Halves, as the difference of two huge numbers may be infinite.
        up = (y / 2 - self.low / 2) / (self.high / 2 - self.low / 2)
        return (
            _LEFT + (_WIDTH - _LEFT - _RIGHT) * across,
            (_HEIGHT - _BOTTOM) - (_HEIGHT - _BOTTOM - _TOP) * up,
        )

    def drawn(self) -> list[str]:
        """Five lines with their values, and three places below."""
        parts = []
        for i in range(5):
            value = self.low * (1 - i / 4) + self.high * (i / 4)
            _, y = self.place(self.first, value)
            parts.append(
                f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>'
                f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
            )
        for epoch in sorted({self.first, (self.first + self.last) // 2, self.last}):
            x, _ = self.place(epoch, self.low)
            parts.append(
                f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{epoch}</text>'
            )
        return parts


def _svg(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg role="img" aria-label="{_escaped(title)}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">{"".join(parts)}</svg>'
    )


def _escaped(text: str) -> str:
    return html.escape(printable(text))
