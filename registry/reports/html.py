"""Reports as one HTML file that works without a network, on a phone, in the dark, and for a screen reader."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib import resources

from registry.reports import charts
from registry.reports.blocks import (
    Bars,
    Block,
    Cell,
    Code,
    Column,
    Curves,
    Lines,
    Node,
    Table,
    Title,
    Tree,
    drawn,
)
from registry.store.text import printable


def render(blocks: Sequence[Block]) -> str:
    """Draw blocks as an HTML document, with its style and script."""
    parts = "\n".join(map(_drawn, drawn(blocks, "pages")))
    body = f"<main>{parts}</main>"
    style, script = (_file(name) for name in ("page.css", "page.js"))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'\">\n"
        f"<title>{_e(_name_of(blocks))}</title>\n<style>\n{style}</style></head>\n"
        f"<body>{body}\n<script>\n{script}</script></body></html>\n"
    )


def _file(name: str) -> str:
    """A file of this package."""
    return resources.files("registry.reports").joinpath(name).read_text("utf-8")


def _name_of(blocks: Sequence[Block]) -> str:
    title = next(block for block in blocks if isinstance(block, Title))
    return title.subject or title.text


def _drawn(block: Block) -> str:
    match block:
        case Title():
            return _title(block)
        case Lines():
            if not block.title:
                return _paragraphs(block.lines)
            items = "".join(f"<li><code{_class(block.tone)}>{_e(line)}</code></li>" for line in block.lines)
            return f"{_heading(block.title)}<ul>{items}</ul>"
        case Table():
            return _table(block)
        case Tree():
            return f"{_heading(block.title)}{''.join(map(_node, block.nodes))}"
        case Bars():
            return _section(block.title, above=block.above, label=block.title, wide=charts.bars(block))
        case Curves():
            return _section("", above="", label=block.title, wide=charts.curves(block))
        case Code():
            return f"{_heading(block.title)}<pre>{_e(block.text)}</pre>"


def _title(block: Title) -> str:
    level = f"h{block.level}"
    between = ""
    if block.between:
        between = f"<p>{' &rarr; '.join(f'<code>{_e(side)}</code>' for side in block.between)}</p>"
    head = f"<{level}><span{_class(block.tone)}>{_e(block.heading)}</span></{level}>"
    return head + between + _paragraphs(block.lines)


def _paragraphs(lines: Sequence[str]) -> str:
    return "".join(f"<p>{_e(line)}</p>" for line in lines)


def _heading(title: str) -> str:
    return f"<h2>{_e(title)}</h2>" if title else ""


def _section(heading: str, above: str, label: str, wide: str) -> str:
    """A heading, a sentence, and what may be wider than the screen, with a label for a screen reader."""
    text = f'<p class="dim">{_e(above)}</p>' if above else ""
    region = f'<div class="scroll" role="region" aria-label="{_e(label)}" tabindex="0">{wide}</div>'
    return _heading(heading) + text + region


def _table(block: Table) -> str:
    heads = "".join(
        f'<th scope="col"{_class("n" if column.is_number else "")}>{_e(column.head)}</th>'
        for column in block.columns
    )
    rows = "".join(_row(block, cells) for cells in block.cells)
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    if block.same is not None:
        table = _filters(block) + table
    found = _section(block.title, above=block.above, label=block.title or "Table", wide=table)
    return f'<div class="filtered">{found}</div>' if block.same is not None else found


def _row(block: Table, cells: Sequence[Cell]) -> str:
    marks = ""
    if block.same is not None:
        same = "yes" if cells[0].text == block.same else "no"
        marks = f' data-status="{_e(cells[0].text)}" data-same="{same}"'
    shown = "".join(_cell(one, column) for one, column in zip(cells, block.columns, strict=True))
    return f"<tr{marks}>{shown}</tr>"


def _cell(found: Cell, column: Column) -> str:
    text = f"<code>{_e(found.text)}</code>" if column.is_code else _e(found.text)
    return f"<td{_class('n' if column.is_number else '', found.tone)}>{text}</td>"


def _filters(block: Table) -> str:
    """Check boxes for the texts of the first column; the script shows and hides the rows."""
    tones = {cells[0].text: cells[0].tone for cells in block.cells}
    boxes = "".join(
        f'<label><input type="checkbox" data-status="{_e(text)}" checked> <span{_class(tone)}>{_e(text)}</span></label>'
        for text, tone in tones.items()
    )
    return (
        f'<div class="filters" role="group" aria-label="Filter"><label><input type="checkbox" data-only> only '
        f'differences</label>{boxes}</div><p class="dim" aria-live="polite" data-shown></p>'
    )


def _node(node: Node) -> str:
    notes = " ".join(f"<span{_class(note.tone)}>{_e(note.text)}</span>" for note in node.notes)
    name = f"<code>{_e(node.name)}</code> {notes}"
    if not node.nodes:
        return f"<div>{name}</div>"
    below = "".join(map(_node, node.nodes))
    return f"<details{' open' if node.is_open else ''}><summary>{name}</summary>{below}</details>"


def _class(*names: str) -> str:
    """The attribute, or nothing where there is no class."""
    found = " ".join(name for name in names if name)
    return f' class="{found}"' if found else ""


def _e(text: str) -> str:
    """Text that HTML shows as it is."""
    return html.escape(printable(text))
