"""Reports as Markdown, for an issue, a pull request or a wiki."""

from __future__ import annotations

import html
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
from registry.store.text import printable


def render(blocks: Sequence[Block]) -> str:
    """Draw blocks as Markdown. Curves are left out: Markdown cannot show them."""
    lines: list[str] = []
    for block in drawn(blocks, "lines"):
        lines += _lines_of(block)
    return "\n".join(lines)


def _lines_of(block: Block) -> list[str]:
    if isinstance(block, Title):
        title = f"{block.heading}: {block.subject}" if block.subject else block.heading
        return [f"{'#' * block.level} {escaped(title)}", "", *_paragraphs(block.lines)]
    if isinstance(block, Strip):
        return [f"- {escaped(name)}: {escaped(toned(value).text)}" for name, value in block.facts] + [""]
    if isinstance(block, Tree):
        rows = [cells for row in block.rows if not row.is_same for cells in _branches(row, block.is_deep)]
        return [f"## {escaped(block.title)}", "", *_rows(block.columns, rows), ""] if rows else []
    if isinstance(block, Lines):
        if not block.title:
            return _paragraphs(block.lines)
        return [f"## {escaped(block.title)}", "", *(f"- {escaped(line)}" for line in block.lines), ""]
    if isinstance(block, Table):
        head = [] if block.opens or not block.title else [f"## {escaped(block.title)}", ""]
        return [
            *head,
            *_paragraphs([block.above] if block.above else []),
            *_rows(block.columns, block.cells),
            "",
        ]
    if isinstance(block, Code):
        return [
            f"{escaped(block.title)}:",
            "",
            *(f"    {printable(line)}" for line in block.text.split("\n")),
            "",
        ]
    return []


def _paragraphs(lines: Iterable[str]) -> list[str]:
    return [part for line in lines for part in (escaped(line), "")]


def _branches(row: Branch, is_deep: bool) -> list[list[Cell]]:
    below = [cells for inner in row.rows for cells in _branches(inner, is_deep)] if is_deep else []
    return [[toned(cell) for cell in row.cells], *below]


def _rows(columns: Sequence[Column], cells: Sequence[Sequence[Cell]]) -> list[str]:
    heads = [escaped(column.head) for column in columns]
    rule = "".join("---:|" if column.is_number else "---|" for column in columns)
    rows = [[escaped(cell.text) for cell in row] for row in cells]
    return [f"| {' | '.join(heads)} |", f"|{rule}", *(f"| {' | '.join(row)} |" for row in rows)]


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    found = html.escape(printable(text), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|#" else c for c in found)
