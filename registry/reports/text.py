"""Reports as lines of text, for a terminal, a pipe or a log."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from registry.reports.blocks import Block, Code, Column, Lines, Table, Title, drawn
from registry.store.text import printable


def render(blocks: Sequence[Block]) -> str:
    """Draw blocks as text, without a line end behind the last. Trees, bars and curves are left out: lines cannot show them."""
    lines: list[str] = []
    for block in drawn(blocks, "lines"):
        own = _lines_of(block)
        lines += ["", *own] if lines and own else own
    return "\n".join(lines)


def _lines_of(block: Block) -> list[str]:
    if isinstance(block, Title):
        title = f"{block.text}: {block.subject}" if block.subject else block.text
        return [printable(title), *map(printable, block.lines)]
    if isinstance(block, Lines):
        return _under(block.title, map(printable, block.lines))
    if isinstance(block, Table):
        above = [printable(block.above)] if block.above else []
        return _under("" if block.opens else block.title, [*above, *_aligned(block)])
    if isinstance(block, Code):
        return [printable(f"{block.title.lower()}: {block.text}")]
    return []


def _under(title: str, lines: Iterable[str]) -> list[str]:
    return [printable(title.lower()), *(f"  {line}" for line in lines)] if title else list(lines)


def _aligned(table: Table) -> list[str]:
    """Columns of one width each; heads in capitals, and none where no column has one."""
    heads = [printable(column.head if column.is_given else column.head.upper()) for column in table.columns]
    rows = [[printable(cell.text) for cell in row] for row in table.cells]
    shown = [heads, *rows] if any(heads) else rows
    widths = [max(map(len, texts)) for texts in zip(*shown, strict=True)]
    return [
        "  ".join(
            _set(text, width, column) for text, width, column in zip(row, widths, table.columns, strict=True)
        ).rstrip()
        for row in shown
    ]


def _set(text: str, width: int, column: Column) -> str:
    return text.rjust(width) if column.is_number else text.ljust(width)
