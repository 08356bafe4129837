"""Rendering diff reports and plans: text, Markdown, and one HTML file that needs nothing else."""

from __future__ import annotations

import html
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from registry.matching import LOADABLE, Category
from registry.store.text import printable

if TYPE_CHECKING:
    from registry.diffing import DiffReport, Row
    from registry.plans import TransferPlan

_MEANING = {
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
        return _name(rows[0])
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


def _name(row: Row) -> str:
    if row.a and row.b and row.a != row.b:
        return f"{row.a} -> {row.b}"
    return row.name


def _shape(shape: tuple[int, ...] | None) -> str:
    return "" if shape is None else "x".join(map(str, shape)) or "scalar"


def _shapes(row: Row) -> str:
    a, b = _shape(row.shape_a), _shape(row.shape_b)
    shapes = f"{a} -> {b}" if a and b and a != b else a or b
    if row.dtype_a and row.dtype_b and row.dtype_a != row.dtype_b:
        return f"{shapes} {row.dtype_a} -> {row.dtype_b}"
    return shapes


def _opening(report: DiffReport) -> list[str]:
    lines = [f"{report.headline}: {report.a.label} -> {report.b.label}"]
    if report.target.elements:
        from registry.plans import percent

        lines.append(
            f"{report.loadable.elements:,} of {report.target.elements:,} parameters "
            f"({percent(report.coverage)}) can be loaded as they are"
        )
    return lines


def _exceptions(report: DiffReport) -> list[Row]:
    """What differs in structure, then what differs in value alone."""
    odd = [row for row in report.rows if row.category not in LOADABLE]
    return odd + [row for row in report.rows if row.category in LOADABLE and row.equal is False]


def _status(row: Row) -> str:
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
        found.append((_status(first), group.name + count, _shapes(first), first.note))
    return found


def as_text(report: DiffReport) -> str:
    """The report for a terminal or a pipe."""
    lines = [*_opening(report), ""]
    table = [("", "NAMES", "ELEMENTS", "")]
    table += [
        (category, f"{count.names:,}", f"{count.elements:,}", _MEANING[category])
        for category, count in report.counts.items()
    ]
    lines += _aligned(table, right=(1, 2))
    rows = _merged_values(_exceptions(report))
    if rows:
        lines += ["", "what differs", *(f"  {line}" for line in _aligned(rows))]
    if report.architecture:
        layers = [(d.path, d.a or "-", "->", d.b or "-") for d in report.architecture]
        lines += ["", "architecture", *(f"  {line}" for line in _aligned(layers))]
    for title, fields in (("configuration", report.config), ("metrics", report.metrics)):
        if fields:
            lines += [
                "",
                title,
                *(
                    f"  {line}"
                    for line in _aligned([(f.key, _value(f.a), "->", _value(f.b)) for f in fields])
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
    for title, texts in (("suggestions", report.suggestions), ("warnings", report.warnings)):
        if texts:
            lines += ["", title, *(f"  {text}" for text in texts)]
    if report.command:
        lines += ["", f"again: {report.command}"]
    return "\n".join(printable_lines(lines))


def printable_lines(lines: Iterable[str]) -> list[str]:
    return [printable(line) for line in lines]


def _value(value: object) -> str:
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

    first, *rest = _opening(report)
    lines = [f"# {_escaped(first)}", "", *rest, ""]
    lines += table(
        ("status", "names", "elements", ""),
        [(c, f"{n.names:,}", f"{n.elements:,}", _MEANING[c]) for c, n in report.counts.items()],
    )
    rows = _merged_values(_exceptions(report))
    if rows:
        lines += ["## What differs", "", *table(("status", "name", "shape", ""), rows)]
    if report.architecture:
        layers = [(d.path, d.a or "", d.b or "") for d in report.architecture]
        lines += ["## Architecture", "", *table(("layer", report.a.label, report.b.label), layers)]
    for title, fields in (("Configuration", report.config), ("Metrics", report.metrics)):
        if fields:
            values = [(f.key, _value(f.a), _value(f.b)) for f in fields]
            lines += [f"## {title}", "", *table(("", report.a.label, report.b.label), values)]
    if report.changes:
        changes = [(c.name, f"{c.norm:.4g}", f"{c.relative:.3g}", f"{c.changed:.1%}") for c in report.changes]
        lines += ["## Values", "", *table(("name", "change", "relative", "elements changed"), changes)]
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


_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2024;--dim:#5f6870;--line:#dde2e7;--card:#f6f8fa;
--ok:#1a7f4b;--warn:#9a6700;--bad:#b42332;--accent:#0b62d6}
@media (prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#e6e9ec;--dim:#9aa4ad;--line:#30363c;--card:#1d2125;
--ok:#4cc38a;--warn:#e2b340;--bad:#ff7b85;--accent:#6cb0ff}}
*{box-sizing:border-box}body{margin:0 auto;max-width:70rem;padding:1rem;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,sans-serif}h1{font-size:1.5rem;margin:.5rem 0}h2{font-size:1.15rem;margin:2rem 0 .5rem}
.dim{color:var(--dim)}table{border-collapse:collapse;width:100%}.scroll{overflow-x:auto}
th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}code,pre{font-family:ui-monospace,monospace;font-size:.9em}
pre{background:var(--card);padding:.7rem;overflow-x:auto;border-radius:6px}code{overflow-wrap:anywhere}
.s{font-weight:600;white-space:nowrap}.ok{color:var(--ok)}.warn{color:var(--warn)}.bad{color:var(--bad)}
.filters{display:flex;flex-wrap:wrap;gap:.4rem 1rem;margin:.5rem 0}label{cursor:pointer;padding:.2rem 0}
details{margin:.1rem 0 .1rem 1rem;border-left:1px solid var(--line);padding-left:.6rem}summary{cursor:pointer;padding:.15rem 0}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}.bar{fill:var(--accent)}svg text{fill:var(--fg);font-size:12px}
[hidden]{display:none}
"""

_SCRIPT = """
(function(){var boxes=[].slice.call(document.querySelectorAll('input[data-status]')),
only=document.getElementById('only'),rows=[].slice.call(document.querySelectorAll('tr[data-status]'));
function show(){var on={};boxes.forEach(function(b){on[b.dataset.status]=b.checked});var n=0;
rows.forEach(function(r){var v=on[r.dataset.status]&&!(only.checked&&r.dataset.same==='yes');r.hidden=!v;if(v)n++});
document.getElementById('shown').textContent=n+' of '+rows.length+' names shown'}
boxes.concat([only]).forEach(function(b){b.addEventListener('change',show)});show()})();
"""


def _e(text: object) -> str:
    """Text that HTML shows as it is."""
    return html.escape(printable(str(text)))


def _tone(status: str) -> str:
    if status in ("MATCH", "RENAMED", "PREFIX", "TIED", "ADAPTED"):
        return "ok"
    return "bad" if status in ("SHAPE", "KIND", "AMBIGUOUS") else "warn"


def as_html(report: DiffReport, *, whole: bool = True) -> str:
    """The report as one HTML document that works without a network; a part of a page unless `whole`."""
    rest = _opening(report)[1:]
    tone = (
        "ok"
        if report.verdict in ("IDENTICAL", "SAME STRUCTURE")
        else "warn"
        if report.verdict == "COMPATIBLE"
        else "bad"
    )
    parts = [
        f'<main><h1><span class="{tone}">{_e(report.headline)}</span></h1>',
        f"<p><code>{_e(report.a.label)}</code> &rarr; <code>{_e(report.b.label)}</code></p>",
        *(f"<p>{_e(line)}</p>" for line in rest),
    ]
    counts = "".join(
        f'<tr><td class="s {_tone(c)}">{_e(c)}</td><td class="n">{n.names:,}</td><td class="n">{n.elements:,}</td>'
        f'<td class="dim">{_e(_MEANING[c])}</td></tr>'
        for c, n in report.counts.items()
    )
    parts.append(
        '<h2>Summary</h2><div class="scroll"><table><thead><tr><th scope="col">status</th><th scope="col" class="n">names'
        f'</th><th scope="col" class="n">elements</th><th scope="col"></th></tr></thead><tbody>{counts}</tbody></table></div>'
    )
    for title, texts in (("Warnings", report.warnings), ("Suggestions", report.suggestions)):
        if texts:
            items = "".join(f"<li><code>{_e(text)}</code></li>" for text in texts)
            parts.append(f"<h2>{title}</h2><ul>{items}</ul>")
    parts.append(_html_names(report))
    parts.append(_html_tree(report))
    if report.modules:
        parts.append(_html_chart(report))
    if report.architecture:
        layers = "".join(
            f"<tr><td><code>{_e(d.path)}</code></td><td><code>{_e(d.a or '')}</code></td><td><code>{_e(d.b or '')}</code></td></tr>"
            for d in report.architecture
        )
        parts.append(_html_table("Architecture", ("layer", report.a.label, report.b.label), layers))
    for title, fields in (("Configuration", report.config), ("Metrics", report.metrics)):
        if fields:
            cells = "".join(
                f"<tr><td>{_e(f.key)}</td><td>{_e(_value(f.a))}</td><td>{_e(_value(f.b))}</td></tr>"
                for f in fields
            )
            parts.append(_html_table(title, ("", report.a.label, report.b.label), cells))
    if report.changes:
        cells = "".join(
            f'<tr><td><code>{_e(c.name)}</code></td><td class="n">{c.norm:.4g}</td><td class="n">{c.relative:.3g}</td>'
            f'<td class="n">{"" if c.cosine is None else f"{c.cosine:.5f}"}</td><td class="n">{c.largest:.3g}</td>'
            f'<td class="n">{c.changed:.1%}</td></tr>'
            for c in report.changes
        )
        parts.append(
            _html_table(
                "Values", ("name", "change", "relative", "cosine", "largest", "elements changed"), cells
            )
        )
    if report.command:
        parts.append(f"<h2>Again</h2><pre>{_e(report.command)}</pre>")
    parts.append("</main>")
    body = "\n".join(parts)
    if not whole:
        return f"<div>{body}</div>"
    title = _e(f"{report.a.label} -> {report.b.label}")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{_STYLE}</style></head><body>{body}<script>{_SCRIPT}</script></body></html>\n"
    )


def _html_table(title: str, head: Sequence[str], rows: str) -> str:
    cells = "".join(f'<th scope="col">{html.escape(printable(text))}</th>' for text in head)
    return f'<h2>{title}</h2><div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div>'


def _html_names(report: DiffReport) -> str:
    statuses = list(dict.fromkeys(_status(row) for row in report.rows))
    boxes = "".join(
        f'<label><input type="checkbox" data-status="{_e(s)}" checked> <span class="{_tone(s)}">{_e(s)}</span></label>'
        for s in statuses
    )
    rows = "".join(
        f'<tr data-status="{_e(_status(row))}" data-same="{"yes" if row.category == Category.MATCH and row.equal is not False else "no"}">'
        f'<td class="s {_tone(_status(row))}">{_e(_status(row))}</td><td><code>{_e(_name(row))}</code></td>'
        f'<td><code>{_e(_shapes(row))}</code></td><td class="dim">{_e(row.note)}</td></tr>'
        for row in report.rows
    )
    return (
        '<h2>Names</h2><div class="filters" role="group" aria-label="Filter by status">'
        f'<label><input type="checkbox" id="only"> only differences</label>{boxes}</div>'
        '<p class="dim" id="shown" aria-live="polite"></p>'
        '<div class="scroll"><table><thead><tr><th scope="col">status</th><th scope="col">name</th>'
        f'<th scope="col">shape</th><th scope="col"></th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _html_tree(report: DiffReport) -> str:
    tree: dict[str, object] = {}
    for row in report.rows:
        node = tree
        for part in row.name.split(".")[:-1]:
            node = node.setdefault(part, {})  # type: ignore[assignment]
        node.setdefault("", []).append(row)  # type: ignore[attr-defined]
    return f"<h2>Modules</h2>{_html_node(tree)}"


def _html_node(node: dict[str, object]) -> str:
    parts = []
    for row in node.get("", []):  # type: ignore[attr-defined]
        leaf = row.name.rpartition(".")[2]
        status = _status(row)
        parts.append(
            f'<div><code>{_e(leaf)}</code> <span class="dim">{_e(_shapes(row))}</span> '
            f'<span class="s {_tone(status)}">{_e(status)}</span></div>'
        )
    for name, child in node.items():
        if name and isinstance(child, dict):
            rows = list(_below(child))
            odd = sum(_status(row) != "MATCH" for row in rows)
            note = (
                f'<span class="warn">{odd} of {len(rows)} differ</span>'
                if odd
                else f'<span class="dim">{len(rows)} match</span>'
            )
            parts.append(
                f"<details{' open' if odd else ''}><summary><code>{_e(name)}</code> {note}</summary>{_html_node(child)}</details>"
            )
    return "".join(parts)


def _below(node: dict[str, object]) -> Iterable[Row]:
    for name, child in node.items():
        if name == "":
            yield from child  # type: ignore[misc]
        elif isinstance(child, dict):
            yield from _below(child)


def _html_chart(report: DiffReport) -> str:
    """The relative change of each module, as bars."""
    modules = [m for m in report.modules if math.isfinite(m.relative)]
    top = max((m.relative for m in modules), default=0.0) or 1.0
    bars = []
    for i, m in enumerate(modules):
        width = 320 * m.relative / top
        bars.append(
            f'<text x="0" y="{i * 22 + 15}">{_e(m.module[-34:] or "(top)")}</text>'
            f'<rect class="bar" x="240" y="{i * 22 + 3}" width="{width:.1f}" height="15" rx="2"><title>{_e(m.module)}: '
            f'{m.relative:.4g}</title></rect><text x="{246 + width:.1f}" y="{i * 22 + 15}">{m.relative:.3g}</text>'
        )
    height = len(modules) * 22 + 4
    return (
        '<h2>Change by module</h2><p class="dim">norm of the change against the norm before</p><div class="scroll">'
        f'<svg role="img" aria-label="Relative change of each module" width="640" height="{height}" '
        f'viewBox="0 0 640 {height}">{"".join(bars)}</svg></div>'
    )


def plan_text(plan: TransferPlan) -> str:
    """A plan for people: what is loaded, what is not and why, what is frozen."""
    lines = [
        f"plan: {plan.source} -> {plan.target}",
        plan.summary.replace("loaded", "loads", 1),
        *plan.notes,
        "",
    ]
    rows = [("", "TARGET", "SOURCE", "WHY")]
    for step in plan.steps:
        source = step.source or ""
        shown = "" if step.target == step.source else source
        rows.append(
            (
                step.action,
                step.target or "-",
                shown,
                step.why + (f" ({step.adapter})" if step.adapter else ""),
            )
        )
    lines += _aligned(rows)
    if plan.freeze:
        parameters = [step for step in plan.steps if step.target and not step.buffer]
        from registry.freezing import Freeze

        frozen = [step for step in parameters if Freeze(plan.freeze).covers(step.target or "")]
        trained = sum(step.elements for step in parameters) - sum(step.elements for step in frozen)
        lines += ["", f"freezes {len(frozen)} parameters; {trained:,} elements stay trainable"]
    return "\n".join(printable_lines(lines))
