"""Rendering diff reports and plans as text and as Markdown; `registry.reports.html` makes HTML of them."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from registry.store.text import printable
from registry.transfer.matching import LOADABLE, Category

if TYPE_CHECKING:
    from registry.transfer.diffing import DiffReport, Row
    from registry.transfer.plan import TransferPlan

MEANING = {
    Category.MATCH: "same name, shape and dtype",
    Category.RENAMED: "another name, by a rule",
    Category.PREFIX: "the name without a wrapper's prefix",
    Category.TIED: "shares memory with a name that has a partner",
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


PLAN_HEAD = ("", "target", "source", "why")
FROZEN_HEAD = ("in", "frozen names", "frozen elements", "trainable elements")


class Group:
    """Rows that differ in one number of their names alone."""

    def __init__(self, name: str, rows: Sequence[Row]) -> None:
        self.name = name
        self.rows = rows


def grouped(rows: Iterable[Row]) -> list[Group]:
    """Merge rows of one status, shape and dtype whose names differ in one number: `layers.{0-3,5}.weight`."""
    rows = list(rows)
    options: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        for pattern in _patterns(row):
            options[pattern].append(i)
    taken: dict[int, tuple[object, ...]] = {}
    for pattern, members in sorted(options.items(), key=lambda item: -len(item[1])):
        free = [i for i in members if i not in taken]
        if len(free) > 1:
            taken.update(dict.fromkeys(free, pattern))
    groups: dict[object, list[Row]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(taken.get(i, i), []).append(row)
    return [Group(_merged_name(key, members), members) for key, members in groups.items()]


def _patterns(row: Row) -> list[tuple[object, ...]]:
    parts = row.name.split(".")
    alike = (row.category, row.shape_a, row.shape_b, row.dtype_a, row.dtype_b, row.kind, row.equal)
    if row.a and row.b and row.a != row.b:
        return []
    return [
        (*alike, tuple(parts[:i]), tuple(parts[i + 1 :])) for i, part in enumerate(parts) if part.isdigit()
    ]


def _merged_name(key: object, rows: Sequence[Row]) -> str:
    if not isinstance(key, tuple) or len(rows) == 1:
        return name_of(rows[0])
    before, after = key[-2], key[-1]
    numbers = sorted(int(row.name.split(".")[len(before)]) for row in rows)
    return ".".join([*before, "{" + _ranges(numbers) + "}", *after])


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers as ranges.

    >>> _ranges([0, 1, 2, 3, 5])
    '0-3,5'
    """
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def name_of(row: Row) -> str:
    if row.a and row.b and row.a != row.b:
        return f"{row.a} -> {row.b}"
    return row.name


def _shape(shape: tuple[int, ...] | None) -> str:
    return "" if shape is None else "x".join(map(str, shape)) or "scalar"


def shapes_of(row: Row) -> str:
    a, b = _shape(row.shape_a), _shape(row.shape_b)
    shapes = f"{a} -> {b}" if a and b and a != b else a or b
    if row.dtype_a and row.dtype_b and row.dtype_a != row.dtype_b:
        return f"{shapes} {row.dtype_a} -> {row.dtype_b}"
    return shapes


def opening(report: DiffReport) -> list[str]:
    lines = [f"{report.headline}: {report.a.label} -> {report.b.label}"]
    if report.target.elements:
        from registry.transfer.plan import percent

        lines.append(
            f"{report.loadable.elements:,} of {report.target.elements:,} parameters "
            f"({percent(report.coverage)}) can be loaded as they are"
        )
    return lines


def _exceptions(report: DiffReport) -> list[Row]:
    """What differs in structure, then what differs in value alone."""
    odd = [row for row in report.rows if row.category not in LOADABLE]
    return odd + [row for row in report.rows if row.category in LOADABLE and row.equal is False]


def status_of(row: Row) -> str:
    return "VALUES" if row.category in LOADABLE and row.equal is False else str(row.category)


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _merged_values(rows: Sequence[Row]) -> list[tuple[str, str, str, str]]:
    found = []
    for group in grouped(rows):
        first = group.rows[0]
        count = f" ({len(group.rows)})" if len(group.rows) > 1 else ""
        found.append((status_of(first), group.name + count, shapes_of(first), first.note))
    return found


def as_text(report: DiffReport) -> str:
    """The report for a terminal or a pipe."""
    lines = [*opening(report), ""]
    table = [("", "NAMES", "ELEMENTS", "")]
    table += [
        (category, f"{count.names:,}", f"{count.elements:,}", MEANING[category])
        for category, count in report.counts.items()
    ]
    lines += _aligned(table, right=(1, 2))
    rows = _merged_values(_exceptions(report))
    if rows:
        lines += ["", "what differs", *(f"  {line}" for line in _aligned(rows))]
    if report.architecture:
        layers = [(d.path or "(network)", d.a or "-", "->", d.b or "-") for d in report.architecture]
        lines += ["", "architecture", *(f"  {line}" for line in _aligned(layers))]
    for title, fields in (("configuration", report.config), ("metrics", report.metrics)):
        if fields:
            lines += [
                "",
                title,
                *(
                    f"  {line}"
                    for line in _aligned([(f.key, value_of(f.a), "->", value_of(f.b)) for f in fields])
                ),
            ]
    if report.changes:
        values = [("NAME", "CHANGE", "RELATIVE", "COSINE", "LARGEST", "ELEMENTS CHANGED")]
        values += [
            (
                *(
                    c.name,
                    f"{c.norm:.4g}",
                    f"{c.relative:.3g}",
                    "" if c.cosine is None else f"{c.cosine:.5f}",
                ),
                *(f"{c.largest:.3g}", f"{c.changed:.1%}"),
            )
            for c in report.changes
        ]
        lines += ["", "values", *(f"  {line}" for line in _aligned(values, right=(1, 2, 3, 4, 5)))]
    if report.plan:
        lines += ["", *plan_text(report.plan).splitlines()]
    if report.frozen:
        rows = [("", "FROZEN", "ELEMENTS", "TRAINABLE"), *frozen_rows(report)]
        lines += ["", "frozen", *(f"  {line}" for line in _aligned(rows, right=(1, 2, 3)))]
    for title, texts in (("suggestions", report.suggestions), ("warnings", report.warnings)):
        if texts:
            lines += ["", title, *(f"  {text}" for text in texts)]
    if report.command:
        lines += ["", f"again: {report.command}"]
    return "\n".join(printable_lines(lines))


def printable_lines(lines: Iterable[str]) -> list[str]:
    return [printable(line) for line in lines]


def value_of(value: object) -> str:
    return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def as_markdown(report: DiffReport) -> str:
    """The report as Markdown, for an issue or a pull request."""

    def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
        cells = [[_escaped(cell) for cell in row] for row in rows]
        return [
            f"| {' | '.join(head)} |",
            f"|{'---|' * len(head)}",
            *(f"| {' | '.join(row)} |" for row in cells),
            "",
        ]

    first, *rest = opening(report)
    lines = [f"# {_escaped(first)}", "", *rest, ""]
    lines += table(
        ("status", "names", "elements", ""),
        [(c, f"{n.names:,}", f"{n.elements:,}", MEANING[c]) for c, n in report.counts.items()],
    )
    rows = _merged_values(_exceptions(report))
    if rows:
        lines += ["## What differs", "", *table(("status", "name", "shape", ""), rows)]
    if report.architecture:
        layers = [(d.path or "(network)", d.a or "", d.b or "") for d in report.architecture]
        lines += ["## Architecture", "", *table(("layer", report.a.label, report.b.label), layers)]
    for title, fields in (("Configuration", report.config), ("Metrics", report.metrics)):
        if fields:
            values = [(f.key, value_of(f.a), value_of(f.b)) for f in fields]
            lines += [f"## {title}", "", *table(("", report.a.label, report.b.label), values)]
    if report.changes:
        changes = [(c.name, f"{c.norm:.4g}", f"{c.relative:.3g}", f"{c.changed:.1%}") for c in report.changes]
        lines += ["## Values", "", *table(("name", "change", "relative", "elements changed"), changes)]
    if report.plan:
        lines += ["## Plan", "", loads(report.plan), "", *table(PLAN_HEAD, plan_rows(report.plan))]
    if report.frozen:
        lines += ["## Frozen", "", *table(FROZEN_HEAD, frozen_rows(report))]
    for title, texts in (("Suggestions", report.suggestions), ("Warnings", report.warnings)):
        if texts:
            lines += [f"## {title}", "", *(f"- {_escaped(text)}" for text in texts), ""]
    if report.command:
        lines += ["Made by", "", f"    {printable(report.command)}", ""]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    found = html.escape(printable(str(text)), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|#" else c for c in found)


def plan_text(plan: TransferPlan) -> str:
    """A plan for people: what is loaded, what is not and why, what is frozen."""
    lines = [
        f"plan: {plan.source} -> {plan.target}",
        loads(plan),
        *plan.notes,
        "",
    ]
    rows = [("", "TARGET", "SOURCE", "WHY"), *plan_rows(plan)]
    lines += _aligned(rows)
    if part := plan.frozen_part:
        lines += ["", f"freezes {len(part.names)} parameters; {part.trainable:,} elements stay trainable"]
    return "\n".join(printable_lines(lines))


def loads(plan: TransferPlan) -> str:
    """What a plan would load, in one line."""
    return plan.summary.replace("loaded", "loads", 1)


def plan_rows(plan: TransferPlan) -> list[tuple[str, str, str, str]]:
    """What happens to each name, the name, where it comes from if that has another name, and why."""
    return [
        (
            step.action,
            step.target or "-",
            "" if step.target == step.source else step.source or "",
            step.why + (f" ({step.adapter})" if step.adapter else ""),
        )
        for step in plan.steps
    ]


def frozen_rows(report: DiffReport) -> list[tuple[str, str, str, str]]:
    """Where something is frozen, how many names and elements, and how many elements are trained."""
    return [
        (part.where, f"{len(part.names):,}", f"{part.elements:,}", f"{part.trainable:,}")
        for part in report.frozen
    ]
