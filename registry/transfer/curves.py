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


_MOST_RUNS = 8
"""Curves of a model that was trained several times."""


class Curve(NamedTuple):
    """The values of a metric of one model, run or version, by epoch."""

    name: str
    values: dict[int, float]


def curves(home: Home, names: Sequence[str], metric: str) -> list[Curve]:
    """A metric (or `loss`) of several models, runs or versions, by epoch.

    Args:
        names: a run's name, such as `lenet5/run-2`, stands for the versions that it saved, and any other reference for
            one version. A model's name stands for all its versions: in one curve, or in a curve for each of its newest
            runs where it has several that did not go on from one another. If an epoch has several versions, the newest
            counts.

    Raises:
        NotFound: if there is nothing of that name, or no version of it has the metric and an epoch.
    """
    found: dict[str, Curve] = {}
    for given in names:
        name, versions = _versions(home, given)
        parts = _by_training(home, name, versions) if name == given and "/" not in name else {name: versions}
        drawn = [curve for part, of in parts.items() if (curve := _curve(part, of, metric)).values]
        if not drawn:
            raise _nothing(name, versions, metric)
        found |= {curve.name: curve for curve in drawn[:_MOST_RUNS]}
    return [*found.values()]


def models_of(home: Home, names: Sequence[str]) -> set[str]:
    """The models that some names of models, runs and versions belong to."""
    runs = Runs(home.catalog, home.root)
    return {runs[name].model if "/" in name else resolve(home.catalog, name).model for name in names}


def _curve(name: str, versions: Sequence[Version], metric: str) -> Curve:
    """The values of some versions, of which the newest come first."""
    values: dict[int, float] = {}
    for version in versions[::-1]:
        value = version.value(metric)
        if value is not None and version.epoch is not None:
            values[version.epoch] = value
    return Curve(name, dict(sorted(values.items())))


def _by_training(home: Home, model: str, versions: Sequence[Version]) -> dict[str, list[Version]]:
    """The versions of a model, apart for trainings that did not go on from one another, by the name of the newest run."""
    runs = Runs(home.catalog, home.root)
    first: dict[str, str] = {}
    found: dict[str, tuple[str, list[Version]]] = {}
    for version in versions:
        run = str(version.record.get("run") or "")
        if run not in first:
            first[run] = runs.chain(run)[-1] if run else ""
        found.setdefault(first[run], (run, []))[1].append(version)
    if len(found) == 1:
        return {model: [*versions]}
    return {run or model: part for run, part in found.values()}


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
