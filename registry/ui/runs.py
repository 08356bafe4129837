"""The pages of runs: all of them, one with its log, and curves of several."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from registry.catalog.documents import run_document
from registry.catalog.runs import INNER, LOG, RunInfo
from registry.catalog.scalars import Point
from registry.catalog.versions import Version, find_versions, metric_names
from registry.configs.documents import flatten
from registry.log.metrics import with_metrics
from registry.registry import Registry
from registry.store import places
from registry.store.errors import Conflict, Invalid, NotFound, RegistryError
from registry.store.places import open_file
from registry.store.text import quoted
from registry.transfer import curves
from registry.ui.page import Args, Moved, Page, address, whole
from registry.ui.scalars import scalars_of, smoothed
from registry.ui.zooming import Stretch, stretch_of

_END_OF_LOG = 64 << 10
"""Bytes of a log that its page shows, from its end."""

_LAST_LINE = 4 << 10

MANY = 100
"""Runs of a page."""

_SMOOTHEST = 0.99
_MOST_POINTS = 800
_MOST_ROWS = 200
"""Rows of a table of values; more are in the CSV alone."""

_LEAD = re.compile(r"\[[^]]*\] - [A-Z]+: \[[^]]*\]\[\d+\] ")
"""What stands before the message in a line of a log: time, level, file and line."""


def tail(registry: Registry, info: RunInfo, count: int) -> tuple[list[str], bool]:
    """The last lines of a run's log within some bytes, and whether it has more; nothing if there is no log."""
    try:
        fd = open_file(registry.root / "runs" / info.name / LOG, os.O_RDONLY, inner=INNER)
    except (OSError, RegistryError):
        return [], False
    with os.fdopen(fd, "rb") as file:
        before = os.fstat(fd).st_size - count
        file.seek(max(0, before))
        lines = file.read(count).decode(errors="replace").splitlines()
    # The first one may have begun before.
    return (lines[1:], True) if before > 0 else (lines, False)


def last_line(registry: Registry, info: RunInfo) -> str:
    """What a run's log said last, without the time and the place in the code."""
    lines, _ = tail(registry, info, _LAST_LINE)
    return _LEAD.sub("", lines[-1], 1) if lines else ""


def seconds_of(info: RunInfo) -> float | None:
    """How long a run took; None while it goes on, or if its times are damaged."""
    try:
        return (
            datetime.fromisoformat(info.ended or "") - datetime.fromisoformat(info.started)
        ).total_seconds()
    except (TypeError, ValueError):
        return None


def runs(registry: Registry, args: Args) -> Page:
    """Runs, the newest first: those that began before one, if an address names it.

    Raises:
        NotFound: if there is no such run.
    """
    model, before = args.get("model") or None, args.get("before", "")
    found, has_more = registry.runs.part(model, before=before, limit=MANY)
    following = address("runs", model=model, before=found[-1].name) if has_more else None
    counts = registry.runs.counts()
    states = [registry.runs.shown_state(info) for info in found]
    documents = [
        run_document(info, state=state, versions=counts.get(info.name, 0))
        for info, state in zip(found, states, strict=True)
    ]
    return Page(
        template="runs.html",
        title=f"Runs of {model}" if model else "Runs",
        place="runs",
        document={"runs": documents, "next": following},
        rows=[{name: value for name, value in one.items() if name != "config"} for one in documents],
        command=f"registry runs {model}" if model else "registry runs",
        python="list(registry.runs)",
        context={
            "model": model,
            "following": following,
            "is_first": not before,
            "runs": [
                (info, state, counts.get(info.name, 0), seconds_of(info))
                for info, state in zip(found, states, strict=True)
            ],
        },
    )


def latest_run(registry: Registry, args: Args) -> Moved:
    """The address of the newest run."""
    found = registry.runs.find()
    return Moved(address("r", *found[0].name.split("/"))) if found else Moved(address("runs"))


def run(registry: Registry, args: Args, model: str, name: str) -> Page:
    """One run: what it saved, how it was set, its curves, and the end of its log."""
    info = registry.runs[f"{model}/{name}"]
    saved = find_versions(registry.catalog, "v.run = ?", [info.name], order="v.version")
    state = registry.runs.shown_state(info)
    lines, has_more = tail(registry, info, _END_OF_LOG)
    before = _before(registry, info)
    resumed = info.record.get("resumed")
    origin = find_versions(registry.catalog, "v.id = ?", [resumed]) if isinstance(resumed, str) else []
    measured, stretch = scalars_of(info), stretch_of(args)
    return Page(
        template="run.html",
        title=info.name,
        place="runs",
        document={
            **run_document(info, state=state, versions=len(saved)),
            "saved": [version.name for version in saved],
            "lines": lines,
        },
        rows=[
            with_metrics(
                {"version": version.name, "epoch": version.epoch, "loss": version.loss}, version.metrics
            )
            for version in saved
        ],
        command=f"registry logs {info.name}",
        python=f"registry.runs[{info.name!r}]",
        context={
            "run": info,
            "state": state,
            "took": seconds_of(info),
            "origin": origin[0] if origin else None,
            "saved": saved,
            "data": registry.artifacts.used_by(info.record),
            "metrics": sorted({metric for version in saved for metric in version.metrics}),
            "series": _cut(_by_step(measured) or _by_epoch(saved), stretch),
            "stretch": stretch,
            "by": "step" if measured else "epoch",
            "events": "" if measured else _events(info),
            "config": flatten(info.record.get("config") or {}),
            "before": before,
            "differs": _changed(before, info),
            "lines": lines,
            "has_more": has_more,
        },
    )


def with_events(page: Page, found: Mapping[str, Sequence[Sequence[float]]]) -> Page:
    """The page of a run with what its events say, where it has no file of scalars."""
    if page.context["by"] == "step" or not found:
        return page
    series = {tag: [(float(step), float(value)) for step, value in points] for tag, points in found.items()}
    drawn = {tag: points for tag, points in series.items() if len(points) > 1}
    if not drawn:
        return page
    shown = _cut(drawn, page.context["stretch"])
    return replace(page, context={**page.context, "series": shown, "by": "step"})


def _cut(
    series: Mapping[str, Sequence[tuple[float, float]]], stretch: Stretch
) -> dict[str, list[tuple[float, float]]]:
    """The part of some curves that is asked for; a curve that has nothing there is left out."""
    found = {tag: stretch.of(points) for tag, points in series.items()}
    return {tag: points for tag, points in found.items() if points}


def _events(info: RunInfo) -> str:
    """What tells the files of events of a run from others, or from what they were; empty if there are none."""
    if info.folder is None:
        return ""
    try:
        names = [name for name in places.names_in(info.folder, inner=INNER) if "tfevents" in name]
        found = [(name, places.status_of(info.folder / name, inner=INNER)) for name in names]
    except (OSError, RegistryError):
        return ""
    return " ".join(f"{name} {status.st_size}" for name, status in found if status is not None)


def _changed(before: RunInfo | None, info: RunInfo) -> dict[str, tuple[Any, Any]]:
    """The settings in which a run differs from the one before it."""
    if before is None:
        return {}
    old, new = flatten(before.record.get("config") or {}), flatten(info.record.get("config") or {})
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def _before(registry: Registry, info: RunInfo) -> RunInfo | None:
    """The run of the same model that began before one."""
    found = registry.runs.find(info.model)
    names = [one.name for one in found]
    return next(iter(found[names.index(info.name) + 1 :]), None)


def _by_step(measured: Mapping[str, Sequence[Point]]) -> dict[str, list[tuple[float, float]]]:
    """The curve of each tag by step, for tags of several points."""
    return {
        tag: [(float(point.step), point.value) for point in points]
        for tag, points in sorted(measured.items())
        if len(points) > 1
    }


def _by_epoch(saved: Sequence[Version]) -> dict[str, list[tuple[float, float]]]:
    """The curve of each metric, and of the loss, by epoch, or by version where no epoch was recorded."""
    found: dict[str, list[tuple[float, float]]] = {}
    for version in saved:
        place = float(version.epoch if version.epoch is not None else version.version)
        values: Mapping[str, Any] = with_metrics({"loss": version.loss}, version.metrics)
        for name, value in values.items():
            if value is not None:
                found.setdefault(name, []).append((place, value))
    return {name: sorted(points) for name, points in found.items() if len(points) > 1}


AXES = ("step", "epoch", "time")
"""What the horizontal axis of a comparison may be."""


def compare(registry: Registry, args: Args) -> Page:
    """A metric of several models, runs or versions by epoch, or what several runs measured by step or time."""
    names = list(dict.fromkeys(args.get("of", "").replace(",", " ").split()))
    try:
        return _compared(registry, args, names)
    except (Invalid, NotFound, Conflict) as error:
        if not names:
            raise
        return replace(_compared(registry, {**args, "metric": "", "x": ""}, []), problem=error)


def _compared(registry: Registry, args: Args, names: Sequence[str]) -> Page:
    metric = (
        args.get("metric")
        or registry.runs.headline(curves.models_of(registry, names) or set(registry.names()))
        or "loss"
    )
    infos = [registry.runs[name] for name in names if "/" in name]
    tags = sorted({tag for info in infos for tag in scalars_of(info)})
    axis = args["x"] if args.get("x") in AXES else "step" if metric in tags else "epoch"
    whole_curves = _curves(registry, names, metric, axis) if names else []
    share, stretch = min(_SMOOTHEST, whole(args, "smooth", 0, 100) / 100), stretch_of(args)
    found = [(name, stretch.of(points)) for name, points in whole_curves]
    # The average goes on from what stands before the part that is shown.
    shown = [(name, stretch.of(smoothed(points, share))) for name, points in whole_curves]
    if is_log := bool(args.get("log")):
        shown = [(name, [(x, math.log10(y)) for x, y in points if y > 0]) for name, points in shown]
    places = sorted({x for _, points in found for x, _ in points})
    by_place = {name: dict(points) for name, points in found}
    rows = [{axis: x, **{name: values.get(x) for name, values in by_place.items()}} for x in places]
    return Page(
        template="compare.html",
        title="Compare",
        place="compare",
        document={
            "metric": metric,
            "models": {name: {f"{x:g}": y for x, y in points} for name, points in found},
        },
        rows=rows,
        command=shlex.join(["registry", "compare", *names, "--metric", metric])
        if names and axis == "epoch"
        else "",
        context={
            "asked": args.get("of", ""),
            "metric": metric,
            "metrics": [*metric_names(registry.catalog), "loss", *tags],
            "curves": [(name, dict(_thin(points))) for name, points in shown],
            "rows": rows if len(rows) <= _MOST_ROWS else [],
            "axis": axis,
            "axes": AXES,
            "smooth": round(100 * share),
            "is_log": is_log,
            "differs": _differing(registry, [name for name, _ in found]),
            "choices": [*registry.names(), *list(registry.runs)[:50]],
        },
    )


def _curves(
    registry: Registry, names: Sequence[str], metric: str, axis: str
) -> list[tuple[str, list[tuple[float, float]]]]:
    """A curve for each name.

    Raises:
        NotFound: if there is nothing of a name, or it has no such metric.
        Invalid: if versions are to be compared by step or time.
    """
    if axis == "epoch":
        return [
            (curve.name, [(float(epoch), value) for epoch, value in curve.values.items()])
            for curve in curves.curves(registry, names, metric)
        ]
    found = []
    for name in names:
        if "/" not in name:
            raise Invalid(f"{name} is no run, so it has no curve by {axis}", "choose epoch")
        points = scalars_of(registry.runs[name]).get(metric, [])
        if not points:
            raise NotFound(f"{name} has measured no {quoted(metric)}")
        begun = points[0].time
        found.append(
            (
                name,
                [
                    (point.time - begun if axis == "time" else float(point.step), point.value)
                    for point in points
                ],
            )
        )
    return found


def _thin(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most as many points as a curve is wide."""
    return points[:: len(points) // _MOST_POINTS + 1]


def _differing(registry: Registry, names: Sequence[str]) -> dict[str, list[Any]]:
    """The settings in which some models, runs or versions differ, each with a value for each of them."""
    configs = []
    for name in names:
        record = registry.runs[name].record if "/" in name else registry.resolve(name).record
        configs.append(flatten(record.get("config") or {}))
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = {key: [config.get(key) for config in configs] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}
