"""Who holds the bytes: what is reckoned from the catalog is what garbage collection frees."""

from __future__ import annotations

import operator
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from registry import Registry
from registry.upkeep import repacking
from registry.upkeep.usage import Usage, freed_by, usage, usage_of


def noise(seed: int, count: int = 2_000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A registry whose versions share tensors, within a model and between two, with attached files and cached results."""
    registry = Registry(tmp_path / "r")
    base = noise(0)
    for i in range(1, 5):
        registry.save("net", {"model": {"base": base, "head": noise(i)}})
    registry.save("other", {"model": {"head": noise(4), "own": noise(9)}})
    registry.save("other", {"model": {"own": noise(9)}})
    registry.save("alone", {"model": {"w": noise(20)}})
    edge = {"kind": "resumed-from", "parent": registry["net:v2"].id}
    registry.save("child", {"model": {"w": noise(30)}}, lineage=[edge])
    registry.set_alias("net:v3", "production")
    registry.set_tag("net:v3", "paper")
    (tmp_path / "a.bin").write_bytes(noise(40).numpy().tobytes())
    registry.attach("net:v1", tmp_path / "a.bin")
    registry.attach("net:v2", tmp_path / "a.bin")
    (tmp_path / "b.bin").write_bytes(noise(41).numpy().tobytes())
    registry.attach("net:v1", tmp_path / "b.bin")
    registry.cached(shared_with_a_version)()
    registry.cached(of_no_version)()
    registry.catalog.close()
    return tmp_path / "r"


def shared_with_a_version() -> Any:
    return noise(20)


def of_no_version() -> Any:
    return noise(50)


def freed(root: Path, copy: Path, remove: list[str]) -> int:
    """What garbage collection frees of the packs once versions are removed."""
    shutil.copytree(root, copy)
    registry = Registry(copy)
    before = packs(copy)
    registry.remove(remove, force=True)
    registry.collect_garbage(grace=0)
    registry.catalog.close()
    return before - packs(copy)


def packs(root: Path) -> int:
    return sum(path.stat().st_size for path in root.glob("packs/*/*"))


def test_every_byte_is_held_by_one(root: Path) -> None:
    found = usage(Registry(root).catalog)
    assert found.stored == packs(root)
    assert sum(one.own for one in found.models) + found.cached + found.unneeded == found.stored
    assert found.cached > 0
    assert [one.name for one in found.models] == ["net", "alone", "child", "other"]


@pytest.mark.parametrize("model", ["net", "other", "alone", "child"])
def test_a_removal_frees_what_is_reckoned_at_least(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """And exactly that, but for what is copied out of packs of which most is not needed any more."""
    check_reckoning(root, tmp_path, model, operator.le)
    monkeypatch.setattr(repacking, "tidy_behind", lambda *_: None)
    check_reckoning(root, tmp_path / "exactly", model, operator.eq)


def check_reckoning(root: Path, tmp_path: Path, model: str, fits: Callable[[int, int], bool]) -> None:
    registry = Registry(root)
    versions = usage_of(registry.catalog, model)
    for i, one in enumerate(versions):
        assert fits(one.freed, freed(root, tmp_path / f"copy{i}", [one.name])), one
    (found,) = (one for one in usage(registry.catalog).models if one.name == model)
    assert fits(found.freed, freed(root, tmp_path / "all", [one.name for one in versions]))
    assert found.own == sum(one.own for one in versions)
    unheld = [one.name for one in versions if not one.held_by]
    assert found.unheld == len(unheld)
    if unheld:
        assert fits(found.unheld_freed, freed(root, tmp_path / "unheld", unheld))


def test_what_holds_a_version_is_named(root: Path) -> None:
    found = {one.name: one.held_by for one in usage_of(Registry(root).catalog, "net")}
    assert found == {
        "net:v1": (),
        "net:v2": ("1 version from it",),
        "net:v3": ("alias production", "tag paper"),
        "net:v4": ("the latest",),
    }


def test_the_bytes_stay_held_when_versions_become_differences(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    value = noise(1, 50_000)
    for i in range(6):
        registry.save("net", {"model": {"w": value + i * 1e-6}})
    (compacted,) = registry.compact("net")
    assert compacted.packs
    registry.collect_garbage(grace=0)
    found = usage(registry.catalog)
    assert found.stored == packs(tmp_path / "r") == found.models[0].own
    for i, one in enumerate(usage_of(registry.catalog, "net")):
        assert one.freed == freed(tmp_path / "r", tmp_path / f"copy{i}", [one.name])


def test_cached_results_free_what_they_alone_need(root: Path) -> None:
    registry = Registry(root)
    results = {one.function.rpartition(".")[2]: one for one in registry.artifacts.find()}
    assert freed_by(registry.catalog, [results["shared_with_a_version"].id]) == 0
    before = usage(registry.catalog).cached
    assert freed_by(registry.catalog, [one.id for one in results.values()]) == before > 0
    registry.artifacts.clear()
    assert usage(registry.catalog).unneeded == before
    registry.collect_garbage(grace=0)
    assert usage(registry.catalog).unneeded == 0


def test_files_of_a_version_that_is_gone_are_unneeded(root: Path) -> None:
    registry = Registry(root)
    registry.remove("net:v1")
    before = usage(registry.catalog).unneeded
    assert before > 0
    collected = registry.collect_garbage(grace=0)
    assert collected.bytes >= before
    assert usage(registry.catalog).unneeded == 0


def test_an_empty_registry_holds_nothing(tmp_path: Path) -> None:
    assert usage(Registry(tmp_path / "r").catalog) == Usage(0, 0, 0, 0, ())
