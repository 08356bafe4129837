"""Ancestry: which checkpoints one came from, and which came from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from registry.catalog.resolving import resolve
from registry.catalog.versions import find_versions, name_of
from registry.log.reference import check_version_name
from registry.store.errors import Invalid, NotFound

if TYPE_CHECKING:
    from registry.catalog.catalog import Catalog
    from registry.catalog.versions import Version


def ancestors(catalog: Catalog, name: str) -> set[str]:
    """Names of a version and of all that it came from: parents within a run, and edges of the lineage."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            version = resolve(catalog, check_version_name(name))
        except (Invalid, NotFound):
            # Made up, or removed since.
            continue
        if parent := version.record.get("parent"):
            waiting.append(parent)
        above = (name_of(catalog, edge["parent"]) for edge in version.record.get("lineage", []))
        waiting += [parent for parent in above if parent]
    return found


def children(catalog: Catalog, version: Version) -> list[tuple[Version, str]]:
    """The versions that came from one by an edge of the lineage, and the kind of the edge."""
    edges = catalog.query(
        "SELECT child, kind FROM lineage WHERE parent = ? ORDER BY child, kind", [version.id]
    )
    found = find_versions(catalog, "v.id IN (SELECT child FROM lineage WHERE parent = ?)", [version.id])
    by_id = {child.id: child for child in found}
    return [(by_id[child], kind) for child, kind in edges if child in by_id]
