"""Versions and models, as the catalog knows them: finding, listing, ranking."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from registry.catalog.lookups import Reader, batches, best_id, marks, parsed
from registry.log.facts import check_shown, facts_of
from registry.log.metrics import bare, is_metric
from registry.log.reference import is_name
from registry.store.digest import is_digest
from registry.store.errors import Corrupt
from registry.store.manifest import Manifest


class Version(NamedTuple):
    """A row of the catalog: one checkpoint, with what `ls` and `show` need."""

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
    is_pending: bool = False
    """Whether it is one of the outbox: saved while a shared registry could not be reached."""

    @property
    def name(self) -> str:
        """Its name, such as `lenet5:v3`, or `lenet5:pending-3`."""
        return f"{self.model}:{'pending-' if self.is_pending else 'v'}{self.version}"

    def value(self, metric: str | None) -> float | None:
        """The value of a metric, or of `loss`; None if it has none. `metrics.loss` is a metric that is called so."""
        return self.loss if metric == "loss" else self.metrics.get(bare(metric or ""))


class Model(NamedTuple):
    """A model family: how many versions it has, its latest one, and the one that is known as the best."""

    name: str
    versions: int
    latest: Version
    best: Version | None = None
    """The version that the alias `best` points at; None if there is no such alias."""
    own: int = 0
    """Bytes of the packs that were written for its versions."""


class Condition(NamedTuple):
    """An SQL condition over the table `v`, the versions, and its parameters."""

    sql: str
    parameters: Sequence[Any] = ()

    def __and__(self, other: Condition) -> Condition:
        """The condition that both hold."""
        return Condition(f"({self.sql}) AND ({other.sql})", [*self.parameters, *other.parameters])


ANY = Condition("1 = 1")
"""The condition that every version fulfils."""


def find_versions(
    catalog: Reader,
    where: str,
    parameters: Sequence[Any] = (),
    *,
    order: str = "v.model, v.version DESC",
    limit: int | None = None,
) -> list[Version]:
    """Versions that fulfil an SQL condition over the table `v`; by model, the newest first, unless `order` is given."""
    rows = catalog.query(
        "SELECT v.id, v.model, v.version, v.created, v.epoch, v.step, v.loss, m.size, m.tensors, v.record "
        f"FROM versions v JOIN manifests m ON m.id = v.id WHERE {where} ORDER BY {order}"
        + ("" if limit is None else f" LIMIT {limit:d}"),
        parameters,
    )
    rows = [_checked(row) for row in rows]
    ids = [row[0] for row in rows]
    aliases = _attached(catalog, "SELECT id, name FROM aliases WHERE id IN ({}) ORDER BY name", ids)
    tags = _attached(catalog, "SELECT id, name FROM tags WHERE id IN ({}) ORDER BY name", ids)
    notes = _attached(
        catalog, "SELECT id, written, text FROM notes WHERE id IN ({}) ORDER BY written, rowid", ids
    )
    metrics = _attached(catalog, "SELECT id, name, value FROM metrics WHERE id IN ({}) ORDER BY name", ids)
    _check_attached(aliases, (str,), is_name)
    _check_attached(tags, (str,), is_name)
    _check_attached(notes, (str, str))
    _check_attached(metrics, (str, float | int | None), is_metric)
    return [
        Version(
            id=version_id,
            model=model,
            version=version,
            created=created,
            epoch=epoch,
            step=step,
            loss=_loss(loss, record),
            size=size,
            tensors=tensors,
            record=record,
            aliases=tuple(name for (name,) in aliases.get(version_id, ())),
            tags=tuple(name for (name,) in tags.get(version_id, ())),
            notes=tuple((written, text) for written, text in notes.get(version_id, ())),
            metrics={
                name: math.nan if value is None else value for name, value in metrics.get(version_id, ())
            },
        )
        for version_id, model, version, created, epoch, step, loss, size, tensors, record in rows
    ]


def version_of(manifest_id: str, model: str, number: int, manifest: Manifest) -> Version:
    """A version as the catalog will have it, where the catalog cannot show it yet."""
    facts = facts_of(manifest)
    sizes = {tensor.digest: tensor.size for tensor in manifest.tensors}
    return Version(
        id=manifest_id,
        model=model,
        version=number,
        created=facts.created,
        epoch=facts.epoch,
        step=facts.step,
        loss=_loss(facts.loss, facts.shown),
        size=sum(sizes.values()),
        tensors=len(manifest.tensors),
        record=facts.shown,
        metrics={name: math.nan if value is None else value for name, value in facts.metrics.items()},
    )


def own_sizes(catalog: Reader, model: str, since: int = 1) -> dict[str, int]:
    """Bytes of the packs that were written for each version of a model, by version id.

    A version that wrote no pack of its own is left out.

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


def own_by_model(catalog: Reader) -> dict[str, int]:
    """Bytes of the packs that were written for the versions of each model; see `own_sizes`."""
    # With MIN, SQLite takes the other columns from the row that has it.
    first = (
        "SELECT v.model AS model, p.size AS size, MIN(v.created) FROM uses u JOIN versions v ON v.id = u.id "
        "JOIN packs p ON p.number = u.pack GROUP BY u.pack"
    )
    return dict(catalog.query(f"SELECT model, SUM(size) FROM ({first}) GROUP BY model"))


def values_by_model(catalog: Reader, metric: str) -> dict[str, list[float]]:
    """The values of a metric (or `loss`) of each model's versions, in the order of their numbers; NaN is left out."""
    if metric == "loss":
        sql, given = "SELECT model, loss FROM versions WHERE loss IS NOT NULL ORDER BY model, version", []
    else:
        sql = (
            "SELECT v.model, m.value FROM metrics m JOIN versions v ON v.id = m.id "
            "WHERE m.name = ? AND m.value IS NOT NULL ORDER BY v.model, v.version"
        )
        given = [bare(metric)]
    found: dict[str, list[float]] = {}
    for model, value in catalog.query(sql, given):
        if isinstance(value, float):
            found.setdefault(model, []).append(value)
    return found


def metric_names(catalog: Reader, model: str | None = None) -> list[str]:
    """The metrics that versions of a model, or of all, have, by name."""
    where, given = (" WHERE model = ?", [model]) if model else ("", [])
    rows = catalog.query(f"SELECT DISTINCT name FROM metrics{where} ORDER BY name", given)
    return [str(name) for (name,) in rows]


def tag_names(catalog: Reader, model: str | None = None) -> list[str]:
    """The tags that versions of a model, or of all, have, by name."""
    # There are fewer tags than versions, so each of them is looked at.
    of_model = " CROSS JOIN versions v ON v.id = t.id WHERE v.model = ?"
    where, given = (of_model, [model]) if model else ("", [])
    rows = catalog.query(f"SELECT DISTINCT t.name FROM tags t{where} ORDER BY t.name", given)
    return [str(name) for (name,) in rows]


def commonest_metric(catalog: Reader, models: Collection[str]) -> str | None:
    """The metric that most of some models have; of several the first by name."""
    had = Counter(
        name
        for name, model in catalog.query("SELECT DISTINCT name, model FROM metrics ORDER BY name")
        if model in models
    )
    return next((name for name, _ in had.most_common(1)), None)


def values_by_id(catalog: Reader, metric: str) -> dict[str, float]:
    """The values of a metric (or `loss`) by version id; NaN is left out."""
    if metric == "loss":
        rows = catalog.query("SELECT id, loss FROM versions")
    else:
        rows = catalog.query("SELECT id, value FROM metrics WHERE name = ?", [bare(metric)])
    return {version_id: value for version_id, value in rows if isinstance(value, float)}


def by_id(catalog: Reader, version_id: str) -> Version | None:
    """The version with an id, if there is one."""
    found = find_versions(catalog, "v.id = ?", [version_id])
    return found[0] if found else None


COPIED = "copied from "
"""What the note of a version that was copied from another registry begins with."""

SAVED_HERE = f"v.id NOT IN (SELECT id FROM notes WHERE text LIKE '{COPIED}%')"
"""A condition: the version was not copied from another registry, whose runs may have the names of those here."""


def name_of(catalog: Reader, version_id: str) -> str | None:
    """The name of the version with an id."""
    rows = catalog.query("SELECT model, version FROM versions WHERE id = ?", [version_id])
    return f"{rows[0][0]}:v{rows[0][1]}" if rows else None


def list_models(catalog: Reader, own: Mapping[str, int] | None = None) -> list[Model]:
    """Every model that has a version, by name, with a fixed number of queries.

    Args:
        own: the own bytes of each model, where they are known.
    """
    rows = catalog.query("SELECT model, COUNT(*) FROM versions GROUP BY model ORDER BY model")
    newest = "SELECT model, MAX(version) FROM versions GROUP BY model"
    latest = find_versions(catalog, f"(v.model, v.version) IN ({newest})")
    by_model = {version.model: version for version in latest}
    if any(name not in by_model for name, _ in rows):
        raise Corrupt("the catalog contradicts itself about a model", "recreate it with: registry rebuild")
    best, own = _best_versions(catalog), own_by_model(catalog) if own is None else own
    return [
        Model(name, count, by_model[name], best=best.get(name), own=own.get(name, 0)) for name, count in rows
    ]


def _best_versions(catalog: Reader) -> dict[str, Version]:
    """The version that the alias `best` of each model points at."""
    found = find_versions(catalog, "v.id IN (SELECT id FROM aliases WHERE name = 'best')")
    return {version.model: version for version in found if "best" in version.aliases}


def list_versions(
    catalog: Reader,
    model: str | None,
    *,
    tag: str | None = None,
    also: Condition = ANY,
    limit: int | None = None,
) -> tuple[list[Version], int]:
    """The newest versions, of one model or of all, and how many there are without the limit.

    Args:
        also: what they must fulfil.
    """
    where, parameters = _filter(model, tag, also)
    ((total,),) = catalog.query(f"SELECT COUNT(*) FROM versions v WHERE {where}", parameters)
    return find_versions(catalog, where, parameters, limit=limit), total


def rank_versions(
    catalog: Reader,
    model: str | None,
    metric: str,
    *,
    smallest: bool = False,
    tag: str | None = None,
    also: Condition = ANY,
    limit: int | None = None,
) -> tuple[list[Version], int]:
    """The versions that have a metric (or the field `loss`), the best first, and how many there are.

    NaN is no value, so it never ranks; of equal ones the earlier comes first.

    Args:
        also: what they must fulfil.
    """
    where, parameters = _filter(model, tag, also)
    direction = "ASC" if smallest else "DESC"
    is_loss, metric = metric == "loss", bare(metric)
    if is_loss:
        where += " AND v.loss IS NOT NULL"
        order = f"v.loss {direction}"
    else:
        where += (
            " AND EXISTS (SELECT 1 FROM metrics h WHERE h.id = v.id AND h.name = ? AND h.value IS NOT NULL)"
        )
        parameters.append(metric)
        order = f"(SELECT value FROM metrics t WHERE t.id = v.id AND t.name = ?) {direction}"
    ((total,),) = catalog.query(f"SELECT COUNT(*) FROM versions v WHERE {where}", parameters)
    if not is_loss and model is not None and limit is not None:
        # By the index, instead of a value for each version of the model.
        rows = catalog.query(
            f"SELECT v.id FROM metrics t JOIN versions v ON v.id = t.id WHERE t.model = ? AND t.name = ? AND {where} "
            f"ORDER BY t.value {direction}, v.version LIMIT ?",
            [model, metric, *parameters, limit],
        )
        places = {str(version_id): place for place, (version_id,) in enumerate(rows)}
        best = [
            one
            for part in batches(places)
            for one in find_versions(catalog, f"v.id IN ({marks(part)})", part)
        ]
        return sorted(best, key=lambda one: places[one.id]), total
    if not is_loss:
        parameters.append(metric)
    found = find_versions(catalog, where, parameters, order=f"{order}, v.model, v.version", limit=limit)
    return found, total


def best_version(catalog: Reader, model: str, metric: str, *, smallest: bool = False) -> Version | None:
    """The version with the best value of a metric (or `loss`), by an index.

    NaN never wins, and of two equal values the earlier does.
    """
    best = best_id(catalog.query, model, metric, smallest=smallest)
    return find_versions(catalog, "v.id = ?", [best[0]])[0] if best else None


def with_descendants(catalog: Reader, ids: Sequence[str]) -> set[str]:
    """Those of the ids that other checkpoints were resumed or transferred from."""
    found: set[str] = set()
    for part in batches(ids):
        rows = catalog.query(f"SELECT DISTINCT parent FROM lineage WHERE parent IN ({marks(part)})", part)
        found.update(row[0] for row in rows)
    return found


def list_names(catalog: Reader, prefix: str) -> list[str]:
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


def list_aliases(catalog: Reader) -> list[tuple[str, str, int, str]]:
    """Model, alias, version and id of every alias."""
    return [
        (model, name, version, version_id)
        for model, name, version, version_id in catalog.query(
            "SELECT a.model, a.name, v.version, v.id FROM aliases a JOIN versions v ON v.id = a.id "
            "ORDER BY a.model, a.name"
        )
    ]


_TYPES: tuple[tuple[type, ...], ...] = (
    (str,),
    (str,),
    (int,),
    (str,),
    (int, type(None)),
    (int, type(None)),
    (float, type(None)),
    (int,),
    (int,),
)
"""The types of the columns that `find_versions` reads, but for the record."""


def _checked(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """A row of `find_versions`, its record parsed.

    Raises:
        Corrupt: if a value has another type than the table's.
    """
    if not all(map(isinstance, row, _TYPES)) or not is_digest(row[0]):
        raise Corrupt("the catalog holds a damaged row of a version", "recreate it with: registry rebuild")
    record = parsed(row[9])
    check_shown(record)
    record.setdefault("components", {})
    return (*row[:9], record)


def _loss(value: float | None, record: Mapping[str, Any]) -> float | None:
    """A loss; NaN where the record says so, as the column has None then."""
    return math.nan if record.get("loss_is_nan") else value


def _attached(catalog: Reader, sql: str, ids: Sequence[str]) -> dict[str, list[tuple[Any, ...]]]:
    found: dict[str, list[tuple[Any, ...]]] = {}
    for part in batches(ids):
        for version_id, *rest in catalog.query(sql.format(marks(part)), part):
            found.setdefault(version_id, []).append(tuple(rest))
    return found


def _check_attached(
    found: Mapping[str, list[tuple[Any, ...]]],
    types: tuple[Any, ...],
    is_right: Callable[[str], bool] = lambda _: True,
) -> None:
    """Check that rows are what the tables may hold.

    Args:
        is_right: what a text of the first column must be.

    Raises:
        Corrupt: if they are not.
    """
    for row in (row for rows in found.values() for row in rows):
        if not all(map(isinstance, row, types)) or not is_right(row[0]):
            raise Corrupt(
                "the catalog holds a damaged name, note or metric", "recreate it with: registry rebuild"
            )


UNHELD = Condition(
    "v.id NOT IN (SELECT id FROM aliases) AND v.id NOT IN (SELECT id FROM tags) "
    "AND v.version < (SELECT MAX(l.version) FROM versions l WHERE l.model = v.model) "
    "AND NOT EXISTS (SELECT 1 FROM lineage f WHERE f.parent = v.id)"
)
"""Nothing holds the version: it has no alias and no tag, is not the latest of its model, and no version was resumed,
transferred or made in another way from it. The next version of its own run does not hold it."""


def _filter(model: str | None, tag: str | None, also: Condition) -> tuple[str, list[Any]]:
    """An SQL condition over the table `v`, and its parameters."""
    where, parameters = [f"({also.sql})"], [*also.parameters]
    if model is not None:
        where.append("v.model = ?")
        parameters.append(model)
    if tag is not None:
        where.append("EXISTS (SELECT 1 FROM tags g WHERE g.id = v.id AND g.name = ?)")
        parameters.append(tag)
    return " AND ".join(where), parameters
