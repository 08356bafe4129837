"""Diff reports as one HTML file that works without a network, on a phone, in the dark, and for a screen reader."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from registry.reports.text import (
    FROZEN_HEAD,
    MEANING,
    PLAN_HEAD,
    frozen_rows,
    loads,
    name_of,
    opening,
    plan_rows,
    shapes_of,
    status_of,
    value_of,
)
from registry.store.text import printable
from registry.transfer.matching import Category

if TYPE_CHECKING:
    from registry.transfer.diffing import DiffReport, Row

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
pre{background:var(--card);padding:.7rem;overflow-x:auto;border-radius:6px}code{overflow-wrap:anywhere}td code{display:inline-block;min-width:5rem}svg{max-width:100%;height:auto}
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
    rest = opening(report)[1:]
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
        f'<td class="dim">{_e(MEANING[c])}</td></tr>'
        for c, n in report.counts.items()
    )
    parts.append(
        '<h2>Summary</h2><div class="scroll" role="region" aria-label="Summary" tabindex="0"><table><thead><tr><th scope="col">status</th><th scope="col" class="n">names'
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
            f"<tr><td><code>{_e(d.path or '(network)')}</code></td><td><code>{_e(d.a or '')}</code></td><td><code>{_e(d.b or '')}</code></td></tr>"
            for d in report.architecture
        )
        parts.append(_html_table("Architecture", ("layer", report.a.label, report.b.label), layers))
    for title, fields in (("Configuration", report.config), ("Metrics", report.metrics)):
        if fields:
            cells = "".join(
                f"<tr><td>{_e(f.key)}</td><td>{_e(value_of(f.a))}</td><td>{_e(value_of(f.b))}</td></tr>"
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
                "Values",
                ("name", "change", "relative", "cosine", "largest", "elements changed"),
                cells,
                numbers=5,
            )
        )
    if report.plan:
        rows = "".join(f"<tr>{''.join(map(_code, row))}</tr>" for row in plan_rows(report.plan))
        parts.append(_html_table("Plan", PLAN_HEAD, rows, loads(report.plan)))
    if report.frozen:
        rows = "".join(
            f"<tr>{_code(where)}{''.join(f'<td class=n>{_e(count)}</td>' for count in counts)}</tr>"
            for where, *counts in frozen_rows(report)
        )
        parts.append(_html_table("Frozen", FROZEN_HEAD, rows, numbers=3))
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


def _html_table(title: str, head: Sequence[str], rows: str, above: str = "", numbers: int = 0) -> str:
    """A table whose last columns hold numbers."""
    first = len(head) - numbers
    cells = "".join(
        f'<th scope="col"{" class=n" if i >= first else ""}>{_e(text)}</th>' for i, text in enumerate(head)
    )
    text = f"<p>{_e(above)}</p>" if above else ""
    return (
        f'<h2>{title}</h2>{text}<div class="scroll" role="region" aria-label="{title}" tabindex="0"><table><thead>'
        f"<tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _code(text: str) -> str:
    return f"<td><code>{_e(text)}</code></td>"


def _html_names(report: DiffReport) -> str:
    statuses = list(dict.fromkeys(status_of(row) for row in report.rows))
    boxes = "".join(
        f'<label><input type="checkbox" data-status="{_e(s)}" checked> <span class="{_tone(s)}">{_e(s)}</span></label>'
        for s in statuses
    )
    rows = "".join(
        f'<tr data-status="{_e(status_of(row))}" data-same="{"yes" if row.category == Category.MATCH and row.equal is not False else "no"}">'
        f'<td class="s {_tone(status_of(row))}">{_e(status_of(row))}</td><td><code>{_e(name_of(row))}</code></td>'
        f'<td><code>{_e(shapes_of(row))}</code></td><td class="dim">{_e(row.note)}</td></tr>'
        for row in report.rows
    )
    return (
        '<h2>Names</h2><div class="filters" role="group" aria-label="Filter by status">'
        f'<label><input type="checkbox" id="only"> only differences</label>{boxes}</div>'
        '<p class="dim" id="shown" aria-live="polite"></p>'
        '<div class="scroll" role="region" aria-label="Names" tabindex="0"><table><thead><tr><th scope="col">status</th>'
        '<th scope="col">name</th>'
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
        status = status_of(row)
        parts.append(
            f'<div><code>{_e(leaf)}</code> <span class="dim">{_e(shapes_of(row))}</span> '
            f'<span class="s {_tone(status)}">{_e(status)}</span></div>'
        )
    for name, child in node.items():
        if name and isinstance(child, dict):
            rows = list(_below(child))
            odd = sum(status_of(row) != "MATCH" for row in rows)
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
        '<h2>Change by module</h2><p class="dim">norm of the change against the norm before</p>'
        '<div class="scroll" role="region" aria-label="Change by module" tabindex="0">'
        f'<svg role="img" aria-label="Relative change of each module" width="640" height="{height}" '
        f'viewBox="0 0 640 {height}">{"".join(bars)}</svg></div>'
    )
