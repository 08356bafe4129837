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
from registry.reports.blocks import Block, Branch, Cell, Code, Column, Lines, Strip, Table, Title, Tone, Tree
from registry.reports.words import counted, number
from registry.store.text import printable
from registry.transfer.matching import LOADABLE, Category
from registry.transfer.plan import FrozenPart, TransferPlan, percent
from registry.transfer.report_rows import ModuleChange, Part, Row, ValueChange, grouped
from registry.transfer.report_tree import ModuleChanges, TensorChange, modules

SCHEMA = 1
Verdict = Literal["IDENTICAL", "SAME STRUCTURE", "COMPATIBLE", "INCOMPATIBLE"]

_TONES: dict[str, Tone] = {
    "IDENTICAL": "ok",
    "SAME STRUCTURE": "ok",
    "COMPATIBLE": "warn",
    "INCOMPATIBLE": "bad",
}

_MOST_MODULES = 40
"""Modules that lines show. Of more, those of one module are added up."""

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
        if self.verdict != "COMPATIBLE" or not self.exceptions:
            return self.verdict
        return f"COMPATIBLE, {counted(self.exceptions, 'difference')}"

    @property
    def coverage(self) -> float:
        """Share of the target's parameters that can be loaded as they are."""
        return self.loadable.elements / self.target.elements if self.target.elements else 0.0

    @property
    def is_measured(self) -> bool:
        """Whether it says how far tensors moved."""
        return bool(self.changes)

    def blocks(self, *, is_deep: bool = False) -> list[Block]:
        """The report for a renderer, such as `registry.reports.html.render`.

        Args:
            is_deep: let lines show each tensor, and not the modules alone. Pages show both.
        """
        advice = [
            Lines("Warnings", self.warnings, tone="warn"),
            Lines("Suggestions", self.suggestions),
        ]
        blocks: list[Block] = [
            self._title(),
            self._strip(),
            # Pages have the advice at the top. Lines have it at the end, where the reader of a terminal looks.
            *(replace(block, where="pages") for block in advice),
            self._exceptions(),
            *self._trees(is_deep=is_deep),
            self._fields("Configuration", self.config),
            self._architecture(),
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

    def _strip(self) -> Strip:
        """How much is equal, what changed most, and how the metrics went."""
        found = self.modules_changed()
        changed, tensors = (
            sum(module.changed for module in found),
            sum(len(module.tensors) for module in found),
        )
        facts: list[tuple[str, Cell | str]] = [("tensors changed", f"{changed} of {tensors}")]
        moved = [module for module in found if module.relative and math.isfinite(module.relative)]
        if moved:
            most = max(moved, key=lambda module: module.relative or 0.0)
            facts.append(("changed most", f"{most.path or '(top)'} {most.relative:.3f}"))
        facts += [(field.key, _course(field)) for field in self.metrics]
        odd = [(category, count) for category, count in self.counts.items() if category is not Category.MATCH]
        called = {Category.ONLY_A: f"only in {self.a.label}", Category.ONLY_B: f"only in {self.b.label}"}
        facts += [
            (
                called.get(category, category.lower().replace("_", " ")),
                Cell(f"{count.names:,}", _tone(category)),
            )
            for category, count in odd
        ]
        return Strip(facts)

    def modules_changed(self, depth: int | None = None) -> list[ModuleChanges]:
        """The modules, each with its tensors and what became of them; see `registry.transfer.report_tree.modules`."""
        return modules(self.rows, self.changes, is_measured=self.is_measured or self.is_same, depth=depth)

    def _trees(self, *, is_deep: bool) -> list[Tree]:
        """The modules for pages; and for lines, with fewer of them where they are many, and none if nothing changed."""
        found = self.modules_changed()
        deepest = max((module.path.count(".") + 1 for module in found), default=0)
        fewer = found
        while deepest > 1 and not is_deep and sum(bool(module.changed) for module in fewer) > _MOST_MODULES:
            deepest -= 1
            fewer = self.modules_changed(deepest)
        trees = [replace(self._tree(found, is_deep=is_deep), where="pages")]
        if any(module.changed for module in fewer):
            trees.append(replace(self._tree(fewer, is_deep=is_deep), where="lines"))
        return trees

    def _tree(self, found: Sequence[ModuleChanges], *, is_deep: bool) -> Tree:
        """Modules, with a bar for how far each moved, and below each its tensors."""
        finite = [module.relative for module in found if module.relative and math.isfinite(module.relative)]
        finite += [
            one.relative
            for module in found
            for one in module.tensors
            if one.relative and math.isfinite(one.relative)
        ]
        top = max(finite, default=0.0)
        columns = (
            Column("module", is_code=True),
            *([Column("value", is_number=True)] if top else []),
            Column("status"),
            Column("size"),
            *(
                [Column("cosine", is_number=True), Column("largest", is_number=True)]
                if top and is_deep
                else []
            ),
        )
        rows = [
            Branch(
                cells=(
                    module.path or "(top)",
                    *_measures(module.relative, top),
                    *_sum(module),
                    *_blanks(top, is_deep),
                ),
                bar=_share(module.relative, top),
                rows=[_leaf(one, top, is_deep) for one in module.tensors],
                is_same=not module.changed,
            )
            for module in found
        ]
        return Tree("Modules", columns, rows, bar="relative change" if top else "", is_deep=is_deep)

    def _exceptions(self) -> Table:
        """What differs in structure; layers that differ alike stand in one line."""
        odd = [row for row in self.rows if row.category not in LOADABLE or row.category is Category.CAST]
        rows = []
        for group in grouped(odd):
            first = group.rows[0]
            count = f" ({len(group.rows)})" if len(group.rows) > 1 else ""
            rows.append(
                (Cell(first.status, _tone(first.status)), group.name + count, first.shown_shape, first.note)
            )
        return Table("What differs", _NAME_COLUMNS, rows)

    def _architecture(self) -> Table:
        sides = (Column(side.label, is_code=True, is_given=True) for side in (self.a, self.b))
        columns = (Column("layer", is_code=True), *sides)
        rows = [(part.path or "(network)", part.a or "-", part.b or "-") for part in self.architecture]
        return Table("Architecture", columns, rows)

    def _fields(self, title: str, fields: Sequence[FieldDifference]) -> Table:
        columns = (Column("key"), *(Column(side.label, is_given=True) for side in (self.a, self.b)))
        return Table(title, columns, [(one.key, _value(one.a), _value(one.b)) for one in fields])

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
            return not block.rows
        case Strip():
            return not block.facts
    return False


def _tone(status: str) -> Tone:
    if status in (*LOADABLE, Category.ADAPTED):
        return "ok"
    return "bad" if status in (Category.SHAPE, Category.KIND, Category.AMBIGUOUS) else "warn"


def _value(value: object) -> str:
    return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def _course(field: FieldDifference) -> str:
    """How a metric went from one side to the other."""
    between = f"{_value(field.a)} → {_value(field.b)}"
    if not (isinstance(field.a, float | int) and isinstance(field.b, float | int)):
        return between
    return f"{between} ({field.b - field.a:+.4g})"


def _share(relative: float | None, top: float) -> float | None:
    return relative / top if relative and top and math.isfinite(relative) else None


def _measures(relative: float | None, top: float) -> list[Cell | str]:
    """The cell of the relative change, where the tree has such a column."""
    if not top:
        return []
    return ["" if relative is None else "=" if relative == 0 else f"{relative:.3f}"]


def _sum(module: ModuleChanges) -> list[Cell | str]:
    """What a module says of its tensors: how many changed, and how many numbers they hold."""
    count = len(module.tensors)
    status = Cell(f"{module.changed} of {count} changed", "warn") if module.changed else Cell("equal", "ok")
    return [status, counted(module.elements, "value")]


def _blanks(top: float, is_deep: bool) -> list[Cell | str]:
    return ["", ""] if top and is_deep else []


def _leaf(one: TensorChange, top: float, is_deep: bool) -> Branch:
    """The row of a tensor."""
    shown = one.shape + (f" {one.dtype}" if "→" in one.dtype else "")
    measures: list[Cell | str] = []
    if top and is_deep:
        measures = [
            "" if one.cosine is None else f"{one.cosine:.4f}",
            "" if one.largest is None else number(one.largest),
        ]
    status = {"=": Cell("equal", "dim"), "~": Cell("changed")}.get(one.sign, Cell(""))
    if one.status not in ("MATCH", "VALUES"):
        status = Cell(MEANING[Category(one.status)], _tone(one.status))
    return Branch(
        cells=(one.name, *_measures(one.relative if one.sign != "=" else 0.0, top), status, shown, *measures),
        bar=_share(one.relative, top),
        is_same=one.sign == "=",
    )
