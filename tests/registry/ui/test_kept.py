"""What is kept between pages is what would be found out anew."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from browsing import fill, network

from registry import Registry
from registry.catalog.versions import own_by_model, own_sizes, values_by_model
from registry.ui import kept
from registry.upkeep.usage import usage

Step = Callable[[Registry], object]

STEPS: dict[str, Step] = {
    "save": lambda registry: registry.save(
        "net", {"model": network(7).state_dict()}, metrics={"accuracy": 0.99}
    ),
    "save the same": lambda registry: registry.save("other", {"model": network(5).state_dict()}, loss=0.5),
    "save NaN": lambda registry: registry.save(
        "net", {"model": {}}, loss=math.nan, metrics={"accuracy": math.nan}
    ),
    "save another": lambda registry: registry.save(
        "new", {"model": network(8).state_dict()}, metrics={"f1": 0.1}
    ),
    "note": lambda registry: registry.add_note("net:v1", "seen"),
    "alias": lambda registry: registry.set_alias("net:v2", "paper"),
    "tag": lambda registry: registry.set_tag("net:v2", "paper"),
    "remove": lambda registry: registry.remove("net:v3"),
    "compact": lambda registry: registry.compact(),
    "collect": lambda registry: registry.collect_garbage(),
    "cache": lambda registry: registry.cached(lambda size: [torch.ones(size)])(4),
    "rebuild": lambda registry: registry.rebuild(),
}


def check(registry: Registry) -> None:
    found, catalog = kept.owned(registry), registry.catalog
    assert {name: size for name, size in found.by_model.items() if size} == own_by_model(catalog)
    for one in usage(catalog).models:
        assert found.by_model.get(one.name, 0) == one.own
        assert kept.logical_of(registry, one.name) == one.size
        own = {
            version: own.size
            for version, own in found.by_version.items()
            if own.model == one.name and own.size
        }
        assert own == own_sizes(catalog, one.name)
        for metric in ("accuracy", "loss"):
            values = values_by_model(catalog, metric).get(one.name, [])
            assert [value for _, value in kept.points_of(registry, one.name, metric)] == values


@pytest.mark.parametrize("first", STEPS)
def test_figures_follow_each_change(filled: Registry, first: str) -> None:
    check(filled)
    STEPS[first](filled)
    check(filled)
    for name, step in STEPS.items():
        if name != "remove" or first != "remove":
            step(filled)
            if name in ("save", "compact"):
                check(filled)
    check(filled)


def test_a_note_and_a_save_leave_most_as_it_is(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def find_out() -> list[str]:
        asked.append(1)
        return ["found"]

    def once(survives: frozenset[str] = kept.NAMED) -> list[str]:
        return kept.once(
            filled, "key", find_out, survives=survives, extended=lambda found, added: [*found, *added]
        )

    once()
    filled.add_note("net:v1", "seen")
    assert (once(), len(asked)) == (["found"], 1)
    saved = filled.save("net", {"model": {}}).id
    assert (once(), len(asked)) == (["found", saved], 1)
    filled.remove("net:v1")
    assert (once(), len(asked)) == (["found"], 2)
    filled.set_tag("net:v2", "a")
    assert (once(kept.NOTED), len(asked)) == (["found"], 3)


def test_what_changes_while_it_is_found_out_is_not_kept(filled: Registry) -> None:
    def meanwhile() -> int:
        filled.save("net", {"model": {}})
        return len(filled)

    kept.once(filled, "key", meanwhile, survives=kept.NAMED, extended=lambda found, added: -1)
    assert kept.once(filled, "key", lambda: 5, survives=kept.NAMED, extended=lambda found, added: -1) == 5


def test_another_folder_has_other_figures(filled: Registry, tmp_path: Path) -> None:
    check(filled)
    another = Registry(tmp_path / "another")
    fill(another)
    another.remove("other:v1")
    for one in (filled, another):
        one.catalog.close()
    filled.root.rename(tmp_path / "away")
    another.root.rename(filled.root)
    check(filled)
