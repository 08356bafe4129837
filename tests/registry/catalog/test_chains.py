"""Chains: the graph of what came from what, in few rows, each before what it came from."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from registry import Registry
from registry.catalog.chains import CONTINUED, Chain, Node, chains, read_nodes, related
from registry.reports.text_charts import lanes


def names(found: list[Chain]) -> list[str]:
    return [chain.name for chain in found]


def test_versions_of_a_run_share_a_row_until_an_alias_or_a_branch(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    network = torch.nn.Linear(1, 1)
    with registry.run("a") as run:
        for epoch in range(1, 7):
            run.save(model=network, epoch=epoch)
    registry.set_alias("a:v4", "production")
    with registry.run("b", resume="a:v2") as run:
        for epoch in range(3, 5):
            run.save(model=network, epoch=epoch)
    nodes = read_nodes(registry.catalog)
    found = chains(nodes)
    assert names(found) == ["b:v1…v2", "a:v5…v6", "a:v3…v4", "a:v1…v2"]
    assert [chain.how for chain in found] == ["resumed", "continued", "continued", ""]
    assert len(chains(nodes, is_full=True)) == 8
    assert names(chains(related(nodes, [registry["b"].id]))) == ["b:v1…v2", "a:v1…v2"]
    assert names(chains(related(nodes, [registry["a:v3"].id]))) == ["a:v5…v6", "a:v1…v4"]


def test_what_is_no_version_is_told_and_leads_nowhere(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    edges = [
        {"kind": "imported-from", "parent": "model.pt"},
        {"kind": "transferred-from", "parent": "ab" * 32},
    ]
    registry.save("net", {"model": {"w": torch.ones(1)}}, lineage=edges)
    (chain,) = chains(read_nodes(registry.catalog))
    assert chain.parents == ()
    assert chain.how == f"imported model.pt, transferred {'ab' * 6} (removed)"


def test_a_hundred_runs_of_a_hundred_versions_take_a_hundred_rows() -> None:
    nodes = {}
    for run in range(100):
        for number in range(100):
            before = ((CONTINUED, f"{run}-{number - 1}"),) if number else ()
            created = f"2026-01-01T00:{run:02}:{number:02}Z"
            one = Node(f"{run}-{number}", f"m{run}", number + 1, created, f"m{run}/run-1", (), before)
            nodes[one.id] = one
    found = chains(nodes)
    assert len(found) == 100
    assert found[0].name == "m99:v1…v100"


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, Node]:
    """Any graph of versions; records from outside may even go in circles."""
    count = draw(st.integers(1, 12))
    ids = [f"id{i}" for i in range(count)]
    found = {}
    for i, one in enumerate(ids):
        kinds = st.sampled_from([CONTINUED, "resumed-from", "adapter-of"])
        parents = draw(st.lists(st.tuples(kinds, st.sampled_from(ids)), max_size=3))
        aliases = ("best",) if draw(st.booleans()) else ()
        run = draw(st.sampled_from(["net/run-1", "net/run-2", None]))
        found[one] = Node(
            one, "net", i + 1, draw(st.sampled_from("abc")), run, aliases, tuple(dict.fromkeys(parents))
        )
    return found


@given(graphs(), st.booleans())
def test_every_version_stands_in_one_chain_and_before_what_it_came_from(
    nodes: dict[str, Node], is_full: bool
) -> None:
    found = chains(nodes, is_full=is_full)
    standing = [node.id for chain in found for node in chain.nodes]
    assert sorted(standing) == sorted(nodes)
    place = {node.id: i for i, chain in enumerate(found) for node in chain.nodes}
    if _has_a_circle(nodes):
        return
    for i, chain in enumerate(found):
        assert all(place[parent] > i for _, parent in chain.parents)
        for node in chain.nodes[:-1]:
            assert not node.aliases


@given(graphs(), st.booleans())
def test_the_lanes_of_any_graph_have_each_row_once(nodes: dict[str, Node], is_full: bool) -> None:
    found = chains(nodes, is_full=is_full)
    of = {node.id: chain.name for chain in found for node in chain.nodes}
    rows = [
        (
            chain.name,
            list(dict.fromkeys(of[parent] for _, parent in chain.parents if parent in of)),
            bool(chain.nodes[-1].aliases),
        )
        for chain in found
    ]
    drawn = lanes(rows)
    assert [key for _, key in drawn if key] == [name for name, _, _ in rows]
    assert len({len(line) for line, _ in drawn}) <= 1
    for line, key in drawn:
        assert sum(line.count(sign) for sign in "●○") == bool(key)
        assert bool(key) or (set(line) & set("├╭") and set(line) & set("╯╮┤"))


def _has_a_circle(nodes: dict[str, Node]) -> bool:
    done: set[str] = set()

    def goes_round(one: str, above: frozenset[str]) -> bool:
        if one in above:
            return True
        if one in done:
            return False
        done.add(one)
        return any(goes_round(parent, above | {one}) for _, parent in nodes[one].parents)

    return any(goes_round(one, frozenset()) for one in nodes)


def test_a_row_that_came_from_several_leads_to_each_of_them() -> None:
    rows = [
        ("m", ["a", "b", "c"], True),
        ("a", ["r"], False),
        ("b", ["r"], False),
        ("c", ["r"], False),
        ("r", [], True),
    ]
    assert [line.rstrip() for line, _ in lanes(rows)] == [
        "●",
        "├─┬─╮",
        "○ │ │",
        "│ ○ │",
        "│ │ ○",
        "├─┴─╯",
        "●",
    ]
    # One of them has an open lane already.
    rows = [("x", ["b"], False), ("m", ["a", "b"], True), ("a", [], False), ("b", [], False)]
    assert [line.rstrip() for line, _ in lanes(rows)] == ["○", "│ ●", "├─┤", "│ ○", "○"]
