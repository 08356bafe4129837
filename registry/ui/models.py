"""The pages of models: all of them, and the versions of one."""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from registry.catalog.conditions import parse_condition
from registry.catalog.documents import model_document, version_document
from registry.catalog.resolving import no_such_metric, resolve
from registry.catalog.versions import (
    ANY,
    Condition,
    Model,
    Version,
    best_version,
    list_models,
    list_versions,
    metric_names,
    rank_versions,
    tag_names,
)
from registry.log.metrics import called, is_smallest_best, with_metrics
from registry.registry import Registry
from registry.reports.charts import Mark
from registry.store.errors import Invalid, NotFound, RegistryError
from registry.ui.kept import logical_of, once, owned, points_of
from registry.ui.page import Args, Page, address, whole
from registry.ui.runs import last_line
from registry.ui.version import networks_of
from registry.ui.zooming import NAMES, Stretch, stretch_of

MANY = 100
"""Versions of a page."""

_MOST_POINTS = 250
"""Points of a curve whose values a page knows."""

_COLUMNS = 4
"""The most metrics that have a column each."""


class ModelRow(NamedTuple):
    """A model, as the page of all models shows it."""

    name: str
    versions: int
    best: Version
    is_best: bool
    value: float | None
    values: Sequence[float]
    own: int
    updated: str
    is_trained: bool


def models(registry: Registry, args: Args) -> Page:
    """All models, with what is being trained now on top."""
    found = once(registry, "models", lambda: list_models(registry.catalog, owned(registry).by_model))
    asked = args.get("metric", "")
    if asked not in ("", "loss", *metric_names(registry.catalog)):
        raise no_such_metric(registry.catalog, None, asked)
    metric = asked or registry.runs.headline({model.name for model in found})
    running = [info for info in registry.runs.open() if not registry.runs.is_lost(info)]
    rows = _rows(registry, found, metric, {info.model for info in running})
    counts = registry.runs.counts()
    return Page(
        template="models.html",
        title="Models",
        place="models",
        document={"models": [model_document(one) for one in found]},
        rows=[
            {
                "model": row.name,
                "versions": row.versions,
                "best": row.best.name,
                called(metric or "metric"): row.value,
                "own_bytes": row.own,
                "updated": row.updated,
            }
            for row in rows
        ],
        command="registry ls",
        python="registry.models()",
        context={
            "models": rows,
            "metric": metric,
            "running": [(info, counts.get(info.name, 0), last_line(registry, info)) for info in running],
        },
    )


def _rows(
    registry: Registry, found: Sequence[Model], metric: str | None, trained: Collection[str]
) -> list[ModelRow]:
    rows = []
    for model in found:
        best = model.best or model.latest
        rows.append(
            ModelRow(
                name=model.name,
                versions=model.versions,
                best=best,
                is_best=model.best is not None,
                value=best.value(metric),
                values=[value for _, value in points_of(registry, model.name, metric)] if metric else (),
                own=model.own,
                updated=model.latest.created,
                is_trained=model.name in trained,
            )
        )
    return rows


class Part(NamedTuple):
    """The versions of a model that a page shows.

    Attributes:
        total: how many are asked for in all.
        following: the address of those that come next; None if these are the last.
        is_first: whether none come before them.
    """

    versions: Sequence[Version]
    total: int
    following: str | None
    is_first: bool


def versions(registry: Registry, args: Args, model: str) -> Page:
    """The versions of a model: the newest first, or the best.

    Raises:
        NotFound: if there is no such model, or no version of it has the metric.
        Invalid: if the place to begin at is none.
    """
    newest = resolve(registry.catalog, model)
    names = metric_names(registry.catalog, model)
    sort, tag = args.get("sort", ""), args.get("tag") or None
    for name in (sort, args.get("metric", "")):
        if name not in ("", "loss", *names):
            raise no_such_metric(registry.catalog, model, name)
    metric = _metric_of(registry, args, model, names)
    of = _ranked if sort else _newest
    problem: RegistryError | None = None
    try:
        part = of(registry, args, model)
    except (Invalid, NotFound) as error:
        if not args.get("where"):
            raise
        part, problem = of(registry, {**args, "where": ""}, model), error
    ((total,),) = registry.catalog.query("SELECT COUNT(*) FROM versions WHERE model = ?", [model])
    options = {"--sort": sort, "--tag": tag, "--match": args.get("where")}
    words = [part for name, text in options.items() if text for part in (name, text)]
    asked = {"by": sort, "tag": tag, "where": args.get("where")}
    given = [repr(model), *(f"{name}={value!r}" for name, value in asked.items() if value)]
    return Page(
        template="versions.html",
        title=model,
        place="models",
        document={
            "total": part.total,
            "versions": [version_document(version) for version in part.versions],
            "next": part.following,
        },
        rows=[row_of(version) for version in part.versions],
        command=shlex.join(["registry", "ls", model, *words, "--limit", str(MANY)]),
        python=f"registry.versions({', '.join(given)}, limit={MANY})",
        context={
            "model": model,
            "newest": newest,
            "networks": once(registry, ("networks", newest.id), lambda: networks_of(registry, newest)),
            "versions": part.versions,
            "following": part.following,
            "is_first": part.is_first,
            "total": total,
            "own": owned(registry).by_model.get(model, 0),
            "logical": logical_of(registry, model),
            "metric": metric,
            "metrics": [*names, "loss"],
            "columns": [name for name in names if name != metric][: _COLUMNS - 1],
            "best": _best(registry, model, metric),
            "span": _span(part.versions, metric),
            "chart": _chart(registry, model, metric, stretch_of(args)),
            "kept": {name: args.get(name) for name in ("tag", "where", *NAMES)},
            "sort": sort,
            "tag": tag,
            "where": args.get("where", ""),
            "tags": tag_names(registry.catalog, model),
        },
        problem=problem,
    )


def _best(registry: Registry, model: str, metric: str | None) -> Version | None:
    if metric is None:
        return None
    return best_version(registry.catalog, model, metric, smallest=bool(is_smallest_best(metric)))


def _ranked(registry: Registry, args: Args, model: str) -> Part:
    """The best versions of a model, beyond as many as an address says."""
    sort, skip = args["sort"], whole(args, "skip", 0, 10**6)
    found, total = rank_versions(
        registry.catalog,
        model,
        sort,
        smallest=bool(is_smallest_best(sort)),
        tag=args.get("tag") or None,
        also=_condition(registry, args, model),
        limit=skip + MANY,
    )
    following = address("m", model, sort=sort, **_kept(args), skip=skip + MANY)
    return Part(found[skip:], total, following if total > skip + MANY else None, not skip)


def _newest(registry: Registry, args: Args, model: str) -> Part:
    """The newest versions of a model, below a number if an address says one."""
    before = whole({"before": args.get("before", "").removeprefix("v")}, "before", 0, 10**9)
    also = _condition(registry, args, model)
    if before:
        also &= Condition("v.version < ?", [before])
    found, total = list_versions(registry.catalog, model, tag=args.get("tag") or None, also=also, limit=MANY)
    last = f"v{found[-1].version}" if found else None
    following = address("m", model, **_kept(args), before=last)
    return Part(found, total, following if total > MANY else None, not before)


def _condition(registry: Registry, args: Args, model: str) -> Condition:
    text = args.get("where", "").strip()
    return parse_condition(registry.catalog, text, model) if text else ANY


def _kept(args: Args) -> dict[str, str | None]:
    """What stays as it is in the address of the next part."""
    return {name: args.get(name) for name in ("tag", "metric", "where", *NAMES)}


def row_of(version: Version) -> dict[str, Any]:
    """A version as a row of a spreadsheet."""
    return {
        "name": version.name,
        "epoch": version.epoch,
        "step": version.step,
        "loss": version.loss,
        **with_metrics({}, version.metrics),
        "aliases": version.aliases,
        "tags": version.tags,
        "size": version.size,
        "run": version.record.get("run"),
        "created": version.created,
        "id": version.id,
    }


def _metric_of(registry: Registry, args: Args, model: str, names: Sequence[str]) -> str | None:
    """The metric that a page of versions draws: the one that was asked for, or the one that `best` follows."""
    asked = args.get("metric") or args.get("sort")
    if asked:
        return asked
    followed = registry.runs.monitors().get(model)
    if followed:
        return followed
    has_loss = registry.catalog.query(
        "SELECT 1 FROM versions WHERE model = ? AND loss IS NOT NULL LIMIT 1", [model]
    )
    return names[0] if names else "loss" if has_loss else None


def _span(shown: Sequence[Version], metric: str | None) -> tuple[float, float] | None:
    """The smallest and the largest value of a metric, between which bars are drawn."""
    values = [value for version in shown if (value := version.value(metric)) is not None]
    finite = [value for value in values if math.isfinite(value)]
    return (min(finite), max(finite)) if finite else None


def _chart(registry: Registry, model: str, metric: str | None, stretch: Stretch) -> Mapping[str, Any] | None:
    """The points of a metric by version, and the aliases as marks; None if there is no curve."""
    if metric is None:
        return None
    whole = [(float(x), y) for x, y in points_of(registry, model, metric) if math.isfinite(y)]
    if len(whole) < 2:
        return None
    points = stretch.of(whole)
    marks = registry.catalog.query(
        "SELECT v.version, a.name FROM aliases a JOIN versions v ON v.id = a.id WHERE a.model = ? ORDER BY v.version",
        [model],
    )
    return {
        "points": points,
        "shown": [(int(x), float(f"{y:.4g}")) for x, y in points[:: -(-len(points) // _MOST_POINTS) or 1]],
        "marks": [Mark(float(version), f"v{version} {name}") for version, name in marks],
        "low": min((y for _, y in points), default=0.0),
        "high": max((y for _, y in points), default=0.0),
    }
