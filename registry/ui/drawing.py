"""Drawing: pages as HTML, JSON and CSV."""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from registry.catalog.documents import finite
from registry.log.metrics import is_smallest_best
from registry.reports import charts
from registry.reports.blocks import Curves
from registry.reports.words import counted, number, shape, size, time_of
from registry.store.text import printable
from registry.ui.page import Page, address, address_of, address_of_name

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for the beginning of a formula."""


@functools.cache
def _templates() -> Environment:
    found = Environment(
        loader=PackageLoader("registry.ui"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
        auto_reload=False,
    )
    found.filters |= {
        "size": size,
        "number": number,
        "time": time_of,
        "second": _second,
        "shape": shape,
        "compact": lambda value: json.dumps(finite(value), default=str, separators=(",", ":")),
    }
    found.globals |= {
        "address": address,
        "address_of": address_of,
        "address_of_name": address_of_name,
        "counted": counted,
        "bar": _drawn(charts.bar),
        "spark": _drawn(charts.spark),
        "draw_chart": _drawn(charts.chart),
        "draw_curves": _drawn(lambda found, title: charts.curves(Curves(title, found), says_axis=True)),
        "colour": charts.colour_of,
        "tone_of": _tone_of,
        "isnan": lambda value: isinstance(value, float) and math.isnan(value),
        "isfinite": lambda value: isinstance(value, float | int) and math.isfinite(value),
    }
    return found


def _second(stamp: str) -> str:
    """A stored time without the parts of its second, such as `2026-11-29T14:05:01Z`."""
    return re.sub(r"\.\d+", "", stamp)


def _tone_of(metric: str, difference: float) -> str:
    """Whether a metric went the right way: `ok` or `bad`; `dim` where its name does not tell, or it stayed."""
    smallest = is_smallest_best(metric)
    if smallest is None or difference == 0:
        return "dim"
    return "ok" if (difference < 0) == smallest else "bad"


def _drawn(draw: Any) -> Any:
    """A function of `charts`, whose SVG a template does not escape."""
    return lambda *given, **named: Markup(draw(*given, **named))  # noqa: S704 - charts escape what they are given


def _shown(value: Any) -> Any:
    """What a template prints for a value: nothing for None, and no character that acts on the reader."""
    if value is None:
        return ""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def as_html(page: Page, **about: Any) -> str:
    """A page as HTML.

    Args:
        about: what the frame of all pages shows.
    """
    return _templates().get_template(page.template).render(page=page, **about, **page.context)


def as_json(document: Any) -> str:
    """A document as JSON. NaN and infinity become null, because JSON has neither."""
    return json.dumps(finite(document), indent=2) + "\n"


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV, with a column for each name that one of them has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_harmless(name) for name in names])
    writer.writerows([[_harmless(row.get(name)) for name in names] for row in rows])
    return text.getvalue()


def _harmless(value: Any) -> Any:
    """A cell that a spreadsheet shows and does not calculate."""
    if isinstance(value, list | tuple):
        value = " ".join(map(str, value))
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA) else printable(value)
    return value
