"""Reports as one HTML file that works without a network, on a phone, in the dark, and for a screen reader."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from importlib import resources

from registry.reports import charts
from registry.reports.blocks import (
    Block,
    Branch,
    Cell,
    Code,
    Column,
    Curves,
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
    """Draw blocks as an HTML document, with its style and script."""
    parts = "\n".join(map(_drawn, drawn(blocks, "pages")))
    body = f"<main>{parts}</main>"
    style, script = (f"\n{_file(name)}" for name in ("page.css", "page.js"))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src '{_hash(style)}'; "
        f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'\">\n"
        f"<title>{_e(_name_of(blocks))}</title>\n<style>{style}</style></head>\n"
        f"<body>{body}\n<script>{script}</script></body></html>\n"
    )


def _file(name: str) -> str:
    """A file of this package."""
    return resources.files("registry.reports").joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    """What a content policy says of the one style or script that it allows."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


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
        case Strip():
            return _strip(block)
        case Tree():
            return _tree(block)
        case Curves():
            return _section("", above="", label=block.title, wide=charts.curves(block))
        case Code():
            lines = "\n".join(map(_e, block.text.split("\n")))
            return f"{_heading(block.title)}<pre>{lines}</pre>"


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
    rows = "".join(
        f"<tr>{''.join(_cell(one, column) for one, column in zip(cells, block.columns, strict=True))}</tr>"
        for cells in block.cells
    )
    table = f"<table><thead><tr>{_heads(block.columns)}</tr></thead><tbody>{rows}</tbody></table>"
    return _section(block.title, above=block.above, label=block.title or "Table", wide=table)


def _heads(columns: Sequence[Column]) -> str:
    return "".join(
        f'<th scope="col"{_class("n" if column.is_number else "")}>{_e(column.head) or "Note"}</th>'
        for column in columns
    )


def _cell(found: Cell, column: Column) -> str:
    text = f"<code>{_e(found.text)}</code>" if column.is_code else _e(found.text)
    return f"<td{_class('n' if column.is_number else '', found.tone)}>{text}</td>"


def _strip(block: Strip) -> str:
    facts = (
        f"<div><dt>{_e(name)}</dt><dd{_class(cell.tone)}>{_e(cell.text)}</dd></div>"
        for name, cell in ((name, toned(value)) for name, value in block.facts)
    )
    return f'<dl class="strip">{"".join(facts)}</dl>'


def _tree(block: Tree) -> str:
    """A table with a group of rows for each module, which the script folds, and what the script filters them by."""
    bar = f'<th scope="col" class="bars">{_e(block.bar)}</th>' if block.bar else ""
    first, *rest = block.columns
    heads = f"<tr>{_heads([first])}{bar}{_heads(rest)}</tr>"
    groups = "".join(_group(block, row) for row in block.rows)
    table = f'<table class="tree"><thead>{heads}</thead>{groups}</table>'
    filters = (
        '<p class="filters"><label><input type="checkbox" data-only> only what differs</label> '
        '<label>names <input type="search" data-names placeholder="such as conv.*"></label> '
        '<span class="dim" aria-live="polite" data-shown></span></p>'
    )
    found = _section(block.title, above=block.above, label=block.title, wide=filters + table)
    return f'<div class="filtered">{found}</div>'


def _group(block: Tree, row: Branch) -> str:
    rows = "".join(_branch(block, inner, is_module=False) for inner in row.rows)
    return (
        f"<tbody{_class('same' if row.is_same else '')}>{_branch(block, row, is_module=True)}{rows}</tbody>"
    )


def _branch(block: Tree, row: Branch, *, is_module: bool) -> str:
    first, *rest = [
        _cell(toned(cell, column), column) for cell, column in zip(row.cells, block.columns, strict=True)
    ]
    if is_module and row.rows:
        first = f'<th scope="row">{first.removeprefix("<td>").removesuffix("</td>")}</th>'
    bar = ""
    if block.bar:
        tone = "" if row.bar is None else f"{charts.heat_of(row.bar)}{'' if is_module else ' thin'}"
        bar = f'<td class="bars">{"" if row.bar is None else charts.bar(row.bar, tone)}</td>'
    kind = _class("module" if is_module and row.rows else "", "same" if row.is_same else "")
    return f"<tr{kind}>{first}{bar}{''.join(rest)}</tr>"


def _class(*names: str) -> str:
    """The attribute, or nothing where there is no class."""
    found = " ".join(name for name in names if name)
    return f' class="{found}"' if found else ""


def _e(text: str) -> str:
    """Text that HTML shows as it is."""
    return html.escape(printable(text))
