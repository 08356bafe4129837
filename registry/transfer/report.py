"""The diff report: what a diff found, as data, and the blocks that renderers draw.

A new section is a method that returns blocks, named in `DiffReport.blocks`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from registry.reports import notebook, text
from registry.reports.blocks import Bars, Block, Cell, Code, Column, Lines, Node, Table, Title, Tone, Tree
from registry.reports.words import counted
from registry.store.text import printable
from registry.transfer.matching import LOADABLE, Category
from registry.transfer.plan import FrozenPart, TransferPlan, percent
from registry.transfer.report_rows import Part, Row, grouped

SCHEMA = 1
Verdict = Literal["IDENTICAL", "SAME STRUCTURE", "COMPATIBLE", "INCOMPATIBLE"]

_TONES: dict[str, Tone] = {
    "IDENTICAL": "ok",
    "SAME STRUCTURE": "ok",
    "COMPATIBLE": "warn",
    "INCOMPATIBLE": "bad",
}
_MAX_DEPTH = 40
"""Levels of the tree of modules; what lies deeper keeps its dotted name."""

MEANING = {
    Category.MATCH: "same name, shape and dtype",
    Category.RENAMED: "another name, by a rule",
    Category.PREFIX: "the name without a wrapper's prefix",
    Category.TIED: "shares memory with a tensor that has a partner",
    Category.CAST: "another dtype",
    Category.ADAPTED: "made to fit by an adapter",
    Category.SHAPE: "another shape",
    Category.KIND: "a parameter on one side, a buffer on the other",
    Category.POSITIONAL: "the same name, perhaps of another layer",
    Category.AMBIGUOUS: "several partners are possible",
    Category.ONLY_A: "on the left only",
    Category.ONLY_B: "on the right only",
    Category.EXCLUDED: "left out on request",
}
"""What a category says of a name."""


class SideInfo(Part):
    """One side: what it is called, how much it holds, and the digests of its structure and its content."""

    label: str
    id: str | None = None
    names: int
    elements: int
    parameters: int | None
    buffers: int | None
    structure: str
    content: str | None
    notes: tuple[str, ...] = ()


class Count(Part):
    """How many names, and how many elements they have."""

    names: int
    elements: int


class ValueChange(Part):
    """How the two tensors of one name differ, in float64: norms, the angle, and the share of elements that changed."""

    name: str
    norm: float
    relative: float
    cosine: float | None
    largest: float
    changed: float
    nonfinite_a: int
    nonfinite_b: int


class ModuleChange(Part):
    """The change of all tensors below a module."""

    module: str
    tensors: int
    norm: float
    relative: float


class LayerDifference(Part):
    """Where the architectures of two live networks differ at one path."""

    path: str
    a: str | None
    b: str | None


class FieldDifference(Part):
    """Where two configurations, or the metrics of two versions, differ at one key."""

    key: str
    a: Any = None
    b: Any = None


class DiffReport(Part):
    """Everything that a diff found; text, JSON, Markdown and HTML are made from it.

    Attributes:
        exceptions: how many names cannot be loaded as they are.
        loadable: the target's parameters that can be loaded as they are.
        target: all parameters of the target.
        related: whether the lineage ties the two sides.
        command: the command line of the same diff; empty if there is none.
    """

    schema_version: int = Field(default=SCHEMA, alias="schema")
    a: SideInfo
    b: SideInfo
    verdict: Verdict
    exceptions: int
    loadable: Count
    target: Count
    counts: dict[Category, Count]
    rows: tuple[Row, ...]
    architecture: tuple[LayerDifference, ...] = ()
    config: tuple[FieldDifference, ...] = ()
    metrics: tuple[FieldDifference, ...] = ()
    changes: tuple[ValueChange, ...] = ()
    modules: tuple[ModuleChange, ...] = ()
    related: bool = False
    plan: TransferPlan | None = None
    frozen: tuple[FrozenPart, ...] = ()
    suggestions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    command: str = ""

    @property
    def is_same(self) -> bool:
        """Whether nothing differs."""
        return self.verdict == "IDENTICAL"

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        if self.verdict != "COMPATIBLE":
            return self.verdict
        return f"COMPATIBLE with {self.exceptions} exception{'s' if self.exceptions != 1 else ''}"

    @property
    def coverage(self) -> float:
        """Share of the target's parameters that can be loaded as they are."""
        return self.loadable.elements / self.target.elements if self.target.elements else 0.0

    def blocks(self) -> list[Block]:
        """The report for a renderer, such as `registry.reports.html.render`."""
        advice = [
            Lines("Warnings", self.warnings, tone="warn"),
            Lines("Suggestions", self.suggestions),
        ]
        blocks: list[Block] = [
            self._title(),
            self._summary(),
            # Pages have the advice at the top. Lines have it at the end, where the reader of a terminal looks.
            *(replace(block, where="pages") for block in advice),
            self._names(),
            self._modules(),
            self._bars(),
            self._exceptions(),
            self._architecture(),
            self._fields("Configuration", self.config),
            self._fields("Metrics", self.metrics),
            self._values(),
            *(self.plan.blocks(level=2) if self.plan else ()),
            self._frozen(),
            *(replace(block, where="lines") for block in reversed(advice)),
        ]
        if self.command:
            blocks.append(Code("Again", self.command))
        return [block for block in blocks if not _is_empty(block)]

    def __str__(self) -> str:
        return text.render(self.blocks())

    def __repr__(self) -> str:
        return printable(f"<DiffReport {self.a.label} → {self.b.label}: {self.headline}>")

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        return notebook.bundle(repr(self), self._parts())

    def _parts(self) -> Iterator[notebook.Part]:
        """What a notebook shows of it: the verdict, how much changed, and the tensors, folded."""
        title = self._title()
        yield notebook.heading(" → ".join(title.between or ()), self.headline)
        for line in title.lines:
            yield notebook.sentence(line)
        yield notebook.facts(
            [
                ("changed", self._changed()),
                *((one.key, f"{_value(one.a)} → {_value(one.b)}") for one in self.metrics),
            ]
        )
        for warning in self.warnings:
            yield notebook.sentence(f"warning: {warning}")
        for suggestion in self.suggestions:
            yield notebook.sentence(f"suggestion: {suggestion}")
        changes = [
            (one.module or "(top)", one.relative) for one in self.modules if math.isfinite(one.relative)
        ]
        if changes:
            yield notebook.bars(("Module", "Relative change"), changes, write=lambda value: f"{value:.3g}")
        yield from self._folded()
        if self.plan:
            yield from self.plan.parts()

    def _folded(self) -> Iterator[notebook.Part]:
        """The tensors by status, those that differ first, and what else differs."""
        by_status: dict[str, list[Row]] = {}
        for row in self.rows:
            by_status.setdefault(row.status, []).append(row)
        for status, rows in sorted(by_status.items(), key=lambda item: item[0] == Category.MATCH):
            shown = [(one.name, one.rows[0].shown_shape, one.rows[0].note) for one in grouped(rows)]
            part = notebook.table((Column("Tensor", is_code=True), Column("Shape"), Column("")), shown)
            meaning = MEANING.get(rows[0].category, "") if status == rows[0].category else "other elements"
            yield notebook.folded(f"{status}: {counted(len(rows), 'tensor')} ({meaning})", part)
        layers = [(one.path or "(network)", one.a or "-", one.b or "-") for one in self.architecture]
        config = [(one.key, _value(one.a), _value(one.b)) for one in self.config]
        for name, fields in (("architecture", layers), ("configuration", config)):
            heads = [Column(""), Column(self.a.label), Column(self.b.label)]
            part = notebook.table(heads, fields)
            yield notebook.folded(f"{name}: {counted(len(fields), 'difference')}", part)

    def _changed(self) -> str | None:
        """How many tensors changed, if that was asked for."""
        known = [row for row in self.rows if row.equal is not None]
        changed = sum(row.equal is False for row in known)
        return f"{changed:,} of {counted(len(known), 'tensor')}" if known else None

    def _title(self) -> Title:
        lines = []
        if self.target.elements:
            lines.append(
                f"{self.loadable.elements:,} of {self.target.elements:,} parameters "
                f"({percent(self.coverage)}) can be loaded as they are"
            )
        between = (self.a.label, self.b.label)
        return Title(self.headline, between=between, lines=lines, tone=_TONES[self.verdict])

    def _summary(self) -> Table:
        columns = (
            Column("status"),
            Column("tensors", is_number=True),
            Column("elements", is_number=True),
            Column("", tone="dim"),
        )
        rows = [
            (Cell(category, _tone(category)), f"{count.names:,}", f"{count.elements:,}", MEANING[category])
            for category, count in self.counts.items()
        ]
        return Table("Summary", columns, rows, opens=True)

    def _names(self) -> Table:
        """All tensors, one by one."""
        rows = [
            (Cell(row.status, _tone(row.status)), row.shown_name, row.shown_shape, row.note)
            for row in self.rows
        ]
        return Table("Tensors", _NAME_COLUMNS, rows, same=Category.MATCH, where="pages")

    def _exceptions(self) -> Table:
        """What differs in structure, then what differs in value alone; layers that differ alike stand in one line."""
        odd = [row for row in self.rows if row.category not in LOADABLE]
        odd += [row for row in self.rows if row.status == "VALUES"]
        rows = []
        for group in grouped(odd):
            first = group.rows[0]
            count = f" ({len(group.rows)})" if len(group.rows) > 1 else ""
            rows.append((first.status, group.name + count, first.shown_shape, first.note))
        return Table("What differs", _NAME_COLUMNS, rows, where="lines")

    def _modules(self) -> Tree:
        return Tree("Modules", _nodes([(_levels(row.name), row) for row in self.rows]), where="pages")

    def _bars(self) -> Bars:
        above = "norm of the change against the norm before"
        bars = [
            (part.module or "(top)", part.relative) for part in self.modules if math.isfinite(part.relative)
        ]
        return Bars("Change by module", bars, above=above, where="pages")

    def _architecture(self) -> Table:
        sides = (Column(side.label, is_code=True, is_given=True) for side in (self.a, self.b))
        columns = (Column("layer", is_code=True), *sides)
        rows = [(part.path or "(network)", part.a or "-", part.b or "-") for part in self.architecture]
        return Table("Architecture", columns, rows)

    def _fields(self, title: str, fields: Sequence[FieldDifference]) -> Table:
        columns = (Column("key"), *(Column(side.label, is_given=True) for side in (self.a, self.b)))
        return Table(title, columns, [(one.key, _value(one.a), _value(one.b)) for one in fields])

    def _values(self) -> Table:
        heads = ("change", "relative", "cosine", "largest", "elements changed")
        rows = [
            (
                change.name,
                f"{change.norm:.4g}",
                f"{change.relative:.3g}",
                "" if change.cosine is None else f"{change.cosine:.5f}",
                f"{change.largest:.3g}",
                f"{change.changed:.1%}",
            )
            for change in self.changes
        ]
        return Table(
            "Values", [Column("name", is_code=True), *(Column(head, is_number=True) for head in heads)], rows
        )

    def _frozen(self) -> Table:
        heads = ("frozen tensors", "frozen elements", "trainable elements")
        rows = [
            (part.where, f"{len(part.names):,}", f"{part.elements:,}", f"{part.trainable:,}")
            for part in self.frozen
        ]
        return Table(
            "Frozen", [Column("in", is_code=True), *(Column(head, is_number=True) for head in heads)], rows
        )


_NAME_COLUMNS = (
    Column("status"),
    Column("name", is_code=True),
    Column("shape", is_code=True),
    Column("", tone="dim"),
)


def _is_empty(block: Block) -> bool:
    """Whether a section has nothing to say; the table that opens the report stays."""
    match block:
        case Lines():
            return not block.lines
        case Table():
            return not block.rows and not block.opens
        case Tree():
            return not block.nodes
        case Bars():
            return not block.bars
    return False


def _tone(status: str) -> Tone:
    if status in (*LOADABLE, Category.ADAPTED):
        return "ok"
    return "bad" if status in (Category.SHAPE, Category.KIND, Category.AMBIGUOUS) else "warn"


def _value(value: object) -> str:
    return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def _levels(name: str) -> list[str]:
    return name.split(".", _MAX_DEPTH)


def _nodes(rows: Sequence[tuple[list[str], Row]]) -> list[Node]:
    """The tree of names: the tensors of a module, then the modules below it.

    Args:
        rows: each with what is left of its name at this level.
    """
    tensors = [_leaf(levels[0], row) for levels, row in rows if len(levels) == 1]
    below: dict[str, list[tuple[list[str], Row]]] = {}
    for levels, row in rows:
        if len(levels) > 1:
            below.setdefault(levels[0], []).append((levels[1:], row))
    return [*tensors, *(_module(name, inner) for name, inner in below.items())]


def _leaf(name: str, row: Row) -> Node:
    return Node(name, notes=(Cell(row.shown_shape, "dim"), Cell(row.status, _tone(row.status))))


def _module(name: str, rows: Sequence[tuple[list[str], Row]]) -> Node:
    odd = sum(row.status != Category.MATCH for _, row in rows)
    note = Cell(f"{odd} of {len(rows)} differ", "warn") if odd else Cell(f"{len(rows)} match", "dim")
    return Node(name, notes=(note,), nodes=_nodes(rows), is_open=bool(odd))
