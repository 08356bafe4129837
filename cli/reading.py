"""What is there: ls, status."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from registry.catalog.conditions import matching
from registry.catalog.documents import model_document, version_document
from registry.catalog.resolving import no_such_metric
from registry.catalog.versions import (
    ANY,
    UNHELD,
    Model,
    Version,
    find_versions,
    list_models,
    list_versions,
    rank_versions,
    values_by_model,
)
from registry.cli.completing import completes, metrics, tags
from registry.cli.options import ReferenceType, command, direction
from registry.cli.output import (
    ago,
    counted,
    nothing,
    number,
    print_facts,
    print_json,
    size,
    time_of,
)
from registry.cli.tables import Column, Field, TableView, print_table
from registry.log.metrics import bare, called, is_smallest_best
from registry.reports.text_charts import sparkline
from registry.store.text import quoted

if TYPE_CHECKING:
    from registry.catalog.runs import RunInfo
    from registry.registry import Registry

_MANY = 4
"""The most metrics that get a column each in a table of versions."""

_ROWS = 20
"""Rows of a table of versions, unless another number is asked for."""

_OF_VERSION = ("EPOCH", "STEP", "LOSS", "TAGS", "ID")
"""The columns of a version that a table of models has as well."""


@command(
    "ls",
    "registry ls\nregistry ls lenet5 --sort accuracy --limit 5\nregistry ls --match 'accuracy>0.95'\n"
    "registry ls lenet5 --unheld -q | xargs registry rm --yes",
)
@click.argument("model", required=False, type=ReferenceType())
@click.option(
    "--sort",
    "metric",
    metavar="METRIC",
    shell_complete=completes(metrics),
    help="Order by a metric or the loss, the best first.",
)
@direction
@click.option("--tag", metavar="TAG", shell_complete=completes(tags), help="Only versions with this tag.")
@click.option(
    "--match",
    metavar="PATTERN",
    help="Only versions with this text in a name, tag, alias or note, or at the beginning of their id; "
    "or with a metric such as 'accuracy>0.95'.",
)
@click.option(
    "--unheld",
    is_flag=True,
    help="Only versions that nothing holds: no alias, no tag, not the latest of their model, and nothing came from them.",
)
@click.option(
    "--limit", type=click.IntRange(0), help="Number of rows; 0 shows all. [default: 20, and all with -q]"
)
def ls(
    model: str | None,
    metric: str | None,
    smallest: bool | None,
    tag: str | None,
    match: str | None,
    unheld: bool,
    limit: int | None,
    registry: Registry,
    view: TableView,
    as_json: bool,
) -> None:
    """List the models, or a model's versions.

    The newest versions come first. --sort puts the best first. If a metric's name does not say which value is better,
    --sort puts the largest first.
    """
    is_filtered = bool(tag or match or unheld)
    if model is None and not metric and not is_filtered:
        _list_models(registry, view, as_json)
        return
    if model is not None:
        model = registry.resolve(model).model
    if limit is None:
        # What is piped on is to be whole.
        limit = 0 if view.is_quiet else _ROWS
    also = UNHELD if unheld else ANY
    if match:
        also &= matching(registry.catalog, match, model)
    if metric:
        versions, total = rank_versions(
            registry.catalog,
            model,
            metric,
            smallest=bool(is_smallest_best(metric) if smallest is None else smallest),
            tag=tag,
            also=also,
            limit=limit or None,
        )
        if not total and not is_filtered:
            raise no_such_metric(registry.catalog, model, metric)
    else:
        versions, total = list_versions(registry.catalog, model, tag=tag, also=also, limit=limit or None)
    if as_json:
        print_json({"total": total, "versions": [version_document(version) for version in versions]})
        return
    if not versions:
        nothing(f"no version{f' of {model}' if model else ''} {_why_none(tag, match, unheld)}")
        return
    first = metric or (registry.runs.monitors().get(model) if model else None)
    fields = fields_of(versions, first, is_every_metric=bool(view.columns))
    print_table(fields, versions, view, below=left_out(versions, total))


def _why_none(tag: str | None, match: str | None, unheld: bool) -> str:
    """What no version is or has."""
    whys = [
        *([f"has the tag {quoted(tag)}"] if tag else []),
        *([f"matches {quoted(match)}"] if match else []),
        *(["is unheld"] if unheld else []),
    ]
    return " and ".join(whys)


def left_out(versions: Sequence[Version], total: int) -> list[str]:
    """The line that says what the option `--limit` left out."""
    shown = counted(len(versions), "version")
    return [f"{shown} of {total:,}; --limit 0 shows all"] if total > len(versions) else []


def fields_of(
    versions: Sequence[Version], first: str | None, *, is_every_metric: bool = False
) -> list[Field[Version]]:
    """The columns of a table of versions. Up to `_MANY` metrics get a column each.

    Args:
        first: the metric, or `loss`, that matters most and so comes right after the name.
        is_every_metric: give each a column however many there are, as the user says which columns to show.
    """
    names = list(dict.fromkeys(name for version in versions for name in version.metrics))
    if all(version.metrics.get("loss") in (None, version.loss) for version in versions):
        # A run takes its loss from a metric that is called so.
        names = [name for name in names if name != "loss"]
    leading = [name for name in names if first not in (None, "loss") and name == bare(first or "")]
    others = [name for name in names if name not in leading]
    each = others if is_every_metric or len(names) <= _MANY else []
    rest = others if len(names) > _MANY else []
    return [
        (Column("NAME", is_text=True), lambda one: one.name),
        *[_measured(name, names, 1) for name in leading],
        (Column("EPOCH", 3), lambda one: one.epoch),
        (Column("STEP", 7), lambda one: one.step),
        (Column("LOSS", 1 if first == "loss" else 3), lambda one: one.loss),
        *[_measured(name, names, 4) for name in each],
        (Column("METRICS", 6, is_text=True), lambda one: _others(one, rest)),
        (Column("ALIASES", 1, is_text=True), lambda one: one.aliases),
        (Column("TAGS", 2, is_text=True), lambda one: one.tags),
        (Column("SIZE", 5), lambda one: size(one.size)),
        (Column("CREATED", 5), lambda one: time_of(one.created)),
        (Column("ID", 8), lambda one: one.id[:12]),
    ]


def heading_of(metric: str, names: Sequence[str] = ()) -> str:
    """The heading of a column of a metric, which no field has and no other metric.

    Args:
        names: all metrics of the table.
    """
    is_alone = sum(name.lower() == metric.lower() for name in names) <= 1
    return called(metric).upper() if is_alone else called(metric)


def _measured(metric: str, names: Sequence[str], rank: int) -> Field[Version]:
    return Column(heading_of(metric, names), rank), lambda one: one.metrics.get(metric)


def _others(version: Version, names: Sequence[str]) -> list[str]:
    return [f"{name}={number(version.metrics[name])}" for name in names if name in version.metrics]


def _list_models(registry: Registry, view: TableView, as_json: bool) -> None:
    models = list_models(registry.catalog)
    if as_json:
        print_json({"models": [model_document(model) for model in models]})
        return
    if not models:
        nothing("no models yet; store one with: registry import FILE --name MODEL")
        return
    rows = [(model, model.best or model.latest) for model in models]
    metric = registry.runs.headline({model.name for model in models})
    trends = values_by_model(registry.catalog, metric) if metric else {}
    heading = "LOSS" if metric == "loss" else heading_of(metric or "-")
    running = {info.model for info in registry.runs.open() if not registry.runs.is_lost(info)}
    fields: list[Field[tuple[Model, Version]]] = [
        (Column("MODEL", is_text=True), lambda row: row[0].name),
        (Column("", is_text=True), lambda row: "●" if row[0].name in running else ""),
        (Column("VERSIONS", 2), lambda row: row[0].versions),
        (Column("BEST", 1, is_text=True), lambda row: _called(row[1], is_best=row[0].best is not None)),
        (Column(heading, 1), lambda row: row[1].value(metric) if metric else None),
        (Column("TREND", 3, is_text=True), lambda row: sparkline(trends.get(row[0].name, ()))),
        (Column("OWN", 3), lambda row: size(row[0].own)),
        (Column("UPDATED", 3), lambda row: ago(row[0].latest.created)),
        *[
            (column._replace(rank=column.rank + 4), lambda row, value=value: value(row[1]))
            for column, value in fields_of([], None)
            if column.heading in _OF_VERSION and column.heading != heading
        ],
    ]
    print_table(fields, rows, view, below=["● training now"] if running else [])


def _called(version: Version, *, is_best: bool) -> str:
    """A version by its number, with its other names: `v6 production`, or `v2 (latest)` where no version is the best."""
    others = [alias for alias in version.aliases if alias != "best"]
    return " ".join([version.name.partition(":")[2], *([] if is_best else ["(latest)"]), *others])


def _nearby(path: str) -> str:
    """A path relative to the working directory, if it lies below it; otherwise the path itself."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except (OSError, ValueError):
        return path


@command("status", "registry status")
def status(registry: Registry, as_json: bool) -> None:
    """Show storage use and what sharing saves."""
    found = registry.status()
    open_runs = [info for info in registry.runs.find() if info.state == "running"]
    lost = [info for info in open_runs if registry.runs.is_lost(info)]
    running = [info for info in open_runs if info not in lost]
    if as_json:
        runs = {"running": [info.name for info in running], "lost": [info.name for info in lost]}
        print_json({**found._asdict(), "saved": found.saved, "runs": runs})
        return
    ways = (
        "shared or stored as differences"
        if found.differences
        else "shared or coded"
        if found.alone
        else "shared"
    )
    shared = f" ({found.saved / found.logical:.0%} {ways})" if found.logical else ""
    print_facts(
        [
            ("registry", _nearby(registry.place)),
            ("holds", f"{counted(found.models, 'model')}, {counted(found.versions, 'version')}"),
            ("tensors", f"{found.tensors:,} distinct, in {counted(found.packs, 'pack')}{found.coded}"),
            ("artifacts", found.artifacts or None),
            ("size", f"{size(found.stored)} on disk for {size(found.logical)} of checkpoints{shared}"),
            ("unneeded", f"{size(found.unused)}; free it with: registry gc" if found.unused else None),
            ("free space", size(found.free)),
            *_some("running", [_running_text(info) for info in running]),
            *_some("lost", [_lost_text(registry, info) for info in lost[:_MOST_RUNS]], len(lost)),
        ]
    )


_MOST_RUNS = 3
"""Lost runs that are named."""


def _some(label: str, shown: Sequence[str], count: int | None = None) -> list[tuple[str, str]]:
    """A fact for each of some runs, and one for how many more there are.

    Args:
        count: how many there are in all.
    """
    more = (count or len(shown)) - len(shown)
    rest = [f"and {more:,} more; see registry runs"] if more > 0 else []
    return [(label if i == 0 else "", text) for i, text in enumerate([*shown, *rest])]


def _running_text(info: RunInfo) -> str:
    return f"{info.name}, started {ago(info.started)}; registry logs {info.name} -f"


def _lost_text(registry: Registry, info: RunInfo) -> str:
    """What to do about a run whose process is gone."""
    saved = find_versions(registry.catalog, "v.run = ?", [info.name], order="v.version DESC", limit=1)
    if not saved:
        return f"{info.name}, its process is gone, and it saved nothing; see registry logs {info.name}"
    return f"{info.name}, its process is gone; go on from {saved[0].name}, or see registry logs {info.name}"
