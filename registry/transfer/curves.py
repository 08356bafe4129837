"""Comparing variants of a training: one metric of several models, epoch by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from registry.catalog.resolving import hint, resolve
from registry.catalog.runs import Runs
from registry.catalog.versions import Version, find_versions, list_versions
from registry.reports.blocks import Block, Column, Curves, Table, Title
from registry.store.errors import NotFound
from registry.store.text import quoted

if TYPE_CHECKING:
    from registry.home import Home


class Curve(NamedTuple):
    """The values of a metric of one model, run or version, by epoch."""

    name: str
    values: dict[int, float]


def curves(home: Home, names: Sequence[str], metric: str) -> list[Curve]:
    """A metric (or `loss`) of several models, runs or versions, by epoch.

    Args:
        names: a model's name stands for all its versions, a run's, such as `lenet5/run-2`, for those that it saved, and
            any other reference for one version. If an epoch has several versions, the newest counts.

    Raises:
        NotFound: if there is nothing of that name, or no version of it has the metric and an epoch.
    """
    found = []
    for given in names:
        name, versions = _versions(home, given)
        values: dict[int, float] = {}
        for version in versions[::-1]:
            value = version.value(metric)
            if value is not None and version.epoch is not None:
                values[version.epoch] = value
        if not values:
            raise _nothing(name, versions, metric)
        found.append(Curve(name, dict(sorted(values.items()))))
    return found


def table(found: Sequence[Curve], at: Sequence[int] = ()) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: a row for each epoch, a column for each model."""
    epochs = list(at) or sorted({epoch for curve in found for epoch in curve.values})
    rows = [[str(epoch), *(_shown(curve.values.get(epoch)) for curve in found)] for epoch in epochs]
    return ["EPOCH", *(curve.name for curve in found)], rows


def blocks(found: Sequence[Curve], metric: str, at: Sequence[int] = ()) -> list[Block]:
    """The curves for a renderer: as a picture, and as a table of the epochs asked for, or of all."""
    head, rows = table(found, at)
    columns = [
        Column("epoch", is_number=True),
        *(Column(name, is_number=True, is_given=True) for name in head[1:]),
    ]
    return [
        Title(f"{metric} by epoch"),
        Curves(metric, found, where="pages"),
        Table("", columns, rows),
    ]


def _nothing(name: str, versions: Sequence[Version], metric: str) -> NotFound:
    """The error about a name without a value to show."""
    whose, has = (name, "does not have") if ":" in name else (f"no version of {name}", "has")
    names = sorted({known for version in versions for known in version.metrics})
    meant = "" if metric == "loss" or metric in names else hint(metric, names)
    return NotFound(f"{whose} {has} the metric {quoted(metric)} and an epoch", meant)


def _versions(home: Home, given: str) -> tuple[str, Sequence[Version]]:
    """What a text names, and the versions that belong to it, the newest first."""
    if "/" in given:
        run = Runs(home.catalog, home.root)[given]
        return run.name, find_versions(home.catalog, "v.run = ?", [run.name])
    one = resolve(home.catalog, given)
    if given == one.model:
        return one.model, list_versions(home.catalog, one.model)[0]
    return one.name, [one]


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
