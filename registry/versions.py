"""Versions and models, as the catalog knows them: finding, listing, ranking."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from registry.catalog import parsed

if TYPE_CHECKING:
    from registry.catalog import Catalog

_BATCH = 500


class Version(NamedTuple):
    """A row of the catalog: one checkpoint, with what `list` and `show` need."""

    id: str
    model: str
    version: int
    created: str
    epoch: int | None
    step: int | None
    loss: float | None
    size: int
    tensors: int
    record: Mapping[str, Any]
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    metrics: Mapping[str, float] = MappingProxyType({})

    @property
    def name(self) -> str:
        return f"{self.model}:v{self.version}"


class Model(NamedTuple):
    """A model family and its latest version."""

    name: str
    versions: int
    latest: Version


def find_versions(
    catalog: Catalog,
    where: str,
    parameters: Sequence[Any] = (),
    *,
    order: str = "v.model, v.version DESC",
    limit: int | None = None,
) -> list[Version]:
    """Versions that fulfil an SQL condition over the table `v`; by model, the newest first, unless ordered."""
    rows = catalog.query(
        "SELECT v.id, v.model, v.version, v.created, v.epoch, v.step, v.loss, m.size, m.tensors, v.record "
        f"FROM versions v JOIN manifests m ON m.id = v.id WHERE {where} ORDER BY {order}"
        + ("" if limit is None else f" LIMIT {limit:d}"),
        parameters,
    )
    rows = [(*row[:9], parsed(row[9])) for row in rows]
    ids = [row[0] for row in rows]
    aliases = _attached(catalog, "SELECT id, name FROM aliases WHERE id IN ({}) ORDER BY name", ids)
    tags = _attached(catalog, "SELECT id, name FROM tags WHERE id IN ({}) ORDER BY name", ids)
    notes = _attached(catalog, "SELECT id, written, text FROM notes WHERE id IN ({}) ORDER BY written", ids)
    metrics = _attached(catalog, "SELECT id, name, value FROM metrics WHERE id IN ({}) ORDER BY name", ids)
    return [
        Version(
            *(id, model, version, created, epoch, step, _loss(loss, record), size, tensors, record),
            aliases=tuple(name for (name,) in aliases.get(id, ())),
            tags=tuple(name for (name,) in tags.get(id, ())),
            notes=tuple((written, text) for written, text in notes.get(id, ())),
            metrics={name: math.nan if value is None else value for name, value in metrics.get(id, ())},
        )
        for id, model, version, created, epoch, step, loss, size, tensors, record in rows
    ]


def _loss(value: float | None, record: Mapping[str, Any]) -> float | None:
    return math.nan if record.get("loss_is_nan") else value


def _attached(catalog: Catalog, sql: str, ids: Sequence[str]) -> dict[str, list[tuple[Any, ...]]]:
    found: dict[str, list[tuple[Any, ...]]] = {}
    for start in range(0, len(ids), _BATCH):
        part = ids[start : start + _BATCH]
        for id, *rest in catalog.query(sql.format(",".join("?" * len(part))), part):
            found.setdefault(id, []).append(tuple(rest))
    return found


def own_sizes(catalog: Catalog, model: str, since: int = 1) -> dict[str, int]:
    """Bytes of the packs that were written for each version of a model, by id; who shares all it has is left out.

    Args:
        since: the number of the first version that is asked for.
    """
    rows = catalog.query(
        "SELECT o.first, SUM(o.size) FROM (SELECT p.size AS size, (SELECT v.id FROM uses u JOIN versions v "
        "ON v.id = u.id WHERE u.pack = p.number ORDER BY v.created LIMIT 1) AS first FROM packs p "
        "WHERE p.number IN (SELECT u.pack FROM versions v JOIN uses u ON u.id = v.id "
        "WHERE v.model = ? AND v.version >= ?)) o JOIN versions w ON w.id = o.first "
        "WHERE w.model = ? AND w.version >= ? GROUP BY o.first",
        [model, since, model, since],
    )
    return dict(rows)


def name_of(catalog: Catalog, id: str) -> str | None:
    """The name of the version with an id."""
    rows = catalog.query("SELECT model, version FROM versions WHERE id = ?", [id])
    return f"{rows[0][0]}:v{rows[0][1]}" if rows else None


def list_models(catalog: Catalog) -> list[Model]:
    """Every model that has a version, by name."""
    rows = catalog.query("SELECT model, COUNT(*) FROM versions GROUP BY model ORDER BY model")
    newest = "SELECT model, MAX(version) FROM versions GROUP BY model"
    latest = find_versions(catalog, f"(v.model, v.version) IN ({newest})")
    by_model = {version.model: version for version in latest}
    return [Model(name, count, by_model[name]) for name, count in rows]


def list_versions(
    catalog: Catalog, model: str | None, *, tag: str | None = None, limit: int | None = None
) -> tuple[list[Version], int]:
    """The newest versions, of one model or of all, and how many there are without the limit."""
    where, parameters = _filter(model, tag)
    ((total,),) = catalog.query(f"SELECT COUNT(*) FROM versions v WHERE {where}", parameters)
    return find_versions(catalog, where, parameters, limit=limit), total


def rank_versions(
    catalog: Catalog,
    model: str | None,
    metric: str,
    *,
    smallest: bool = False,
    tag: str | None = None,
    limit: int | None = None,
) -> tuple[list[Version], int]:
    """The versions that have a metric (or the field `loss`), the best first, and how many there are.

    NaN is no value, so it never ranks; of equal ones the earlier comes first.
    """
    where, parameters = _filter(model, tag)
    direction = "ASC" if smallest else "DESC"
    if metric == "loss":
        where += " AND v.loss IS NOT NULL"
        order = f"v.loss {direction}"
    else:
        where += (
            " AND EXISTS (SELECT 1 FROM metrics h WHERE h.id = v.id AND h.name = ? AND h.value IS NOT NULL)"
        )
        parameters.append(metric)
        order = f"(SELECT value FROM metrics t WHERE t.id = v.id AND t.name = ?) {direction}"
    ((total,),) = catalog.query(f"SELECT COUNT(*) FROM versions v WHERE {where}", parameters)
    if metric != "loss":
        parameters.append(metric)
    found = find_versions(catalog, where, parameters, order=f"{order}, v.model, v.version", limit=limit)
    return found, total


def best_version(catalog: Catalog, model: str, metric: str, *, smallest: bool = False) -> Version | None:
    """The version with the best value of a metric (or `loss`), by an index.

    NaN never wins, and of two equal values the earlier does.
    """
    id = best_id(catalog.query, model, metric, smallest=smallest)
    return find_versions(catalog, "v.id = ?", [id])[0] if id else None


def best_id(
    query: Callable[[str, Sequence[Any]], Sequence[Sequence[Any]]],
    model: str,
    metric: str,
    *,
    smallest: bool,
) -> str | None:
    """The id of the version with the best value of a metric (or `loss`).

    Args:
        query: runs SQL and returns the rows.
    """
    direction = "ASC" if smallest else "DESC"
    if metric == "loss":
        rows = query(
            "SELECT id FROM versions WHERE model = ? AND loss IS NOT NULL "
            f"ORDER BY loss {direction}, version LIMIT 1",
            [model],
        )
    else:
        rows = query(
            "SELECT t.id FROM metrics t JOIN versions v ON v.id = t.id "
            "WHERE t.model = ? AND t.name = ? AND t.value IS NOT NULL "
            f"ORDER BY t.value {direction}, v.version LIMIT 1",
            [model, metric],
        )
    return rows[0][0] if rows else None


def list_names(catalog: Catalog, prefix: str) -> list[str]:
    """References that begin with a text, for a shell to complete."""
    mark = next((mark for mark in ":@" if mark in prefix), "")
    model = prefix.partition(mark)[0] if mark else prefix
    if mark == ":":
        rows = catalog.query("SELECT version FROM versions WHERE model = ? ORDER BY version DESC", [model])
        names = [f"{model}:v{version}" for (version,) in rows]
    elif mark:
        rows = catalog.query("SELECT name FROM aliases WHERE model = ? ORDER BY name", [model])
        names = [f"{model}@{name}" for (name,) in rows] + [f"{model}@latest"]
    else:
        names = [name for (name,) in catalog.query("SELECT DISTINCT model FROM versions ORDER BY model")]
    return [name for name in names if name.startswith(prefix)]


def list_aliases(catalog: Catalog) -> list[tuple[str, str, int, str]]:
    """Model, alias, version and id of every alias."""
    return [
        (model, name, version, id)
        for model, name, version, id in catalog.query(
            "SELECT a.model, a.name, v.version, v.id FROM aliases a JOIN versions v ON v.id = a.id "
            "ORDER BY a.model, a.name"
        )
    ]


def _filter(model: str | None, tag: str | None) -> tuple[str, list[Any]]:
    where, parameters = ["1 = 1"], []
    if model is not None:
        where.append("v.model = ?")
        parameters.append(model)
    if tag is not None:
        where.append("EXISTS (SELECT 1 FROM tags g WHERE g.id = v.id AND g.name = ?)")
        parameters.append(tag)
    return " AND ".join(where), parameters
