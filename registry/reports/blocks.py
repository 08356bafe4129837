"""Blocks: what a report is made of. Whoever reports makes a list of them, and every renderer draws each of them.

A block holds plain text. It knows neither the thing that is reported nor how it will look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Tone = Literal["", "dim", "ok", "warn", "bad"]
"""What a text says of itself by its colour: nothing, that it matters less, or how good it is."""

Where = Literal["everywhere", "pages", "lines"]
"""Which renderers draw a block: all, those of pages (HTML), or those of lines (text and Markdown)."""


@dataclass(frozen=True)
class Cell:
    """A text with a tone; a text alone stands for one without."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Column:
    """How the cells of a column look.

    Attributes:
        is_number: whether they are set to the right.
        is_code: whether they are names that a program reads.
        is_given: whether the head is a name that somebody gave, such as a model's, which is shown as it is.
        tone: of the cells that have none of their own.
    """

    head: str
    is_number: bool = False
    is_code: bool = False
    is_given: bool = False
    tone: Tone = ""


@dataclass(frozen=True)
class Title:
    """What a report, or the part that follows, is about.

    Attributes:
        between: the two things that are compared.
        lines: what is said at once, in sentences.
        level: 1 for the report's own title, 2 for that of a part.
    """

    text: str
    between: tuple[str, str] | None = None
    lines: Sequence[str] = ()
    tone: Tone = ""
    level: Literal[1, 2] = 1
    where: Where = "everywhere"

    @property
    def heading(self) -> str:
        """The text as a heading, which begins with a capital; a line of a terminal need not."""
        return self.text[:1].upper() + self.text[1:]

    @property
    def subject(self) -> str:
        """The two things that are compared, in one line; empty if there are none."""
        return " -> ".join(self.between or ())


@dataclass(frozen=True)
class Lines:
    """A list of texts, under a heading if it has a title."""

    title: str
    lines: Sequence[str]
    tone: Tone = ""
    where: Where = "everywhere"


@dataclass(frozen=True)
class Table:
    """Rows of cells, under a heading if it has a title.

    Attributes:
        above: a sentence between the heading and the table.
        opens: whether lines need no heading, as it stands at once below the title of the report.
        same: a text of the first column. Pages let a reader filter the rows by that column, and hide those with this text.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell | str]]
    above: str = ""
    opens: bool = False
    same: str | None = None
    where: Where = "everywhere"

    @property
    def cells(self) -> list[list[Cell]]:
        """The rows, each cell in the tone in which it is shown."""
        return [
            [_toned(given, column) for given, column in zip(row, self.columns, strict=True)]
            for row in self.rows
        ]


@dataclass(frozen=True)
class Node:
    """A name of a tree, what is said beside it, and what lies below it.

    Attributes:
        is_open: whether what lies below is seen at first.
    """

    name: str
    notes: Sequence[Cell] = ()
    nodes: Sequence[Node] = ()
    is_open: bool = False


@dataclass(frozen=True)
class Tree:
    """Names below names."""

    title: str
    nodes: Sequence[Node]
    where: Where = "everywhere"


@dataclass(frozen=True)
class Bars:
    """Named finite numbers of 0 or more, as bars."""

    title: str
    bars: Sequence[tuple[str, float]]
    above: str = ""
    where: Where = "everywhere"


@dataclass(frozen=True)
class Curves:
    """Named curves: numbers by epoch or step; NaN leaves a point out."""

    title: str
    curves: Sequence[tuple[str, Mapping[int, float]]]
    where: Where = "everywhere"


@dataclass(frozen=True)
class Code:
    """A text to copy, such as a command."""

    title: str
    text: str
    where: Where = "everywhere"


Block = Title | Lines | Table | Tree | Bars | Curves | Code


def drawn(blocks: Sequence[Block], where: Literal["pages", "lines"]) -> list[Block]:
    """The blocks that pages, or lines, show."""
    return [block for block in blocks if block.where in ("everywhere", where)]


def _toned(given: Cell | str, column: Column) -> Cell:
    found = given if isinstance(given, Cell) else Cell(given)
    return found if found.tone else Cell(found.text, column.tone)
