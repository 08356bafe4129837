"""Reports as Markdown, for an issue, a pull request or a wiki."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from registry.reports.blocks import Block, Code, Lines, Table, Title, drawn
from registry.store.text import printable


def render(blocks: Sequence[Block]) -> str:
    """Draw blocks as Markdown. Trees, bars and curves are left out: Markdown cannot show them."""
    lines: list[str] = []
    for block in drawn(blocks, "lines"):
        lines += _lines_of(block)
    return "\n".join(lines)


def _lines_of(block: Block) -> list[str]:
    if isinstance(block, Title):
        title = f"{block.heading}: {block.subject}" if block.subject else block.heading
        return [f"{'#' * block.level} {escaped(title)}", "", *_paragraphs(block.lines)]
    if isinstance(block, Lines):
        if not block.title:
            return _paragraphs(block.lines)
        return [f"## {escaped(block.title)}", "", *(f"- {escaped(line)}" for line in block.lines), ""]
    if isinstance(block, Table):
        head = [] if block.opens or not block.title else [f"## {escaped(block.title)}", ""]
        return [*head, *_paragraphs([block.above] if block.above else []), *_rows(block), ""]
    if isinstance(block, Code):
        return [f"{escaped(block.title)}:", "", f"    {printable(block.text)}", ""]
    return []


def _paragraphs(lines: Iterable[str]) -> list[str]:
    return [part for line in lines for part in (escaped(line), "")]


def _rows(table: Table) -> list[str]:
    heads = [escaped(column.head) for column in table.columns]
    rule = "".join("---:|" if column.is_number else "---|" for column in table.columns)
    rows = [[escaped(cell.text) for cell in row] for row in table.cells]
    return [f"| {' | '.join(heads)} |", f"|{rule}", *(f"| {' | '.join(row)} |" for row in rows)]


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    found = html.escape(printable(text), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|#" else c for c in found)
