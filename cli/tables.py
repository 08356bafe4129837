"""Tables that fit the terminal they are printed on. In a pipe they are as wide as what they hold."""

from __future__ import annotations

import math
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import click

from registry.cli.output import encodable, text_of, with_root
from registry.cli.suggestions import WrongUse

_GAP = 2
"""Blanks between two columns."""

_KEPT = 3
"""Columns are left out down to this number; only then names are cut."""

_SHORTEST = 12
"""The width that a cut name has at least, unless it is alone in its row."""

_DIGITS = 4
"""Decimals of a column whose values lie below 10."""

_MOST_DECIMALS = 6


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        heading: what stands above it.
        rank: how important it is; a narrow terminal leaves out the highest first, of equal ones the rightmost. The
            first column always stays.
        is_text: whether it holds names or words. These are aligned left, and cut in the middle where they must be.
            All else is aligned right and never cut.
    """

    heading: str
    rank: int = 0
    is_text: bool = False


class TableView(NamedTuple):
    """What the user wants to see of a table.

    Attributes:
        wide: show every column, however narrow the terminal is.
        columns: the headings to show, in any case; empty for those that fit.
        is_quiet: print the first column alone, without its heading.
    """

    wide: bool = False
    columns: tuple[str, ...] = ()
    is_quiet: bool = False


FITTING = TableView()
"""As much as the terminal has room for."""


Item = TypeVar("Item")
Field = tuple[Column, Callable[[Item], Any]]
"""A column of a table, and what a row has in it."""


def columns_of(headings: Sequence[str], *, texts: Collection[str] = ()) -> list[Field[Sequence[Any]]]:
    """The columns of a table whose rows are sequences, the most important ones first.

    Args:
        texts: the headings of those that hold names or words.
    """
    return [
        (Column(heading, rank=i, is_text=heading in texts), itemgetter(i))
        for i, heading in enumerate(headings)
    ]


def print_table(
    fields: Sequence[Field[Item]],
    items: Sequence[Item],
    view: TableView = FITTING,
    *,
    below: Sequence[str] = (),
) -> None:
    """Print a row for each item under headings. Columns that are empty in every row are left out, except the first.

    On a terminal the table takes its width: the least important columns are left out, and a last line names them. What
    is longer than the terminal is high goes through a pager.

    Args:
        below: lines to print under the table.

    Raises:
        click.UsageError: if the view names a column that the table does not have.
    """
    if view.is_quiet:
        _, name = fields[0]
        for item in items:
            click.echo(text_of(name(item)))
        return
    is_terminal = sys.stdout.isatty()
    columns = [column for column, _ in fields]
    cells = _cells([[value(item) for item in items] for _, value in fields])
    chosen = _chosen(columns, cells, view)
    columns = [columns[i]._replace(heading=text_of(columns[i].heading)) for i in chosen]
    cells = [[row[i] for i in chosen] for row in cells]
    screen = shutil.get_terminal_size()
    width = screen.columns if is_terminal and not (view.wide or view.columns) else None
    lines = drawn(columns, cells, width)
    lines += [encodable(with_root(line)) for line in below]
    text = "\n".join(lines) + "\n"
    if is_terminal and len(lines) >= screen.lines:
        os.environ.setdefault("LESS", "FRX")
        click.echo_via_pager(text)
    else:
        click.echo(text, nl=False)


class Growing:
    """A table that grows by a line at a time, so that the widths of its columns are decided before.

    Attributes:
        heading: its first line.
    """

    def __init__(self, columns: Sequence[Column], widest: Sequence[str], width: int | None) -> None:
        """
        Args:
            widest: the widest cell of each column that is expected; a wider one moves what stands behind it.
            width: that of the terminal; None for as much as needed.
        """
        self._columns = columns
        widths = [
            max(width_of(one.heading), width_of(cell)) for one, cell in zip(columns, widest, strict=True)
        ]
        self._room = dict(enumerate(widths))
        if width is not None:
            self._room = _allotted(columns, [widest], widths, width)
        self.heading = click.style(self.row(_headings(columns)), bold=True)

    def row(self, cells: Sequence[str]) -> str:
        """A line, without the cells that the terminal has no room for."""
        shown = [
            (_left if self._columns[i].is_text else _right)(cells[i], room) for i, room in self._room.items()
        ]
        return (" " * _GAP).join(shown).rstrip()


def drawn(columns: Sequence[Column], cells: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """The lines of a table.

    Args:
        width: that of the terminal; None for as much as needed.
    """
    widths = [max(width_of(text) for text in texts) for texts in zip(_headings(columns), *cells, strict=True)]
    allotted = dict(enumerate(widths))
    if width is not None:
        allotted = _allotted(columns, cells, widths, width)
    table = []
    for i, room in allotted.items():
        texts = _shortened([row[i] for row in cells], room)
        pad = _left if columns[i].is_text else _right
        heading = _cut(columns[i].heading, room)
        padded = [pad(text, room) for text in texts]
        if i == 0:
            padded = [click.style(text, fg="cyan") for text in padded]
        table.append([click.style(pad(heading, room), bold=True), *padded])
    lines = [_stripped((" " * _GAP).join(row)) for row in zip(*table, strict=True)]
    hidden = [column.heading.lower() for i, column in enumerate(columns) if i not in allotted]
    if hidden and width is not None:
        lines.append(click.style(_said(hidden, width), dim=True))
    return lines


def width_of(text: str) -> int:
    """Cells that a text takes on a terminal: two for wide characters, none for those that combine.

    >>> width_of("net"), width_of("网络"), width_of("e\\u0301")
    (3, 4, 1)
    """
    if text.isascii():
        return len(text)
    return sum(map(_cells_of, text))


def _cells_of(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _headings(columns: Sequence[Column]) -> list[str]:
    return [column.heading for column in columns]


def _chosen(columns: Sequence[Column], cells: Sequence[Sequence[str]], view: TableView) -> list[int]:
    """The positions of the columns to show."""
    if not view.columns:
        return [i for i in range(len(columns)) if i == 0 or any(row[i] for row in cells)]
    places = {column.heading.lower(): i for i, column in enumerate(columns) if column.heading}
    # Two metrics may differ in upper and lower case alone.
    exactly = {column.heading: i for i, column in enumerate(columns) if column.heading}
    for name in view.columns:
        if name.lower() not in places:
            raise WrongUse(f"there is no column {name!r}", f"the columns are {', '.join(places)}")
    return [exactly.get(name, places[name.lower()]) for name in view.columns]


def _allotted(
    columns: Sequence[Column], cells: Sequence[Sequence[str]], widths: Sequence[int], width: int
) -> dict[int, int]:
    """The columns that a terminal has room for, and the room of each."""
    shown = list(range(len(columns)))
    by_rank = sorted(shown[1:], key=lambda i: (columns[i].rank, i))
    left_out: list[int] = []
    while True:
        room = {i: widths[i] for i in shown}
        if len(shown) <= _KEPT:
            _narrow(room, columns, cells, width)
        if _total(room) <= width or len(shown) == 1:
            break
        left_out.append(by_rank.pop())
        shown.remove(left_out[-1])
    # A wide column may have gone where narrow ones that say less have room.
    for i in reversed(left_out):
        if _total({**room, i: widths[i]}) <= width:
            room[i] = widths[i]
    return dict(sorted(room.items()))


def _narrow(
    room: dict[int, int], columns: Sequence[Column], cells: Sequence[Sequence[str]], width: int
) -> None:
    """Take room from the widest columns that may be cut: texts, and headings above short numbers."""
    least = {}
    for i in room:
        if columns[i].is_text:
            least[i] = _SHORTEST if len(room) > 1 else 1
        else:
            least[i] = max((width_of(row[i]) for row in cells), default=1) or 1
    while (over := _total(room) - width) > 0:
        spare = [i for i in room if room[i] > least[i]]
        if not spare:
            return
        widest = max(spare, key=lambda i: room[i])
        second = max((room[i] for i in spare if i != widest), default=0)
        room[widest] = max(least[widest], min(room[widest] - 1, second), room[widest] - over)


def _total(room: Mapping[int, int]) -> int:
    return sum(room.values()) + _GAP * (len(room) - 1)


def _said(hidden: Sequence[str], width: int) -> str:
    """The line that says what is left out."""
    line = f"hidden: {', '.join(hidden)} (--wide)"
    if width_of(line) > width:
        line = f"{len(hidden)} columns hidden (--wide)"
    return _cut(line, width)


def _shortened(texts: Sequence[str], room: int) -> list[str]:
    """Texts cut in the middle where they are too long, no two different ones alike."""
    if all(width_of(text) <= room for text in texts):
        return list(texts)
    different = list(dict.fromkeys(texts))
    best: dict[str, str] = {}
    # Names differ at their end more often than at their beginning.
    for end in (0.5, 0.7, 0.3, 0.9, 0.1):
        cut = {text: _cut(text, room, end=end) for text in different}
        if len(set(cut.values())) > len(set(best.values())):
            best = cut
        if len(set(best.values())) == len(different):
            break
    seen: dict[str, int] = {}
    for text in different:
        count = seen[best[text]] = seen.get(best[text], 0) + 1
        if count > 1:
            mark = f"{_ellipsis()}#{count}"
            best[text] = _start(text, room - width_of(mark)) + mark
    return [best[text] for text in texts]


def _ellipsis() -> str:
    return encodable("…")


def _cut(text: str, room: int, *, end: float = 0.5) -> str:
    """A text that takes no more than some cells, cut in the middle.

    Args:
        end: how much of what is left is from the end of the text.
    """
    if width_of(text) <= room:
        return text
    mark = _ellipsis()
    left = room - width_of(mark)
    if left < 2:
        return _start(text, room)
    behind = max(1, min(left - 1, round(left * end)))
    return _start(text, left - behind) + mark + _start(text[::-1], behind)[::-1]


def _start(text: str, room: int) -> str:
    """As much of a text's beginning as takes no more than some cells."""
    taken, used = [], 0
    for character in text:
        used += _cells_of(character)
        if used > room:
            break
        taken.append(character)
    return "".join(taken)


def _left(text: str, room: int) -> str:
    return text + " " * (room - width_of(text))


def _right(text: str, room: int) -> str:
    return " " * (room - width_of(text)) + text


def _stripped(line: str) -> str:
    """A line without blanks at its end, even where these have a style."""
    plain = click.unstyle(line)
    blanks = len(plain) - len(plain.rstrip())
    if not blanks:
        return line
    reset = "\x1b[0m" if line.endswith("\x1b[0m") else ""
    return line.removesuffix(reset).rstrip() + reset


def _cells(by_column: Sequence[Sequence[Any]]) -> list[list[str]]:
    """The texts of a table, by row. Measured values of one column have the same number of decimals."""
    texts = []
    for values in by_column:
        decimals = decimals_of([value for value in values if isinstance(value, float)])
        texts.append([_measured(value, decimals) for value in values])
    return [list(row) for row in zip(*texts, strict=True)]


def _measured(value: Any, decimals: int | None) -> str:
    if isinstance(value, float) and decimals is not None and math.isfinite(value):
        return f"{value:.{decimals}f}"
    return text_of(value)


def decimals_of(values: Sequence[float]) -> int | None:
    """How many decimals some values need; None if they are too different for one number of decimals.

    >>> decimals_of([0.961, 0.8078]), decimals_of([12.0, 4.0]), decimals_of([2.3, 0.00012]), decimals_of([1e-9, 1.0])
    (4, 0, 5, None)
    """
    sizes = [abs(value) for value in values if math.isfinite(value) and value]
    if not sizes:
        return 0
    if max(sizes) >= 10**6:
        return None if any(value != int(value) or value >= 10**15 for value in sizes) else 0
    decimals = max(0, _DIGITS - max(0, math.floor(math.log10(max(sizes)))))
    # Three digits of the smallest.
    decimals = max(decimals, 2 - math.floor(math.log10(min(sizes))))
    if decimals > _MOST_DECIMALS:
        return None
    while decimals and all(round(value, decimals) == round(value, decimals - 1) for value in sizes):
        decimals -= 1
    return decimals
