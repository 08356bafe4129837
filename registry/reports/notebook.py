"""Notebooks: how what is here shows itself in Jupyter and the like, as HTML and as Markdown.

Plain functions from data to parts, and one that makes an answer for a notebook of them. JupyterLab takes styles, pictures
and scripts out of a notebook that it does not trust. So everything is a table, a `details` or a box with a width, and the
style only adds to it. An answer has a largest size, whatever the data.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from registry.reports.blocks import Column
from registry.reports.markdown import escaped
from registry.reports.words import ranges
from registry.store.text import printable

MOST_BYTES = 60_000
"""The largest HTML that a thing shows of itself."""

_MOST_OF_TABLE = 10_000
"""Bytes of a table that is one of several."""

WHOLE = 40_000
"""Bytes of a table that is all there is to show."""

_WIDEST = 100
"""Characters of a text; of a longer one the middle is left out."""

_COLOURS = {"": "#3b82c4", "ok": "#2e8b57", "warn": "#b7791f", "bad": "#d1495b", "dim": "#8a8f98"}
"""The colours of bars, which stand out from a light and a dark ground by 3:1 and more."""

_STYLE = (
    "<style>.tr-note{color:var(--jp-content-font-color2,var(--vscode-descriptionForeground,inherit))}"
    ".tr-root td,.tr-root th{vertical-align:top;font-variant-numeric:tabular-nums}"
    ".tr-root summary{cursor:pointer}"
    ".tr-root code{background:none;color:var(--jp-content-font-color1,var(--vscode-editor-foreground,inherit))}"
    ".tr-track{background-color:var(--jp-layout-color2,var(--vscode-editorWidget-background,transparent))}"
    "</style>"
)


@dataclass(frozen=True)
class Bar:
    """A number in a cell, with a bar.

    Attributes:
        share: the length, from 0 to 1.
        text: the number.
    """

    share: float
    text: str


Cell = str | Bar | None


class Part(NamedTuple):
    """A part of what is shown, in both forms; either may be empty."""

    html: str
    markdown: str = ""


class Piece(NamedTuple):
    """A piece of a bar that has several.

    Attributes:
        amount: 0 or more; the widths are to one another as the amounts.
        about: what is said of it.
        tone: its colour, as in `registry.reports.blocks.Tone`.
    """

    name: str
    amount: float
    about: str
    tone: str = ""


def bundle(plain: str, parts: Iterable[Part]) -> dict[str, str]:
    """What `_repr_mimebundle_` returns. It raises nothing: where a part cannot be made, it says why, and ends.

    Args:
        plain: the thing in one line.
        parts: may be a generator, which computes the parts.
    """
    shown, left = [], MOST_BYTES - 2_000 - len(_STYLE)
    try:
        for part in parts:
            left -= len(part.html.encode())
            if left < 0:
                shown.append(sentence("the rest is too long to be shown"))
                break
            shown.append(part)
    # A notebook shows things of every kind and state, and an error in place of each helps nobody.
    except Exception as error:
        shown.append(sentence(f"not shown: {str(error) or type(error).__name__}"))
    return {
        "text/plain": plain,
        "text/html": f'{_STYLE}<div class="tr-root">{"".join(part.html for part in shown)}</div>',
        "text/markdown": "\n\n".join(part.markdown for part in shown if part.markdown),
    }


def heading(text: str, aside: str = "") -> Part:
    """What the thing is: a name, and what is said beside it."""
    beside = f' <span class="tr-note">{_shown(aside)}</span>' if aside else ""
    return Part(
        f"<div><strong>{_shown(text)}</strong>{beside}</div>",
        f"**{_plain(text)}**{f' {_plain(aside)}' if aside else ''}",
    )


def sentence(text: str) -> Part:
    """A line of text."""
    return Part(f'<div class="tr-note">{_shown(text)}</div>', _plain(text))


def facts(pairs: Iterable[tuple[str, str | None]]) -> Part:
    """Names and values, a line each; those without a value are left out."""
    rows = [(name, value) for name, value in pairs if value]
    return table([Column(""), Column("")], rows)


def code(lines: Sequence[str]) -> Part:
    """Lines as a program reads or writes them."""
    shown = [printable(_cut(line, 2 * _WIDEST)) for line in lines]
    return Part(
        f'<pre style="text-align:left">{html.escape(chr(10).join(shown))}</pre>',
        "\n".join(f"    {line}" for line in shown),
    )


def table(
    columns: Sequence[Column], rows: Sequence[Sequence[Cell]], *, total: int = 0, room: int = _MOST_OF_TABLE
) -> Part:
    """A table; as many rows as fit are shown, and how many more there are is said.

    Args:
        total: how many rows there would be without a limit, if more than are given.
        room: bytes that it may have.
    """
    if not rows:
        return Part("")
    body, texts, left = "", [], room
    for row in rows:
        drawn = f"<tr>{''.join(map(_cell, row, columns))}</tr>"
        left -= len(drawn.encode())
        if left < 0:
            break
        body += drawn
        texts.append(f"| {' | '.join(_plain(_text(cell)) for cell in row)} |")
    more = max(total, len(rows)) - len(texts)
    last = f"and {more:,} more" if more else ""
    heads = "".join(
        f'<th scope="col" style="text-align:{_side(column)}">{_shown(column.head)}</th>' for column in columns
    )
    top = f"<thead><tr>{heads}</tr></thead>" if any(column.head for column in columns) else ""
    below = f'<div class="tr-note">{last}</div>' if last else ""
    rule = "|".join(" ---: " if column.is_number else " --- " for column in columns)
    names = " | ".join(_plain(column.head) for column in columns)
    return Part(
        f"<table>{top}<tbody>{body}</tbody></table>{below}",
        "\n".join([f"| {names} |", f"|{rule}|", *texts, *(["", last] if last else [])]),
    )


def bars(heads: tuple[str, str], values: Sequence[tuple[str, float]], write: Callable[[float], str]) -> Part:
    """Named numbers of 0 or more as bars, of which the largest is the longest."""
    shares = shares_of([value for _, value in values])
    columns = [Column(heads[0], is_code=True), Column(heads[1])]
    return table(
        columns,
        [(name, Bar(share, write(value))) for (name, value), share in zip(values, shares, strict=True)],
    )


def shares_of(values: Sequence[float | None]) -> list[float]:
    """How long the bars of some numbers are, from 0 to 1; 0 where a number is negative, not finite or missing.

    >>> shares_of([1.0, 4.0, None])
    [0.25, 1.0, 0.0]
    """
    lengths = [value if value is not None and math.isfinite(value) and value > 0 else 0.0 for value in values]
    longest = max(lengths, default=0.0) or 1.0
    return [length / longest for length in lengths]


def pieces(found: Sequence[Piece]) -> Part:
    """One bar of several pieces, and below it what each is."""
    total = sum(piece.amount for piece in found)
    shown = [piece for piece in found if piece.amount > 0]
    boxes = "".join(
        # Rounded down, so that together they do not become wider than the bar.
        f'<div title="{_shown(piece.name)}" style="float:left;height:12px;'
        f'width:{math.floor(10_000 * piece.amount / total) / 100:g}%;background-color:{_COLOURS[piece.tone]}"></div>'
        for piece in shown
    )
    legend = "".join(
        f'<div style="clear:left"><span style="color:{_COLOURS[piece.tone]}">■</span> '
        f"{_shown(piece.name)}: {_shown(piece.about)}</div>"
        for piece in found
    )
    bar = (
        f'<div class="tr-track" style="width:100%;max-width:480px;height:12px">{boxes}</div>' if boxes else ""
    )
    return Part(bar + legend, "\n".join(f"- {_plain(piece.name)}: {_plain(piece.about)}" for piece in found))


def folded(summary: str, part: Part, *, is_open: bool = False) -> Part:
    """A part that is opened by a click; Markdown has its summary alone."""
    if not part.html:
        return Part("")
    attribute = " open" if is_open else ""
    return Part(
        f"<details{attribute}><summary>{_shown(summary)}</summary>{part.html}</details>", _plain(summary)
    )


def merged(tensors: Iterable[tuple[str, str]]) -> list[tuple[str, str, int]]:
    """Names that differ in numbers alone, and what is said of them alike, as one: `layers.{0-11}.weight`.

    Args:
        tensors: names, each with what is said of it, such as its shape.

    Returns:
        The name that stands for some, what is said of them, and how many they are.

    >>> merged([("fc.1.bias", "10"), ("fc.3.bias", "10"), ("fc.3.weight", "10×84")])
    [('fc.{1,3}.bias', '10', 2), ('fc.3.weight', '10×84', 1)]
    """
    groups: dict[tuple[tuple[str, ...], str], list[list[str]]] = {}
    for name, about in tensors:
        parts = re.split(r"(?<![^./])([0-9]{1,9})(?![^./])", name)
        groups.setdefault((tuple(parts[::2]), about), []).append(parts[1::2])
    found = []
    for (between, about), numbers in groups.items():
        name = between[0]
        for place, after in zip(zip(*numbers, strict=True), between[1:], strict=True):
            distinct = sorted({int(one) for one in place})
            name += (place[0] if len(distinct) == 1 else f"{{{ranges(distinct)}}}") + after
        found.append((name, about, len(numbers)))
    return found


def _cell(cell: Cell, column: Column) -> str:
    inner = _shown(_text(cell))
    if column.is_code and inner:
        inner = f"<code>{inner}</code>"
    if isinstance(cell, Bar):
        width = min(100.0, max(0.0, 100 * cell.share))
        inner += (
            '<div class="tr-track" style="width:110px;height:5px">'
            f'<div style="width:{width:.3g}%;height:5px;background-color:{_COLOURS[""]}"></div></div>'
        )
    return f'<td style="text-align:{_side(column)}">{inner}</td>'


def _text(cell: Cell) -> str:
    return cell.text if isinstance(cell, Bar) else cell or ""


def _side(column: Column) -> str:
    return "right" if column.is_number else "left"


def _cut(text: str, width: int = _WIDEST) -> str:
    """A text without its middle, if it is long."""
    return text if len(text) <= width else f"{text[: width * 2 // 3]}…{text[-width // 3 :]}"


def _shown(text: str) -> str:
    """Text that HTML shows as it is."""
    return html.escape(printable(_cut(text)))


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return escaped(_cut(text))
