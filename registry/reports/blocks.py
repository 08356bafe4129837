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
        return " → ".join(self.between or ())


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
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell | str]]
    above: str = ""
    opens: bool = False
    where: Where = "everywhere"

    @property
    def cells(self) -> list[list[Cell]]:
        """The rows, each cell in the tone in which it is shown."""
        return [
            [toned(given, column) for given, column in zip(row, self.columns, strict=True)]
            for row in self.rows
        ]


@dataclass(frozen=True)
class Strip:
    """A few facts side by side, each a name and a value, such as metrics."""

    facts: Sequence[tuple[str, Cell | str]]
    where: Where = "everywhere"


@dataclass(frozen=True)
class Branch:
    """A row of a tree: a module, or a tensor in it.

    Attributes:
        cells: one for each column.
        bar: how far the bar of the row goes, from 0 to 1; None for no bar.
        rows: what lies below it.
        is_same: whether nothing of it differs.
    """

    cells: Sequence[Cell | str]
    bar: float | None = None
    rows: Sequence[Branch] = ()
    is_same: bool = False


@dataclass(frozen=True)
class Tree:
    """Modules with bars, and below each its tensors.

    Attributes:
        columns: those of the cells; the first is the name.
        bar: the heading of the bars, which stand behind the name; empty if there are none.
        is_deep: whether lines show what lies below the modules, too. Pages fold it.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Branch]
    bar: str = ""
    above: str = ""
    is_deep: bool = False
    where: Where = "everywhere"


@dataclass(frozen=True)
class Curves:
    """Named curves: numbers by epoch, step or seconds; NaN leaves a point out."""

    title: str
    curves: Sequence[tuple[str, Mapping[int, float] | Mapping[float, float]]]
    where: Where = "everywhere"


@dataclass(frozen=True)
class Code:
    """A text to copy, such as a command."""

    title: str
    text: str
    where: Where = "everywhere"


Block = Title | Strip | Lines | Table | Tree | Curves | Code


def drawn(blocks: Sequence[Block], where: Literal["pages", "lines"]) -> list[Block]:
    """The blocks that pages, or lines, show."""
    return [block for block in blocks if block.where in ("everywhere", where)]


def toned(given: Cell | str, column: Column | None = None) -> Cell:
    """A cell; a text alone has the tone of its column."""
    found = given if isinstance(given, Cell) else Cell(given)
    return found if found.tone or column is None else Cell(found.text, column.tone)
