"""Charts: bars and curves as SVG, which is part of an HTML page and needs no script."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from hashlib import sha256
from itertools import chain, cycle, pairwise
from typing import NamedTuple

from registry.reports.blocks import Curves
from registry.reports.text_charts import LaneLine
from registry.store.text import printable

_WIDTH, _HEIGHT = 860, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 170, 20, 40
"""The margins around the curves, where the axes and the names are."""
_LONGEST_NAME = 24
"""Characters of a name at the end of a curve."""


def curves(block: Curves, *, says_axis: bool = False) -> str:
    """Draw curves over one pair of axes, each with its name at its end. What is not finite is left out.

    Args:
        says_axis: say where the horizontal axis lies, for a script.
    """
    drawn = [(name, [(x, y) for x, y in curve.items() if math.isfinite(y)]) for name, curve in block.curves]
    axes = _Axes([point for _, points in drawn for point in points])
    parts = [*axes.drawn()]
    ends: list[tuple[float, float, str, str]] = []
    for tone, (name, points) in zip(colours_of([name for name, _ in drawn]), drawn, strict=True):
        places = [axes.place(x, y) for x, y in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        kind = f"curve {tone}"
        parts.append(f'<polyline class="{kind}" points="{line}"/>')
        if len(points) <= _MOST_CIRCLES:
            parts += [
                f'<circle class="{kind}" cx="{px:.1f}" cy="{py:.1f}" r="3"><title>{_escaped(name)}: {y:.4g} at {x:g}</title></circle>'
                for (px, py), (x, y) in zip(places, points, strict=True)
            ]
        if places:
            ends.append((*places[-1], tone, name))
    parts += _names(ends)
    across = _across(_LEFT, _WIDTH - _RIGHT, axes.first, axes.last) if says_axis else ""
    return (
        f'<svg class="curves" role="img" aria-label="{_escaped(block.title)}" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}"{across}>{"".join(parts)}</svg>'
    )


_MOST_CIRCLES = 100
"""Points of a curve up to which each has a circle."""

_LINE = 15
"""The height of a line of text."""


def _names(ends: Sequence[tuple[float, float, str, str]]) -> list[str]:
    """The names of curves at their ends, moved down where they would cover one another."""
    parts, lowest = [], -math.inf
    for x, y, tone, name in sorted(ends, key=lambda end: end[1]):
        lowest = max(y, lowest + _LINE)
        shown = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
        parts.append(
            f'<text class="name {tone.partition(" ")[0]}" x="{x + 8:.1f}" y="{lowest + 4:.1f}">{_escaped(shown)}</text>'
        )
    return parts


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Some round numbers from one to another.

    >>> ticks(0.677, 0.972)
    [0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
    >>> ticks(1, 6)
    [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    """
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((size * power for size in (1, 2, 5) if size * power >= 0.8 * rough), 10 * power)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    # Divided by a whole number where the step is small, so that 0.7 is not 0.7000000000000001.
    parts = round(1 / step) if step < 1 else 0
    return [i / parts if parts else i * step for i in range(first, last + 1)]


class _Axes:
    """Where a point lies in the picture."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        xs = [x for x, _ in points] or [0]
        ys = [y for _, y in points] or [0.0, 1.0]
        self.first, self.last = min(xs), max(xs)
        self.low, self.high = min(ys), max(ys)
        if self.low == self.high:
            self.low, self.high = self.low - 0.5, self.high + 0.5

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is drawn."""
        across = (x - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return (
            _LEFT + (_WIDTH - _LEFT - _RIGHT) * across,
            (_HEIGHT - _BOTTOM) - (_HEIGHT - _BOTTOM - _TOP) * _height(y, self.low, self.high),
        )

    def drawn(self) -> list[str]:
        """A line for each round value, and round places below."""
        parts = []
        for value in ticks(self.low, self.high):
            _, y = self.place(self.first, value)
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>'
            )
        for place in ticks(self.first, self.last, 6):
            if place == int(place) or self.last - self.first < 2:
                x, _ = self.place(place, self.low)
                parts.append(
                    f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{place:.6g}</text>'
                )
        return parts


COLOURS = 5
"""How many colours the style has for models: the classes `c0`, `c1` and so on."""


def colour_of(name: str) -> str:
    """The class of the colour that a model has everywhere, by its name."""
    return f"c{int(sha256(name.encode()).hexdigest(), 16) % COLOURS}"


def colours_of(names: Sequence[str]) -> list[str]:
    """The classes of several curves: each has the colour of its model, unless an earlier one has it; then one that is free.

    If there are more curves than colours, the last ones are dashed.

    Args:
        names: of models, runs or versions.
    """
    own = [colour_of(re.split("[:@/]", name, maxsplit=1)[0]) for name in names]
    found: dict[int, str] = {}
    for i, tone in enumerate(own):
        if tone not in found.values():
            found[i] = tone
    all_tones = [f"c{i}" for i in range(COLOURS)]
    free = chain(
        [tone for tone in all_tones if tone not in found.values()],
        cycle(f"{one} dashed" for one in all_tones),
    )
    for i in range(len(names)):
        if i not in found:
            found[i] = next(free)
    return [found[i] for i in range(len(names))]


def bar(share: float, tone: str = "") -> str:
    """A bar that fills a share of its place, for a table that says the number as well.

    Args:
        share: from 0 to 1.
        tone: a class of the style, such as `heat3`.
    """
    width = 100 * min(1.0, max(0.0, share if math.isfinite(share) else 0.0))
    return f'<svg class="meter{f" {tone}" if tone else ""}" aria-hidden="true"><rect width="{width:.3g}%"/></svg>'


def heat_of(share: float) -> str:
    """The class of a colour for a share of the largest change, from pale to dark."""
    return f"heat{min(4, int(max(0.0, share) * 5))}"


def spark(values: Sequence[float], tone: str = "") -> str:
    """How values went, as a small curve beside its last value; nothing for fewer than two. What is not finite is left out.

    Args:
        tone: a class of the style, such as `c2`.
    """
    finite = _thinned([value for value in values if math.isfinite(value)], 60)
    if len(finite) < 2:
        return ""
    low, high = min(finite), max(finite)
    places = [
        (1 + 98 * i / (len(finite) - 1), 22 - 20 * _height(value, low, high))
        for i, value in enumerate(finite)
    ]
    return (
        f'<svg class="spark{f" {tone}" if tone else ""}" viewBox="0 0 100 24" preserveAspectRatio="none" '
        f'aria-hidden="true"><path d="{_path(places)}"/></svg>'
    )


def _path(places: Sequence[tuple[float, float]]) -> str:
    """A line through some places, to a tenth, each told as the way from the one before, which is short.

    >>> _path([(0, 115), (4.02, 85.26), (8, 85.3)])
    'M0 115l4-29.7 4 0'
    """
    tenths = [(round(10 * x), round(10 * y)) for x, y in places]
    steps = [(x - a, y - b) for (a, b), (x, y) in pairwise(tenths)]
    told = ["l".join(_tenths(*step) for step in [tenths[0], *steps[:1]])]
    return f"M{' '.join([*told, *(_tenths(*step) for step in steps[1:])])}"


def _tenths(x: int, y: int) -> str:
    """Two numbers of tenths, such as `4-.7`: a minus parts them, too."""
    across, down = (
        f"{one / 10:g}".replace("0.", ".", 1) if abs(one) < 10 else f"{one / 10:g}" for one in (x, y)
    )
    return f"{across}{down}" if down.startswith("-") else f"{across} {down}"


class Mark(NamedTuple):
    """A place on the horizontal axis of a chart that has a name."""

    x: float
    name: str


def chart(
    points: Sequence[tuple[float, float]], label: str, marks: Sequence[Mark] = (), tone: str = ""
) -> str:
    """A curve over one axis; of many points the band from the smallest to the largest of their neighbours, and the mean.

    Args:
        points: in the order of the first number. What is not finite is left out.
        label: what a screen reader says.
    """
    found = [(x, y) for x, y in points if math.isfinite(y)]
    if not found:
        return ""
    first, last = found[0][0], found[-1][0]
    low, high = min(y for _, y in found), max(y for _, y in found)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        return 1000 * across, 115 - 110 * _height(y, low, high)

    buckets = _buckets(found, 250)
    parts = []
    if len(buckets) < len(found):
        edge = [at(x, top) for x, _, _, top in buckets] + [at(x, bottom) for x, bottom, _, _ in buckets[::-1]]
        parts.append(f'<path class="band" d="{_path(edge)}z"/>')
    parts += [
        f'<line class="flag" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="120"><title>{_escaped(mark.name)}</title></line>'
        for mark in marks
        if first <= mark.x <= last
        for x, _ in [at(mark.x, low)]
    ]
    parts.append(f'<path class="line" d="{_path([at(x, mean) for x, _, mean, _ in buckets])}"/>')
    if len(found) == 1:
        parts.append('<circle cx="500" cy="60" r="4"/>')
    return (
        f'<svg class="chart{f" {tone}" if tone else ""}" viewBox="0 0 1000 120" preserveAspectRatio="none" role="img" '
        f'aria-label="{_escaped(label)}"{_across(0, 1000, first, last)}>{"".join(parts)}</svg>'
    )


def histogram(counts: Sequence[int], label: str) -> str:
    """Counts as columns side by side.

    Args:
        label: what a screen reader says.
    """
    top = max(counts, default=0) or 1
    columns = "".join(
        f'<rect x="{i}" y="{24 - 24 * count / top:.2f}" width="1" height="{24 * count / top:.2f}"/>'
        for i, count in enumerate(counts)
        if count
    )
    return (
        f'<svg class="histogram" viewBox="0 0 {len(counts) or 1} 24" preserveAspectRatio="none" role="img" '
        f'aria-label="{_escaped(label)}">{columns}</svg>'
    )


class Area(NamedTuple):
    """A part of a whole, as `treemap` draws it.

    Attributes:
        size: how large it is.
        tone: classes of the style.
        to: the address that it leads to.
    """

    name: str
    size: float
    note: str
    tone: str
    to: str


def treemap(areas: Sequence[Area], label: str) -> str:
    """Parts of a whole as rectangles, the largest first, as square as they can be.

    The order follows Bruls, Huizing and van Wijk, Squarified treemaps (2000).

    Args:
        label: what a screen reader says.
    """
    wanted = sorted((area for area in areas if area.size > 0), key=lambda area: -area.size)
    total = sum(area.size for area in wanted)
    scale = _TREE_WIDTH * _TREE_HEIGHT / total if total else 0.0
    box = _Box(0.0, 0.0, float(_TREE_WIDTH), float(_TREE_HEIGHT))
    parts = []
    while wanted and box.width > 0 and box.height > 0:
        row: list[Area] = []
        while wanted and (not row or _is_squarer(row, wanted[0], box, scale)):
            row.append(wanted.pop(0))
        placed, box = _placed(row, box, scale)
        parts += [_rectangle(area, where) for area, where in zip(row, placed, strict=True)]
    return (
        f'<svg class="treemap" viewBox="0 0 {_TREE_WIDTH} {_TREE_HEIGHT}" role="group" '
        f'aria-label="{_escaped(label)}">{"".join(parts)}</svg>'
    )


_TREE_WIDTH, _TREE_HEIGHT = 1000, 220


class _Box(NamedTuple):
    """A rectangle."""

    x: float
    y: float
    width: float
    height: float


def _worst(sizes: Sequence[float], side: float) -> float:
    """The largest ratio of the sides of some rectangles that share a row along a side."""
    whole = sum(sizes)
    return max(max(side**2 * one / whole**2, whole**2 / (side**2 * one)) for one in sizes)


def _is_squarer(row: Sequence[Area], following: Area, box: _Box, scale: float) -> bool:
    """Whether a row is at least as square with one rectangle more."""
    side = min(box.width, box.height)
    sizes = [area.size * scale for area in row]
    return _worst([*sizes, following.size * scale], side) <= _worst(sizes, side)


def _placed(row: Sequence[Area], box: _Box, scale: float) -> tuple[list[_Box], _Box]:
    """Where the rectangles of a row lie in a box, and the rest of the box."""
    whole = sum(area.size for area in row) * scale
    found, begun = [], 0.0
    if box.width >= box.height:
        thick = whole / box.height
        for area in row:
            long = area.size * scale / thick
            found.append(_Box(box.x, box.y + begun, thick, long))
            begun += long
        return found, _Box(box.x + thick, box.y, box.width - thick, box.height)
    thick = whole / box.width
    for area in row:
        long = area.size * scale / thick
        found.append(_Box(box.x + begun, box.y, long, thick))
        begun += long
    return found, _Box(box.x, box.y + thick, box.width, box.height - thick)


def _rectangle(area: Area, where: _Box) -> str:
    """A part of a treemap, with its name where there is room for it."""
    title = f"{area.name}, {area.note}"
    letters = int((where.width - 12) / 7)
    text = ""
    if letters >= 8 and where.height >= 36:
        # The end has the number of the version.
        name = area.name if len(area.name) <= letters else f"{area.name[: letters - 5]}…{area.name[-4:]}"
        text = (
            f'<text x="{where.x + 6:.1f}" y="{where.y + 16:.1f}">{_escaped(name)}</text>'
            f'<text class="dim" x="{where.x + 6:.1f}" y="{where.y + 30:.1f}">{_escaped(area.note)}</text>'
        )
    return (
        f'<a href="{html.escape(area.to)}" aria-label="{_escaped(title)}"><rect class="area {area.tone}" '
        f'x="{where.x:.1f}" y="{where.y:.1f}" width="{max(where.width - 1, 0.5):.1f}" '
        f'height="{max(where.height - 1, 0.5):.1f}"><title>{_escaped(title)}</title></rect>{text}</a>'
    )


_LANE, _ROW_HEIGHT = 14, 30
"""Pictures of lanes: the width of a lane, and the height of a row."""


def lane_picture(line: LaneLine) -> str:
    """A line of `lane_lines` as a picture. A line where lanes meet is half as high."""
    height = _ROW_HEIGHT if line.key else _ROW_HEIGHT // 2
    middle = height / 2
    parts = [f"M{_lane(i):g},0V{middle:g}" for i in sorted(line.up)]
    parts += [f"M{_lane(i):g},{middle:g}V{height}" for i in sorted(line.down)]
    if not line.key:
        joint = [i for i, sign in enumerate(line.text) if sign in "├─┼┴╯╭┬╮┤"]
        parts.append(f"M{_lane(joint[0] / 2):g},{middle:g}H{_lane(joint[-1] / 2):g}")
    circles = [
        f'<circle class="{"full" if sign == "●" else "open"}" cx="{_lane(i / 2):g}" cy="{middle:g}" r="5"/>'
        for i, sign in enumerate(line.text)
        if sign in "●○"
    ]
    width = _lane(len(line.text) / 2)
    return (
        f'<svg class="lanes" width="{width:g}" height="{height}" viewBox="0 0 {width:g} {height}" aria-hidden="true" '
        f'focusable="false"><path d="{"".join(parts)}"/>{"".join(circles)}</svg>'
    )


def _lane(number: float) -> float:
    """Where the middle of a lane is."""
    return _LANE * number + _LANE / 2


def _buckets(points: Sequence[tuple[float, float]], count: int) -> list[tuple[float, float, float, float]]:
    """For each of at most so many groups of neighbours: the middle place, the smallest, the mean and the largest value."""
    size = -(-len(points) // count)
    found = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ys = [y for _, y in part]
        # Divided first, as the sum of huge numbers may be infinite.
        mean = sum(y / len(ys) for y in ys)
        found.append((part[len(part) // 2][0], min(ys), mean, max(ys)))
    return found


def _thinned(values: Sequence[float], count: int) -> list[float]:
    return [mean for _, _, mean, _ in _buckets([(0.0, value) for value in values], count)] if values else []


def _height(value: float, low: float, high: float) -> float:
    """Where a value lies between two, from 0 to 1; halves, as the difference of two huge numbers may be infinite."""
    return (value / 2 - low / 2) / (high / 2 - low / 2) if high > low else 0.5


def _across(left: float, right: float, first: float, last: float) -> str:
    """Attributes that say between which places of a picture its horizontal axis lies, and where that begins and ends."""
    return f' data-across="{left:g} {right:g}" data-axis="{first:.15g} {last:.15g}"'


def _escaped(text: str) -> str:
    return html.escape(printable(text))
