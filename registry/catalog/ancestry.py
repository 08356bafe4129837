"""Ancestry: which checkpoints one came from, and which came from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from registry.catalog.resolving import resolve
from registry.catalog.versions import by_id, find_versions, name_of
from registry.log.reference import check_version_name
from registry.store.errors import Invalid, NotFound

if TYPE_CHECKING:
    from registry.catalog.catalog import Catalog
    from registry.catalog.versions import Version

DEEPEST = 50
"""Levels of a tree of ancestry, unless another number is asked for."""


@dataclass(frozen=True)
class Branch:
    """A version in a tree of ancestry, and what is beyond it.

    Attributes:
        kind: how it is related to the version before it in the tree: the kind of an edge of the lineage, such as
            `resumed-from`, or `continued from` for the version before it in the same run.
        name: the version's name; or what an edge gives in its place, such as the digest of a file or a removed version.
        version: None where the edge leads to no version.
        branches: what is beyond it, in the direction of the tree.
        cut: why `branches` is empty although there may be more: `repeated` if the version is in the tree already,
            `deep` if it is too many levels away.
    """

    kind: str
    name: str
    version: Version | None = None
    branches: Sequence[Branch] = ()
    cut: Literal["", "repeated", "deep"] = ""


def origins(catalog: Catalog, version: Version, *, deepest: int = DEEPEST) -> list[Branch]:
    """What a version came from, as a tree: by the edges of its lineage, or else from the version before it in its run.

        for branch in origins(registry.catalog, registry.resolve("lenet6@best")):
            print(branch.kind, branch.name)

    Args:
        deepest: how many levels the tree has at most.
    """

    def next_to(version: Version) -> list[_Step]:
        edges = [
            (edge["kind"], edge["parent"], by_id(catalog, edge["parent"]))
            for edge in version.record.get("lineage", [])
        ]
        if edges or not (parent := version.record.get("parent")):
            return edges
        try:
            return [("continued from", parent, resolve(catalog, parent))]
        except NotFound:
            return []

    return _tree(version, next_to, deepest)


def descendants(catalog: Catalog, version: Version, *, deepest: int = DEEPEST) -> list[Branch]:
    """What came from a version by edges of the lineage, as a tree.

    Args:
        deepest: how many levels the tree has at most.
    """

    def next_to(version: Version) -> list[_Step]:
        return [(kind, child.name, child) for child, kind in children(catalog, version)]

    return _tree(version, next_to, deepest)


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
            # The name was made up, or the version was removed since.
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
    versions = {child.id: child for child in found}
    return [(versions[child], kind) for child, kind in edges if child in versions]


_Step: TypeAlias = "tuple[str, str, Version | None]"
"""From one version to the next: the kind of the edge, the name of its end, and the version if its end is one."""


def _tree(root: Version, next_to: Callable[[Version], list[_Step]], deepest: int) -> list[Branch]:
    """The branches of a version.

    Args:
        next_to: says what is one step away from a version.
        deepest: how many levels the tree has at most.
    """
    seen: set[str] = set()

    def grow(version: Version, depth: int) -> list[Branch]:
        seen.add(version.id)
        return [branch(step, depth) for step in next_to(version)]

    def branch(step: _Step, depth: int) -> Branch:
        kind, name, version = step
        if version is None:
            return Branch(kind, name)
        if version.id in seen:
            return Branch(kind, version.name, version, cut="repeated")
        if depth >= deepest:
            return Branch(kind, version.name, version, cut="deep")
        return Branch(kind, version.name, version, branches=grow(version, depth + 1))

    return grow(root, 0)
