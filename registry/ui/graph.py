"""The page of lineage: what came from what, as lanes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from registry.catalog.chains import CONTINUED, Chain, chains, named, read_nodes, related
from registry.catalog.versions import values_by_id
from registry.log.metrics import called
from registry.registry import Registry
from registry.reports.charts import lane_picture
from registry.reports.text_charts import lane_lines
from registry.store.digest import is_digest
from registry.ui.kept import NOTED, once
from registry.ui.page import Args, Page, address_of_name

MOST_ROWS = 1_000

_LEAVES = NOTED | {"tag", "untag"}
"""Operations that leave the graph as it is."""


def lineage(registry: Registry, args: Args) -> Page:
    """Chains of versions, the newest first.

    Raises:
        NotFound: if what is asked for is not there.
    """
    reference = args.get("of", "").strip()
    is_full = bool(args.get("full"))
    nodes = once(registry, "nodes", lambda: read_nodes(registry.catalog), survives=_LEAVES)
    names = {node.id: node.name for node in nodes.values()}
    if reference:
        start = named(registry.catalog, nodes, reference)
        if not start:
            # It is a run. One that does not exist is an error, which suggests the nearest.
            registry.runs[reference]
        nodes = related(nodes, start)
    found = chains(nodes, is_full=is_full)
    count, found = len(found), found[:MOST_ROWS]
    metric = registry.runs.headline({node.model for node in nodes.values()})
    values = values_by_id(registry.catalog, metric) if metric else {}
    return Page(
        template="lineage.html",
        title=f"Lineage of {reference}" if reference else "Lineage",
        place="lineage",
        document={"chains": [_document(chain, names) for chain in found]},
        rows=[
            {
                "versions": chain.name,
                "aliases": chain.nodes[-1].aliases,
                called(metric or "metric"): values.get(chain.nodes[-1].id),
                "how": chain.how,
                "run": chain.nodes[0].run,
                "created": chain.nodes[-1].created,
            }
            for chain in found
        ],
        command=" ".join(
            ["registry log", *([reference] if reference else []), *(["--full"] if is_full else [])]
        ),
        context={
            "reference": reference,
            "rows": _drawn(found),
            "metric": metric,
            "values": values,
            "is_full": is_full,
            "count": count,
            "origins": lambda chain: _origins(chain, names),
            "address_of_chain": lambda chain: address_of_name(chain.nodes[-1].name),
        },
    )


def _drawn(found: Sequence[Chain]) -> list[tuple[str, Chain | None]]:
    """The picture of each line, and the chain that stands there; None between two of them."""
    of = {node.id: chain.name for chain in found for node in chain.nodes}
    by_name = {chain.name: chain for chain in found}
    lines = lane_lines(
        [
            (
                chain.name,
                list(dict.fromkeys(of[parent] for _, parent in chain.parents if parent in of)),
                bool(chain.nodes[-1].aliases),
            )
            for chain in found
        ]
    )
    return [(lane_picture(line), by_name.get(line.key)) for line in lines]


def _document(chain: Chain, names: dict[str, str]) -> dict[str, Any]:
    parents = [(kind, names.get(parent, parent)) for kind, parent in chain.parents]
    return {
        "versions": [node.name for node in chain.nodes],
        "aliases": list(chain.nodes[-1].aliases),
        "run": chain.nodes[0].run,
        "from": [{"kind": kind, "name": name} for kind, name in (*parents, *chain.nodes[0].others)],
    }


def _origins(chain: Chain, names: dict[str, str]) -> list[tuple[str, str, str | None]]:
    """What a chain came from: how, the name, and the address if it is a version."""
    found: list[tuple[str, str, str | None]] = []
    for kind, parent in chain.parents:
        how = "continued" if kind == CONTINUED else kind.removesuffix("-from")
        name = names.get(parent, parent)
        found.append((how, name, address_of_name(name) if parent in names else None))
    return found + [
        (kind.removesuffix("-from"), f"{text[:12]} (removed)" if is_digest(text) else text[:60], None)
        for kind, text in chain.nodes[0].others
    ]
