"""The pages of what lies on the disk: who holds the bytes, what may go, and cached data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from datetime import UTC, datetime

from registry.cache.artifacts import Artifact
from registry.catalog.versions import UNHELD
from registry.registry import Registry
from registry.reports.charts import Area, colour_of, treemap
from registry.reports.words import size
from registry.ui.kept import NAMED, NOTED, Own, once, owned
from registry.ui.page import BASE, Args, Page, address, address_of_name
from registry.upkeep.status import free_space
from registry.upkeep.usage import on_disk, usage

_MOST_AREAS = 400
"""Rectangles of the picture; smaller versions share one a model."""


def storage(registry: Registry, args: Args) -> Page:
    """What holds the disk, and what may go."""
    found = once(registry, "usage", lambda: usage(registry.catalog), survives=NOTED)
    unheld = once(registry, "unheld", lambda: _unheld(registry), survives=NOTED)
    return Page(
        template="storage.html",
        title="Storage",
        place="storage",
        document=found.document,
        rows=found.document["models"],
        command="registry du",
        python="registry.status()",
        context={
            "free": free_space(registry.root),
            "usage": found,
            "disk": once(registry, "on disk", lambda: on_disk(registry.root), survives=NAMED - {"run"}),
            "picture": once(
                registry,
                ("treemap", BASE.get()),
                lambda: treemap(
                    _areas(owned(registry).by_version.values(), unheld, found.cached),
                    "Bytes by model and version",
                ),
                survives=NOTED,
            ),
            "unheld": list(unheld.values()),
            "may_go": sum(one.unheld_freed for one in found.models),
        },
    )


def _unheld(registry: Registry) -> dict[str, str]:
    """The versions that nothing holds: the name of each by its id."""
    rows = registry.catalog.query(
        f"SELECT v.id, v.model, v.version FROM versions v WHERE {UNHELD.sql} ORDER BY v.model, v.version DESC",
        UNHELD.parameters,
    )
    return {version_id: f"{model}:v{version}" for version_id, model, version in rows}


def _areas(found: Iterable[Own], unheld: Collection[str], cached: int) -> list[Area]:
    """A rectangle for each version that wrote bytes, and one for cached data; the smallest of a model share one."""
    own = sorted((one for one in found if one.size), key=lambda one: -one.size)
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
    areas += [
        Area(f"{model}, smaller versions", written, size(written), colour_of(model), address_of_name(model))
        for model, written in rest.items()
    ]
    if cached:
        areas.append(Area("cached data", cached, size(cached), "data", address("data")))
    return areas


def data(registry: Registry, args: Args) -> Page:
    """The results of cached functions."""
    found = registry.artifacts.find()
    documents = [one.document for one in found]
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
        document=one.document,
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
