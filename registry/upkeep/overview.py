"""An overview of a registry, for a notebook and as one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from registry.catalog.runs import Runs
from registry.catalog.versions import Model, commonest_metric, list_models, values_by_model
from registry.home import Home
from registry.reports.blocks import Column
from registry.reports.notebook import WHOLE, Cell, Part, heading, sentence, table
from registry.reports.text_charts import sparkline
from registry.reports.words import ago, counted, number, size
from registry.upkeep.status import status

_MOST = 20
"""Models that are shown."""

_COLUMNS = (
    Column("Model"),
    Column("Versions", is_number=True),
    Column("Best"),
    Column("Metric"),
    Column("Trend"),
    Column("Own size", is_number=True),
    Column("Updated", is_number=True),
)


def summary(home: Home) -> str:
    """What a registry holds, such as `9 models, 21 versions, 105 MB`."""
    ((models, versions),) = home.catalog.query("SELECT COUNT(DISTINCT model), COUNT(*) FROM versions")
    ((stored,),) = home.catalog.query("SELECT COALESCE(SUM(size), 0) FROM packs")
    return f"{counted(models, 'model')}, {counted(versions, 'version')}, {size(stored)}"


def nearby(place: str) -> str:
    """A folder relative to the working directory, if it lies below it; otherwise as it is, and so is a URL."""
    try:
        return str(Path(place).relative_to(Path.cwd()))
    except (OSError, ValueError):
        return place


def overview(home: Home) -> Iterator[Part]:
    """What a notebook shows of a registry: where it is, what it holds, and the models that were updated last."""
    yield heading(f"Registry {nearby(home.place)}", summary(home))
    found = status(home.root, home.catalog)
    if found.saved:
        yield sentence(f"{size(found.stored)} on disk for {size(found.logical)} of checkpoints")
    models = list_models(home.catalog)
    newest = sorted(models, key=lambda model: model.latest.created, reverse=True)[:_MOST]
    followed = Runs(home.catalog, home.root).monitors()
    metrics = {
        model.name: followed.get(model.name) or commonest_metric(home.catalog, {model.name})
        for model in newest
    }
    values = {metric: values_by_model(home.catalog, metric) for metric in set(metrics.values()) if metric}
    rows: list[list[Cell]] = []
    for model in newest:
        metric = metrics[model.name]
        trend = sparkline(values[metric].get(model.name, ())) if metric else ""
        rows.append(
            [
                model.name,
                f"{model.versions:,}",
                _best(model),
                _value(model, metric),
                trend,
                size(model.own),
                ago(model.latest.created),
            ]
        )
    yield table(_COLUMNS, rows, total=len(models), room=WHOLE)


def _best(model: Model) -> str:
    """The best version by its number, or the latest, with its other aliases."""
    version = model.best or model.latest
    others = [alias for alias in version.aliases if alias != "best"]
    return " ".join([version.name.partition(":")[2], *([] if model.best else ["(latest)"]), *others])


def _value(model: Model, metric: str | None) -> str:
    version = model.best or model.latest
    value = version.value(metric)
    return "" if value is None else f"{metric} {number(value)}"
