"""Reports as lines of text, for a terminal, a pipe or a log."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from registry.reports.blocks import (
    Block,
    Branch,
    Cell,
    Code,
    Column,
    Lines,
    Strip,
    Table,
    Title,
    Tree,
    drawn,
    toned,
)
from registry.reports.text_charts import text_bar
from registry.store.text import printable

_WIDTH = 79
"""Characters of a line of facts, and of a line with a bar, where these are not longer themselves."""

_BAR = 24
"""Characters of a bar, if there is room."""

_FEWEST = 2
"""Columns of a table that are shown however narrow the terminal is."""


def render(blocks: Sequence[Block], width: int | None = None) -> str:
    """Draw blocks as text, without a line end behind the last. Curves are left out: lines cannot show them.

    Args:
        width: characters of a line, for which tables leave out bars and then their last columns, and say so; None to leave
            out nothing.
    """
    lines: list[str] = []
    for block in drawn(blocks, "lines"):
        own = _lines_of(block, width)
        lines += ["", *own] if lines and own else own
    return "\n".join(lines)


def _lines_of(block: Block, width: int | None) -> list[str]:
    if isinstance(block, Title):
        title = f"{block.text}: {block.subject}" if block.subject else block.text
        return [printable(title), *map(printable, block.lines)]
    if isinstance(block, Strip):
        return _strip(block, min(width or _WIDTH, _WIDTH))
    inner = None if width is None else width - len(_INDENT)
    if isinstance(block, Tree):
        return _under(block.title, _tree(block, inner))
    if isinstance(block, Lines):
        return _under(block.title, map(printable, block.lines))
    if isinstance(block, Table):
        above = [printable(block.above)] if block.above else []
        table = _fitting(block.columns, block.cells, width if block.opens or not block.title else inner)
        return _under("" if block.opens else block.title, [*above, *table])
    if isinstance(block, Code):
        first, *rest = block.text.split("\n")
        return [printable(f"{block.title.lower()}: {first}"), *(printable(f"  {line}") for line in rest)]
    return []


_INDENT = "  "
"""What stands before lines under a title."""


def _under(title: str, lines: Iterable[str]) -> list[str]:
    return [printable(title.lower()), *(f"{_INDENT}{line}" for line in lines)] if title else list(lines)


def _strip(block: Strip, width: int) -> list[str]:
    """The facts, as many in a line as fit."""
    lines = [""]
    for name, value in block.facts:
        fact = printable(f"{name} {toned(value).text}")
        if lines[-1] and len(lines[-1]) + 3 + len(fact) > width:
            lines.append("")
        lines[-1] += f"   {fact}" if lines[-1] else fact
    return lines


def _tree(block: Tree, width: int | None) -> list[str]:
    """The modules that differ, with bars, and how many are equal."""
    shown = [row for row in block.rows if not row.is_same] or block.rows
    rows = [one for row in shown for one in _branches(row, 0, block.is_deep)]
    columns, cells = list(block.columns), [[toned(cell) for cell in row.cells] for row, _ in rows]
    for (_, depth), row_cells in zip(rows, cells, strict=True):
        row_cells[0] = Cell("  " * depth + row_cells[0].text, row_cells[0].tone)
    if block.bar:
        room = min(width or _WIDTH, _WIDTH) - len(_INDENT) - _widest(_aligned(columns, cells))
        if width is None or room >= len(block.bar):
            columns.insert(1, Column(block.bar))
            bar = min(_BAR, max(len(block.bar), room))
            for (row, _), row_cells in zip(rows, cells, strict=True):
                row_cells.insert(1, Cell("" if row.bar is None else text_bar(row.bar, bar)))
    equal = len(block.rows) - len(shown)
    rest = [f"and {equal} equal" if equal > 1 else "and 1 equal"] if equal else []
    return [*_fitting(columns, cells, width), *rest]


def _widest(lines: Sequence[str]) -> int:
    return max(map(len, lines), default=0)


def _fitting(columns: Sequence[Column], cells: Sequence[Sequence[Cell]], width: int | None) -> list[str]:
    """The lines of a table, without the last columns where they would be too long, and a line that names these."""
    count = len(columns)
    lines = _aligned(columns, cells)
    while width is not None and _widest(lines) > width and count > _FEWEST:
        count -= 1
        lines = _aligned(columns[:count], [row[:count] for row in cells])
    hidden = ", ".join(column.head.lower() for column in columns[count:])
    return [*lines, printable(f"hidden: {hidden}")] if hidden else lines


def _branches(row: Branch, depth: int, is_deep: bool) -> list[tuple[Branch, int]]:
    below = [one for inner in row.rows for one in _branches(inner, depth + 1, is_deep)] if is_deep else []
    return [(row, depth), *below]


def _aligned(columns: Sequence[Column], cells: Sequence[Sequence[Cell]]) -> list[str]:
    """Columns of one width each; heads in capitals, and none where no column has one."""
    heads = [printable(column.head if column.is_given else column.head.upper()) for column in columns]
    rows = [[printable(cell.text) for cell in row] for row in cells]
    shown = [heads, *rows] if any(heads) else rows
    widths = [max(map(len, texts)) for texts in zip(*shown, strict=True)]
    return [
        "  ".join(
            _set(text, width, column) for text, width, column in zip(row, widths, columns, strict=True)
        ).rstrip()
        for row in shown
    ]


def _set(text: str, width: int, column: Column) -> str:
    return text.rjust(width) if column.is_number else text.ljust(width)
