"""Chains: versions of one run that follow one another, as the rows of a graph of what came from what."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from registry.catalog.lookups import Reader
from registry.catalog.resolving import resolve
from registry.store.digest import is_digest
from registry.store.errors import Corrupt

CONTINUED = "continued"
"""The kind of the edge from a version to the one before it in its run."""


class Node(NamedTuple):
    """A version in the graph.

    Attributes:
        aliases: those that point at it, by name.
        parents: kind and id of each version that it came from.
        others: kind and text of everything else that it came from, such as a file or a removed version.
    """

    id: str
    model: str
    version: int
    created: str
    run: str | None
    aliases: tuple[str, ...]
    parents: tuple[tuple[str, str], ...]
    others: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """Its name, such as `lenet5:v3`."""
        return f"{self.model}:v{self.version}"


class Chain(NamedTuple):
    """Versions of one run, each made from the one before, of which only the last has aliases or several children.

    Attributes:
        nodes: the oldest first.
    """

    nodes: Sequence[Node]

    @property
    def name(self) -> str:
        """The versions, such as `lenet5:v1…v4`."""
        first, last = self.nodes[0], self.nodes[-1]
        return first.name if first == last else f"{first.name}…v{last.version}"

    @property
    def parents(self) -> tuple[tuple[str, str], ...]:
        """Kind and id of each version that the oldest one came from."""
        return self.nodes[0].parents

    @property
    def how(self) -> str:
        """How the oldest one came to be, such as `resumed`, or `imported model.pt`."""
        first = self.nodes[0]
        kinds = Counter(kind.removesuffix("-from") for kind, _ in first.parents)
        found = [kind if count == 1 else f"{kind} ({count})" for kind, count in kinds.items()]
        return ", ".join(
            [*found, *(f"{kind.removesuffix('-from')} {_told(text)}" for kind, text in first.others)]
        )


def _told(text: str) -> str:
    """What a version came from that is no version here: a file, or one that was removed."""
    return f"{text[:12]} (removed)" if is_digest(text) else text


_TYPES: tuple[tuple[type, ...], ...] = ((str,), (str,), (int,), (str,), (str, type(None)))
"""The types of the columns that `read_nodes` reads, but for the parent."""


def read_nodes(catalog: Reader) -> dict[str, Node]:
    """All versions with what they came from, by id.

    Raises:
        Corrupt: if the catalog holds a damaged row.
    """
    rows = catalog.query(
        "SELECT id, model, version, created, run, CASE WHEN json_valid(record) THEN json_extract(record, '$.parent') END "
        "FROM versions"
    )
    if not all(all(map(isinstance, row, _TYPES)) for row in rows):
        raise Corrupt("the catalog holds a damaged row of a version", "recreate it with: registry rebuild")
    ids = {f"{model}:v{version}": version_id for version_id, model, version, *_ in rows}
    edges: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for child, kind, parent in catalog.query("SELECT child, kind, parent FROM lineage ORDER BY rowid"):
        edges[child].append((str(kind), str(parent)))
    aliases: dict[str, list[str]] = defaultdict(list)
    for version_id, alias in catalog.query("SELECT id, name FROM aliases ORDER BY name"):
        aliases[version_id].append(str(alias))
    known, found = set(ids.values()), {}
    for version_id, model, version, created, run, before in rows:
        parents = [(kind, parent) for kind, parent in edges[version_id] if parent in known]
        others = [(kind, parent) for kind, parent in edges[version_id] if parent not in known]
        if not edges[version_id] and before in ids and ids[before] != version_id:
            parents = [(CONTINUED, ids[before])]
        found[version_id] = Node(
            version_id,
            model,
            version,
            created,
            run,
            tuple(aliases[version_id]),
            tuple(parents),
            tuple(others),
        )
    return found


def named(catalog: Reader, nodes: dict[str, Node], source: str) -> list[str]:
    """The ids of the versions that a model, a run or another reference stands for; none for a run without one.

    Raises:
        NotFound: if there is no such model or version.
    """
    if "/" in source:
        return [node.id for node in nodes.values() if node.run == source]
    version = resolve(catalog, source)
    if source != version.model:
        return [version.id]
    return [node.id for node in nodes.values() if node.model == source]


def related(nodes: dict[str, Node], ids: Iterable[str]) -> dict[str, Node]:
    """Some versions, all that they came from, and all that came from them."""
    children = _children(nodes)
    start = list(ids)
    above = _reached(start, lambda one: [parent for _, parent in nodes[one].parents])
    below = _reached(start, lambda one: children[one])
    return {one: nodes[one] for one in nodes if one in above or one in below}


def chains(nodes: dict[str, Node], *, is_full: bool = False) -> list[Chain]:
    """The chains of a graph, each before the one that it came from, and else the newest first.

    Args:
        is_full: let every version be a chain of its own.
    """
    children = _children(nodes)
    found: list[Chain] = []
    for node in nodes.values():
        if is_full or not _goes_on(node, nodes, children):
            chain = [node]
            while not is_full and (following := _following(chain[-1], nodes, children)):
                chain.append(following)
            found.append(Chain(chain))
    # Records from outside may go in a circle, which has no first version.
    standing = {node.id for chain in found for node in chain.nodes}
    found += [Chain([node]) for node in nodes.values() if node.id not in standing]
    return _ordered(found)


def _goes_on(node: Node, nodes: dict[str, Node], children: dict[str, list[str]]) -> bool:
    """Whether a version belongs to the chain of its parent."""
    if len(node.parents) != 1:
        return False
    kind, parent = node.parents[0]
    if kind != CONTINUED or parent not in nodes:
        return False
    before = nodes[parent]
    is_one_run = (before.run, before.model) == (node.run, node.model)
    return is_one_run and not before.aliases and children[parent] == [node.id]


def _following(node: Node, nodes: dict[str, Node], children: dict[str, list[str]]) -> Node | None:
    """The version that comes next in a version's chain."""
    after = children[node.id]
    return nodes[after[0]] if len(after) == 1 and _goes_on(nodes[after[0]], nodes, children) else None


def _children(nodes: dict[str, Node]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for node in nodes.values():
        for _, parent in dict.fromkeys(node.parents):
            found[parent].append(node.id)
    return found


def _reached(start: Iterable[str], next_to: Callable[[str], Iterable[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(start)
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += next_to(one)
    return found


def _ordered(found: Sequence[Chain]) -> list[Chain]:
    """Chains in the order of the graph. Where damaged records go in a circle, the circle is broken at its newest one."""
    of = {node.id: i for i, chain in enumerate(found) for node in chain.nodes}
    above = [
        {of[parent] for _, parent in chain.parents if parent in of} - {i} for i, chain in enumerate(found)
    ]
    waits = [0] * len(found)
    for parents in above:
        for parent in parents:
            waits[parent] += 1
    newest = sorted(
        range(len(found)), key=lambda i: (found[i].nodes[-1].created, found[i].name), reverse=True
    )
    rank = {i: place for place, i in enumerate(newest)}
    ready = [rank[i] for i in range(len(found)) if not waits[i]]
    heapq.heapify(ready)
    done: dict[int, None] = {}
    rest = iter(newest)
    while len(done) < len(found):
        i = newest[heapq.heappop(ready)] if ready else next(i for i in rest if i not in done)
        if i in done:
            continue
        done[i] = None
        for parent in above[i]:
            waits[parent] -= 1
            if not waits[parent]:
                heapq.heappush(ready, rank[parent])
    return [found[i] for i in done]
