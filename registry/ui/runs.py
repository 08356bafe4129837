"""The pages of runs: all of them, one with its log, and curves of several."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from registry.catalog.documents import run_document
from registry.catalog.runs import INNER, LOG, RunInfo
from registry.catalog.versions import Version, find_versions, metric_names
from registry.configs.documents import flatten
from registry.registry import Registry
from registry.store.errors import RegistryError
from registry.store.places import open_file
from registry.transfer import curves
from registry.ui.page import Args, Moved, Page, address

_END_OF_LOG = 64 << 10
"""Bytes of a log that its page shows, from its end."""

_LAST_LINE = 4 << 10

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
    """All runs, the newest first."""
    model = args.get("model") or None
    found = registry.runs.find(model)
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
        document={"runs": documents},
        rows=[{name: value for name, value in one.items() if name != "config"} for one in documents],
        command=f"registry runs {model}" if model else "registry runs",
        python="list(registry.runs)",
        context={
            "model": model,
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
    """One run: what it saved, how it was set, and the end of its log."""
    info = registry.runs[f"{model}/{name}"]
    saved = find_versions(registry.catalog, "v.run = ?", [info.name], order="v.version")
    state = registry.runs.shown_state(info)
    lines, has_more = tail(registry, info, _END_OF_LOG)
    config = flatten(info.record.get("config") or {})
    before = _before(registry, info)
    others = flatten(before.record.get("config") or {}) if before else {}
    resumed = info.record.get("resumed")
    origin = find_versions(registry.catalog, "v.id = ?", [resumed]) if isinstance(resumed, str) else []
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
            {"version": version.name, "epoch": version.epoch, "loss": version.loss, **version.metrics}
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
            "metrics": sorted({metric for version in saved for metric in version.metrics}),
            "series": _series(saved),
            "config": config,
            "before": before,
            "differs": {
                key: (others.get(key), config.get(key))
                for key in {**others, **config}
                if others.get(key) != config.get(key)
            }
            if before
            else {},
            "lines": lines,
            "has_more": has_more,
        },
    )


def _before(registry: Registry, info: RunInfo) -> RunInfo | None:
    """The run of the same model that began before one."""
    found = registry.runs.find(info.model)
    names = [one.name for one in found]
    return next(iter(found[names.index(info.name) + 1 :]), None)


def _series(saved: Sequence[Version]) -> dict[str, list[tuple[float, float]]]:
    """The curve of each metric, and of the loss, by epoch, or by version where no epoch was recorded."""
    found: dict[str, list[tuple[float, float]]] = {}
    for version in saved:
        place = float(version.epoch if version.epoch is not None else version.version)
        values: Mapping[str, Any] = {"loss": version.loss, **version.metrics}
        for name, value in values.items():
            if value is not None:
                found.setdefault(name, []).append((place, value))
    return {name: sorted(points) for name, points in found.items() if len(points) > 1}


def compare(registry: Registry, args: Args) -> Page:
    """A metric of several models, runs or versions, by epoch."""
    names = [name for name in args.get("of", "").replace(",", " ").split() if name]
    known = metric_names(registry.catalog)
    metric = args.get("metric") or registry.runs.headline(set(registry.names())) or "loss"
    found = curves.curves(registry, names, metric) if names else []
    differs = _differing(registry, names)
    epochs = sorted({epoch for curve in found for epoch in curve.values})
    return Page(
        template="compare.html",
        title="Compare",
        place="compare",
        document={"metric": metric, "models": {curve.name: curve.values for curve in found}},
        rows=[
            {"epoch": epoch, **{curve.name: curve.values.get(epoch) for curve in found}} for epoch in epochs
        ],
        command=f"registry compare {' '.join(names)} --metric {metric}" if names else "",
        context={
            "names": names,
            "metric": metric,
            "metrics": [*known, "loss"],
            "curves": found,
            "epochs": epochs,
            "differs": differs,
            "choices": [*registry.names(), *list(registry.runs)[:50]],
        },
    )


def _differing(registry: Registry, names: Sequence[str]) -> dict[str, list[Any]]:
    """The settings in which some models, runs or versions differ, each with a value for each of them."""
    configs = []
    for name in names:
        record = registry.runs[name].record if "/" in name else registry.resolve(name).record
        configs.append(flatten(record.get("config") or {}))
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = {key: [config.get(key) for config in configs] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}
