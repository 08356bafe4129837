"""The report: a page with tables and plots, and a JSON document with the same figures."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.measure import MARGIN, Curve, Result, Section, Table, spoken

_PLOT = "benchmarks-growth.svg"
_COLOURS = ("#1f5fbf", "#d9541e", "#2a9d5c", "#8a4fbf", "#c79a00", "#4a4a4a", "#c2447a", "#1899a8", "#8c6d46")


def machine() -> dict[str, str]:
    """The machine that the figures were measured on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = (
        "torch",
        "torchvision",
        "safetensors",
        "joblib",
        "numpy",
        "blake3",
        "xxhash",
        "zstandard",
        "pcodec",
    )
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {version(name).split('+')[0]}" for name in packages),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def line(result: Result) -> str:
    """The line of a terminal for a result."""
    goal = "" if result.goal is None else f"goal {_number(result.goal, result.unit)} {_verdict(result)}"
    return f"{result.what:60} {_number(result.value, result.unit):>8}  {_spread(result):15} {goal:18} {result.detail}"


def document(sections: Mapping[str, Section], command: str) -> dict[str, Any]:
    """All results as a document for `json.dumps`."""
    return {
        "command": command,
        "machine": machine(),
        "sections": {
            name: {
                "results": [
                    {**asdict(result), "holds": result.holds, "moves": result.moves}
                    for result in section.results
                ],
                "curves": [
                    {**asdict(curve), "fixed": curve.fixed, "each": curve.each, "power": curve.power}
                    for curve in section.curves
                ],
                "tables": [asdict(table) for table in section.tables],
                "notes": section.notes,
                "measured": section.measured,
            }
            for name, section in sections.items()
        },
    }


def section(document: Mapping[str, Any]) -> Section:
    """Read a section of what `document` gave."""
    return Section(
        results=[Result(**_fields(Result, one)) for one in document["results"]],
        curves=[Curve(**_fields(Curve, one)) for one in document["curves"]],
        tables=[Table(**_fields(Table, one)) for one in document["tables"]],
        notes=document["notes"],
        measured=document.get("measured", ""),
    )


def read(folder: Path) -> dict[str, Section]:
    """The sections that `write` wrote to a folder; none if it has not."""
    try:
        found = json.loads((folder / "benchmarks.json").read_text("utf-8"))
    except FileNotFoundError:
        return {}
    return {name: section(one) for name, one in found["sections"].items()}


def _fields(kind: type[Any], document: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: document[field.name] for field in fields(kind) if field.name in document}


def write(folder: Path, sections: Mapping[str, Section], titles: Mapping[str, str], command: str) -> Path:
    """Write `benchmarks.md`, `benchmarks.json` and the plot. Returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document(sections, command), indent=1, ensure_ascii=False)
    (folder / "benchmarks.json").write_text(text + "\n")
    curves = [curve for section in sections.values() for curve in section.curves]
    if curves:
        _plot(curves, folder / _PLOT)
    page = folder / "benchmarks.md"
    page.write_text(_page(sections, titles, command))
    return page


def _page(sections: Mapping[str, Section], titles: Mapping[str, str], command: str) -> str:
    about = machine()
    goals = [result for section in sections.values() for result in section.results if result.goal is not None]
    parts = [
        "# Benchmarks",
        f"`{command}` wrote this page. [benchmarks.json](benchmarks.json) has the same figures as JSON.",
        "The contenders take turns in one run, after a round to warm up. Another contender begins each round. A ratio "
        "is our time over the other's, so 0.5 is half the time. A table shows the median of the ratios of all rounds, "
        "and beside it the range of the middle half of the rounds. Every save ends with its bytes on the disk (fsync).",
        "Where it has a column of runs, the whole measurement was repeated, each time in a new process. The median is that of "
        f"their medians, and a figure moves if these differ by more than {MARGIN:.0%}.",
        "The host of a virtual machine takes back free memory, and gives it again slowly. What is compared with "
        "`torch.save` and `torch.load` therefore has its memory touched before its turn. Machines are shared and "
        "noisy, so compare within a table, not between machines.",
        markdown(Table("", ["", ""], [[name, value] for name, value in about.items()])),
        f"{sum(result.holds for result in goals)} of {len(goals)} goals hold.",
    ]
    for name, section in sections.items():
        measured = f", {section.measured}" if section.measured else ""
        parts.append(f"## {titles[name]}\n\n`python -m benchmarks {name}`{measured}")
        if section.results:
            parts.append(markdown(_results(section.results)))
        for table in section.tables:
            parts += [f"**{table.title[:1].upper()}{table.title[1:]}**", markdown(table)]
        if section.curves:
            parts += [f"![seconds as work grows]({_PLOT})", markdown(_fits(section.curves))]
        parts += [note[:1].upper() + note[1:] for note in section.notes]
    return "\n\n".join(parts) + "\n"


def _results(results: Sequence[Result]) -> Table:
    has_runs = any(result.runs for result in results)
    return Table(
        "",
        ["", "median", "middle half", *(["runs"] if has_runs else []), "goal", "", "in figures"],
        [
            [
                result.what,
                _number(result.value, result.unit),
                _spread(result),
                *([_runs(result)] if has_runs else []),
                "" if result.goal is None else _number(result.goal, result.unit),
                _verdict(result),
                result.detail,
            ]
            for result in results
        ],
    )


def _fits(curves: Sequence[Curve]) -> Table:
    rows = []
    for curve in curves:
        points = ", ".join(f"{size:,.0f}: {spoken(seconds)}" for size, seconds in curve.points)
        each = f"{spoken(curve.fixed)} + {_each(curve.each)} a {curve.unit.rstrip('s')}"
        rows.append([curve.what, curve.unit, points, each, f"{curve.power:.2f}"])
    return Table("", ["", "of", "medians", "fitted line", "power of the last step"], rows)


def _each(seconds: float) -> str:
    return (
        f"{seconds * 1e9:.0f} ns"
        if seconds < 1e-6
        else f"{seconds * 1e6:.1f} µs"
        if seconds < 1e-3
        else spoken(seconds)
    )


def put_between(page: Path, begin: str, end: str, new: str) -> None:
    """Put a text between two lines of a page, in the place of what is there.

    Args:
        begin, end: the lines, each with its line end.

    Raises:
        ValueError: if the page does not have them once.
    """
    pattern = re.compile(f"(?<={re.escape(begin)}).*?(?={re.escape(end)})", re.DOTALL)
    changed, count = pattern.subn(lambda _: new, page.read_text("utf-8"))
    if count != 1:
        raise ValueError(f"{page} must have one line {begin.strip()}, and {end.strip()} behind it")
    page.write_text(changed, "utf-8")


def markdown(table: Table) -> str:
    """A table as Markdown, without a line end behind the last row."""
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _number(value: float, unit: str) -> str:
    if unit == "x":
        return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"
    return spoken(value) if unit == "s" else f"{value:.2f} {unit}"


def _spread(result: Result) -> str:
    if result.low is None or result.high is None:
        return ""
    return f"{_number(result.low, result.unit)} to {_number(result.high, result.unit)}"


def _runs(result: Result) -> str:
    found = ", ".join(_number(value, result.unit) for value in result.runs)
    return f"{found}; it moves" if result.moves else found


def _verdict(result: Result) -> str:
    if result.goal is None:
        return ""
    held = sum(value <= result.goal for value in result.runs)
    if 0 < held < len(result.runs):
        return f"{'holds' if result.holds else 'missed'}, in {held} of {len(result.runs)} runs it holds"
    return "holds" if result.holds else "missed"


def _plot(curves: Sequence[Curve], path: Path) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    units = list(dict.fromkeys(curve.unit for curve in curves))
    names = list(dict.fromkeys(curve.what for curve in curves))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    with mpl.rc_context({"svg.hashsalt": "benchmarks", "font.size": 9}):
        figure = Figure(figsize=(4 * len(units), 3.9), layout="constrained")
        for axes, unit in zip(
            figure.subplots(1, len(units), sharey=True, squeeze=False)[0], units, strict=True
        ):
            for curve in curves:
                if curve.unit == unit:
                    sizes, seconds = zip(*curve.points, strict=True)
                    axes.plot(sizes, seconds, "o-", ms=3, lw=1.4, color=colours[curve.what], label=curve.what)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter(lambda size, _: f"{size:,.0f}")
            axes.yaxis.set_major_formatter(lambda seconds, _: spoken(seconds))
            axes.set_xlabel(unit)
            axes.grid(which="major", color="#e4e4e4", lw=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        shown = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
        figure.legend(
            shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown), frameon=False
        )
        figure.patch.set_facecolor("white")
        figure.savefig(path, metadata={"Date": None})
