"""The pages of what lies on the disk: who holds the bytes, what may go, and cached data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from registry.cache.artifacts import Artifact
from registry.registry import Registry
from registry.reports.charts import Area, colour_of, treemap
from registry.reports.words import size
from registry.ui.kept import Own, own_by_version
from registry.ui.page import Args, Page, address_of_name

_MOST_AREAS = 400
"""Rectangles of the picture; smaller versions share one a model."""

_UNHELD = (
    "NOT EXISTS (SELECT 1 FROM aliases a WHERE a.id = v.id) AND NOT EXISTS (SELECT 1 FROM tags g WHERE g.id = v.id) "
    "AND v.version < (SELECT MAX(w.version) FROM versions w WHERE w.model = v.model) "
    "AND NOT EXISTS (SELECT 1 FROM lineage l WHERE l.parent = v.id)"
)


def storage(registry: Registry, args: Args) -> Page:
    """What holds the disk, and what may go."""
    status = registry.status()
    own = own_by_version(registry)
    unheld = {
        str(version_id): (str(model), int(number))
        for version_id, model, number in registry.catalog.query(
            f"SELECT v.id, v.model, v.version FROM versions v WHERE {_UNHELD}"
        )
    }
    by_model: dict[str, dict[str, Any]] = {}
    for one in own:
        row = by_model.setdefault(one.model, {"model": one.model, "own": 0, "may_go": 0})
        row["own"] += one.size
        row["may_go"] += one.id in unheld
    counts = dict(registry.catalog.query("SELECT model, COUNT(*) FROM versions GROUP BY model"))
    rows = sorted(by_model.values(), key=lambda row: -row["own"])
    for row in rows:
        row["versions"] = counts.get(row["model"], 0)
        row["share"] = row["own"] / status.stored if status.stored else 0.0
    return Page(
        template="storage.html",
        title="Storage",
        place="storage",
        document={**status._asdict(), "saved": status.saved, "models": rows},
        rows=rows,
        command="registry du",
        python="registry.status()",
        context={
            "status": status,
            "picture": treemap(_areas(own, unheld), "Bytes by model and version"),
            "rows": rows,
            "unheld": [f"{model}:v{number}" for model, number in unheld.values()],
        },
    )


def _areas(own: Sequence[Own], unheld: dict[str, Any]) -> list[Area]:
    """A rectangle for each version that wrote bytes; the smallest of a model share one."""
    areas = [
        Area(
            name=f"{one.model}:v{one.version}",
            size=one.size,
            note=size(one.size),
            tone=f"{colour_of(one.model)}{' pale' if one.id in unheld else ''}",
            to=address_of_name(f"{one.model}:v{one.version}"),
        )
        for one in own[:_MOST_AREAS]
    ]
    rest: Counter[str] = Counter()
    for one in own[_MOST_AREAS:]:
        rest[one.model] += one.size
    return areas + [
        Area(f"{model}, smaller versions", written, size(written), colour_of(model), address_of_name(model))
        for model, written in rest.items()
    ]


def data(registry: Registry, args: Args) -> Page:
    """The results of cached functions."""
    found = registry.artifacts.find()
    documents = [_document(one) for one in found]
    return Page(
        template="data.html",
        title="Data",
        place="data",
        document=documents,
        rows=[
            {name: value for name, value in one.items() if name not in ("record", "id")} for one in documents
        ],
        command="registry cache list",
        python="registry.artifacts.find()",
        context={"artifacts": found, "used": _used},
    )


def artifact(registry: Registry, args: Args, key: str) -> Page:
    """One result of a cached function: what it was made from, and who used it."""
    one = registry.artifacts[key]
    return Page(
        template="artifact.html",
        title=f"{one.function} {one.key[:12]}",
        place="data",
        document=_document(one),
        command=f"registry cache show {one.key[:12]}",
        python=f"registry.artifacts[{one.key[:12]!r}]",
        context={
            "one": one,
            "used": _used(one),
            "parameters": one.record.get("parameters", {}),
            "files": one.record.get("files", {}),
        },
    )


def _used(one: Artifact) -> str:
    """The time of the last load, as records have times."""
    return datetime.fromtimestamp(one.used, UTC).isoformat()


def _document(one: Artifact) -> dict[str, Any]:
    return {**one._asdict(), "function": one.function}
