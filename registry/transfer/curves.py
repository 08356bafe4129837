"""Comparing variants of a training: one metric of several models, epoch by epoch."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from registry.catalog.resolving import hint, resolve
from registry.catalog.runs import Runs
from registry.catalog.versions import Version, find_versions, list_versions
from registry.store.errors import NotFound
from registry.store.text import printable, quoted

if TYPE_CHECKING:
    from registry.home import Home

_COLOURS = ("#0b62d6", "#d1570a", "#1a7f4b", "#8a3ffc", "#b42332", "#5f6870")


class Curve(NamedTuple):
    """The values of a metric of one model, run or version, by epoch."""

    name: str
    values: dict[int, float]


def curves(home: Home, names: Sequence[str], metric: str) -> list[Curve]:
    """A metric (or `loss`) of several models, runs or versions, by epoch.

    Args:
        names: a model's name stands for all its versions, a run's, such as `lenet5/run-2`, for those that it saved, and any
            other reference for one version. The newest version counts where an epoch has several.

    Raises:
        NotFound: if there is nothing of that name, or no version of it has the metric and an epoch.
    """
    found = []
    for given in names:
        name, versions = _versions(home, given)
        values: dict[int, float] = {}
        for version in versions[::-1]:
            value = version.loss if metric == "loss" else version.metrics.get(metric)
            if value is not None and version.epoch is not None:
                values[version.epoch] = value
        if not values:
            raise NotFound(_why_nothing(name, versions, metric))
        found.append(Curve(name, dict(sorted(values.items()))))
    return found


def _why_nothing(name: str, versions: Sequence[Version], metric: str) -> str:
    whose, has = (name, "does not have") if ":" in name else (f"no version of {name}", "has")
    names = sorted({known for version in versions for known in version.metrics})
    meant = "" if metric == "loss" or metric in names else hint(metric, names)
    return f"{whose} {has} the metric {quoted(metric)} and an epoch{meant}"


def _versions(home: Home, given: str) -> tuple[str, Sequence[Version]]:
    """What a text names, and the versions that belong to it, the newest first."""
    if "/" in given:
        run = Runs(home.catalog, home.root)[given]
        return run.name, find_versions(home.catalog, "v.run = ?", [run.name])
    one = resolve(home.catalog, given)
    if given == one.model:
        return one.model, list_versions(home.catalog, one.model)[0]
    return one.name, [one]


def table(found: Sequence[Curve], at: Sequence[int] = ()) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: a row for each epoch, a column for each model."""
    epochs = list(at) or sorted({epoch for curve in found for epoch in curve.values})
    rows = [[str(epoch), *(_shown(curve.values.get(epoch)) for curve in found)] for epoch in epochs]
    return ["EPOCH", *(curve.name for curve in found)], rows


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def as_markdown(found: Sequence[Curve], metric: str, at: Sequence[int] = ()) -> str:
    head, rows = table(found, at)
    lines = [f"| {' | '.join(head).replace('EPOCH', 'epoch')} |", f"|{'---|' * len(head)}"]
    return "\n".join([f"**{metric}** by epoch", "", *lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


def as_html(found: Sequence[Curve], metric: str, at: Sequence[int] = ()) -> str:
    """One page with the curves as a picture and the table, which works without a network."""
    head, rows = table(found, at)
    cells = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    titles = "".join(f'<th scope="col">{html.escape(printable(text))}</th>' for text in head)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width,initial-scale=1"><title>' + html.escape(metric) + "</title><style>"
        ":root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:0 auto;padding:1rem}"
        "table{border-collapse:collapse}td,th{padding:.25rem .8rem;border-bottom:1px solid #8884;text-align:right}"
        "svg{max-width:100%;height:auto}svg text{fill:currentColor;font-size:13px}</style></head><body><main>"
        f"<h1>{html.escape(metric)} by epoch</h1>{_picture(found, metric)}"
        f"<table><thead><tr>{titles}</tr></thead><tbody>{cells}</tbody></table></main></body></html>\n"
    )


def _picture(found: Sequence[Curve], metric: str) -> str:
    width, height, left, bottom = 720, 320, 60, 40
    epochs = [epoch for curve in found for epoch in curve.values]
    values = [value for curve in found for value in curve.values.values() if value == value]
    first, last = min(epochs), max(epochs)
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high == low:
        low, high = low - 0.5, high + 0.5

    def place(epoch: int, value: float) -> tuple[float, float]:
        x = left + (width - left - 20) * ((epoch - first) / max(1, last - first))
        return x, (height - bottom) - (height - bottom - 20) * ((value - low) / (high - low))

    parts = []
    for i in range(5):
        value = low + (high - low) * i / 4
        _, y = place(first, value)
        parts.append(
            f'<line x1="{left}" x2="{width - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>'
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        )
    for epoch in sorted({first, (first + last) // 2, last}):
        x, _ = place(epoch, low)
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 20}" text-anchor="middle">{epoch}</text>')
    for i, curve in enumerate(found):
        colour = _COLOURS[i % len(_COLOURS)]
        spots = [place(epoch, value) for epoch, value in curve.values.items() if value == value]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in spots]
        y = height + 16 + 20 * i
        name = html.escape(printable(curve.name))
        parts.append(
            f'<rect x="{left}" y="{y - 10}" width="14" height="10" fill="{colour}"/><text x="{left + 20}" y="{y}">{name}</text>'
        )
    total = height + 20 + 20 * len(found)
    return (
        f'<svg role="img" aria-label="{html.escape(metric)} of each by epoch" viewBox="0 0 {width} {total}" '
        f'width="{width}" height="{total}">{"".join(parts)}</svg>'
    )
