"""Losses that were found once: each of these ended with acknowledged versions gone."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    Stepwise,
    all_versions,
    broken_rules,
    collect,
    copy,
    files,
    in_child,
    in_steps,
    is_in_a_commit,
    is_state,
    kill_me,
    save,
    state,
)

from registry import Registry
from registry.catalog.catalog import Catalog
from registry.catalog.change import Change
from registry.checkpoints import saving
from registry.log.journal import Journal
from registry.store import durable
from registry.store.errors import Corrupt, RegistryError
from registry.upkeep.garbage import GRACE


def collect_twice(registry: Registry) -> None:
    """Two ordinary collections, more than a grace period apart."""
    for later in (1.1, 2.2):
        collect(registry, grace=GRACE, now=time.time() + later * GRACE)


def check_all_load(registry: Registry, names: list[str]) -> None:
    assert {version.name for version in all_versions(registry)} == set(names)
    for name in names:
        registry[name].load()
    assert [problem.message for problem in registry.verify().problems] == []
    registry.rebuild()
    assert {version.name for version in all_versions(registry)} == set(names)


# -- a pack that takes its own place -------------------------------------------------------------------------


def test_thinning_versions_that_share_a_small_backbone_keeps_all(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    names = []
    for n in (1, 2, 3):
        model = {"frozen": torch.arange(300.0), "head": torch.full((20,), float(n))}
        optimizer = {"state": {0: torch.full((20,), -float(n))}, "param_groups": []}
        names.append(registry.save("net", {"model": model, "optimizer": optimizer}).name)
    registry.thin("net:v1")
    registry.thin("net:v2")
    collect_twice(registry)
    check_all_load(registry, names)


def test_equal_saves_then_thin_then_gc_keeps_both(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    tree = {
        "model": {"w": torch.arange(300.0)},
        "optimizer": {"state": {0: torch.ones(9)}, "param_groups": []},
    }
    names = [registry.save("net", tree).name for _ in range(2)]
    registry.thin("net:v1")
    registry.thin("net:v1")
    collect_twice(registry)
    check_all_load(registry, names)


def test_training_a_new_head_with_keep_optimizer_keeps_all(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    net = torch.nn.Sequential(torch.nn.Linear(16, 20), torch.nn.ReLU(), torch.nn.Linear(20, 4))
    names = [registry.save("source", {"model": net.state_dict()}).name]
    for parameter in net[0].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1, momentum=0.9)
    with registry.run("mine", keep_optimizer=1, monitor="loss") as run:
        for epoch in range(6):
            net(torch.randn(8, 16)).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            saved = run.save(model=net, optimizer=optimizer, epoch=epoch, loss=float(epoch))
            assert saved is not None
            names.append(saved.name)
    collect_twice(registry)
    check_all_load(registry, names)


def test_thinning_after_compaction_keeps_all(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    embedding = torch.randn(20_000, 16)
    names = []
    for n in range(1, 7):
        embedding[n] += 0.001
        optimizer = {"state": {0: torch.full((900,), float(n))}, "param_groups": []}
        names.append(registry.save("emb", {"model": {"emb": embedding.clone()}, "optimizer": optimizer}).name)
    registry.compact(["emb"])
    for _ in range(2):
        for n in range(1, 5):
            registry.thin(f"emb:v{n}")
    collect_twice(registry)
    check_all_load(registry, names)


# -- another process at any moment ---------------------------------------------------------------------------


def beside(
    root: Path, change: Callable[[Registry], object], other: Callable[[Registry], object], step: int
) -> int:
    """Run a change, and something else as by another process behind one of its durable steps; how many it has.

    Steps inside a commit are passed over, as others wait for its end.
    """
    plain = durable.disk

    def at(count: int, when: str, path: Path) -> None:
        if (count, when) == (step, "after") and not is_in_a_commit(root):
            durable.disk = plain
            registry = Registry(root, create=False)
            other(registry)
            registry.catalog.close()

    return in_steps(root, change, at).count


CHANGES: dict[str, Callable[[Registry], object]] = {
    "compact": lambda registry: registry.compact(["net"]),
    "compact all": lambda registry: registry.compact(similar=True, alone=True),
    "compact and expand": lambda registry: (registry.compact(["net"]), registry.expand(["net"])),
    "thin": lambda registry: registry.thin("net:v2"),
    "save": lambda registry: save(registry, 6),
    "save what is there": lambda registry: save(registry, 2),
}


def golden(root: Path, count: int = 5) -> dict[str, int]:
    registry = Registry(root)
    saved = {}
    for number in range(1, count + 1):
        tree = state(number)
        tree["optimizer"] |= {"state": {0: torch.full((40_000,), float(number))}, "param_groups": []}
        saved[registry.save("net", tree, epoch=number).name] = number
    registry.catalog.close()
    return saved


@pytest.mark.parametrize("name", CHANGES)
def test_gc_without_grace_at_any_step_of_a_change_loses_nothing(tmp_path: Path, name: str) -> None:
    saved = golden(tmp_path / "golden")
    step = 0
    while True:
        root = copy(tmp_path / "golden", tmp_path / "r")
        count = beside(root, CHANGES[name], lambda other: other.collect_garbage(grace=0), step)
        registry = Registry(root, create=False)
        collect(registry, grace=0, now=time.time() + 9_000)
        for version, number in saved.items():
            assert torch.equal(
                registry[version].load("model/own")["model"]["own"], state(number)["model"]["own"]
            )
            if (name, version) != ("thin", "net:v2"):
                assert registry[version].load()["optimizer"]["steps"] == [number]
        assert [problem.message for problem in registry.verify().problems] == []
        registry.catalog.close()
        step += 1
        if step > count:
            break
    assert step > 5


# -- recovery ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def test_recovery_beside_a_killed_gc_moves_no_tensor_away_from_who_needs_it(tmp_path: Path) -> None:
    """Packs that gc took out of the catalog, and had no time to remove, and a save cut behind its journal line."""
    root = tmp_path / "r"
    registry = Registry(root)
    names = []
    for n in range(1, 7):
        near = torch.arange(3_000.0) + n * 1e-6
        names.append(
            registry.save("net", {"model": {"near": near, "own": torch.full((50, 30), float(n))}}).name
        )
    registry.compact(["net"])

    class NoUnlink(durable.Disk):
        def unlink(self, path: Path, folder: int) -> None:
            raise Killed

    plain = durable.disk
    for _ in range(8):
        durable.disk = NoUnlink()
        try:
            collect(registry, grace=0, now=time.time() + 9_000)
            break
        except Killed:
            pass
        finally:
            durable.disk = plain
    registry.catalog.close()

    def cut() -> None:
        """Saves, and is killed when its line of the journal is durable."""
        registry = Registry(root, create=False)
        durable.disk = Stepwise(
            lambda count, when, path: kill_me() if when == "after" and "journal" in str(path) else None
        )
        registry.save("net", state(50))

    assert in_child(cut) == -9
    registry = Registry(root, create=False)
    names.append("net:v7")
    for grace_periods in (5, 10):
        for name in names:
            registry[name].load()
        assert [problem.message for problem in registry.verify().problems] == []
        collect(registry, grace=GRACE, now=time.time() + grace_periods * GRACE)
    check_all_load(registry, names)


# -- a power cut in the middle of an append ------------------------------------------------------------------


def named_versions(root: Path) -> None:
    registry = Registry(root)
    for number in (1, 2, 3):
        tree = state(number)
        tree["optimizer"] |= {"state": {}, "param_groups": []}
        registry.save("net", tree, epoch=number, metrics={"acc": float(number)})
    registry.set_alias("net:v1", "prod")
    registry.set_tag("net:v1", "gold")
    registry.add_note("net:v1", "keep " + "x" * 700)
    registry.catalog.close()


@pytest.mark.parametrize("name", ["thin", "remove"])
def test_a_change_that_is_cut_anywhere_happens_whole_or_not(tmp_path: Path, name: str) -> None:
    before = tmp_path / "before"
    named_versions(before)
    after = copy(before, tmp_path / "after")
    registry = Registry(after)
    registry.thin("net:v1") if name == "thin" else registry.remove(["net:v2", "net:v3"])
    registry.catalog.close()
    log = next(after.glob("journal/*.log")).relative_to(after)
    whole, start = (after / log).read_bytes(), (before / log).stat().st_size
    cuts = {*range(start, len(whole), 61), start + 1, len(whole) - 1, len(whole)}
    assert len(cuts) > 8
    for cut in sorted(cuts):
        root = copy(after, tmp_path / "cut")
        for path in root.glob("catalog.sqlite*"):
            path.unlink()
        for path in before.glob("catalog.sqlite*"):
            (root / path.name).write_bytes(path.read_bytes())
        (root / log).write_bytes(whole[:cut])
        registry = Registry(root, create=False)
        collect(registry, grace=0, now=time.time() + 9_000)
        found = {version.name: version for version in all_versions(registry)}
        removed = {"net:v2", "net:v3"} if name == "remove" and cut == len(whole) else set()
        assert set(found) == {"net:v1", "net:v2", "net:v3"} - removed
        first = found["net:v1"]
        assert (first.aliases, first.tags, len(first.notes)) == (("prod",), ("gold",), 1)
        for version in found:
            registry[version].load()
        registry.catalog.close()


# -- a damaged catalog ---------------------------------------------------------------------------------------


def test_a_catalog_with_too_low_a_number_never_overwrites_a_version(tmp_path: Path) -> None:
    root = tmp_path / "r"
    registry = Registry(root)
    for number in range(1, 10):
        save(registry, number)
    registry.set_alias("net:v8", "production")
    registry.catalog.close()
    with contextlib.closing(sqlite3.connect(root / "catalog.sqlite")) as connection:
        connection.execute("UPDATE models SET next_version = next_version & ~2")  # 10 becomes 8: one bit
        connection.commit()
    registry = Registry(root)
    with contextlib.suppress(Corrupt):
        save(registry, 77)
    registry.rebuild()
    collect(registry, grace=0, now=time.time() + 9_000)
    for number in range(1, 10):
        assert is_state(registry[f"net:v{number}"].load(), number)
    assert registry["net:v8"].aliases == ("production",)
    assert save(registry, 78) in ("net:v10", "net:v11")


# -- a folder from somebody else -----------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["doomed", "packs"])
@pytest.mark.damages
def test_a_forged_digest_deletes_nothing_outside(tmp_path: Path, table: str) -> None:
    root = tmp_path / "r"
    registry = Registry(root)
    save(registry, 1)
    registry.catalog.close()
    victim = tmp_path / "home" / "important.safetensors"
    victim.parent.mkdir()
    victim.write_bytes(b"precious")
    with contextlib.closing(sqlite3.connect(root / "catalog.sqlite")) as connection:
        forged = str(victim).removesuffix(".safetensors")
        if table == "doomed":
            connection.execute("INSERT INTO doomed VALUES (?, ?)", (forged, "2020-01-01T00:00:00.000000Z"))
        else:
            connection.execute("INSERT INTO packs VALUES (99, ?, 8, 0, 0)", [forged])
        connection.commit()
    with contextlib.suppress(RegistryError):
        Registry(root).collect_garbage(grace=0)
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("place", ["tmp", "packs", "manifests", "packs/ab"])
@pytest.mark.damages
def test_gc_follows_no_link(tmp_path: Path, place: str) -> None:
    root = tmp_path / "r"
    registry = Registry(root)
    save(registry, 1)
    registry.catalog.close()
    home = tmp_path / "home"
    home.mkdir()
    names = ["thesis.tex", f"{'ab' * 32}.safetensors", f"{'ab' * 32}.json"]
    for name in [*names, f"ab/{names[1]}", f"ab/{names[2]}"]:
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text("mine")
        os.utime(home / name, (time.time() - 99_000,) * 2)
    before = files(home)
    target = root / place
    if target.exists():
        target.rename(tmp_path / "aside")
    target.symlink_to(home)
    with pytest.raises(RegistryError, match="link"):
        Registry(root).collect_garbage(grace=0)
    assert files(home) == before


@pytest.mark.parametrize(
    "name", ["../../outside", "net/../../../outside", "net/x/y", "/tmp/x", "net/.hidden", "net"]
)
def test_a_run_cannot_be_named_out_of_its_folder(tmp_path: Path, name: str) -> None:
    registry = Registry(tmp_path / "r")
    save(registry, 1)
    record = {"op": "run", "name": name, "model": "net", "at": "2026-01-01T00:00:00.000000Z", "record": {}}
    with pytest.raises(RegistryError):
        registry.catalog.commit(lambda view: [record])
    assert registry.runs.find() == []


def test_a_catalog_that_fails_behind_the_log_does_not_make_a_change_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(tmp_path / "r")
    save(registry, 1)
    set_head, append, failures = Change.set_head, Journal.append, []

    def appended(*args: Any) -> Any:
        monkeypatch.setattr(Journal, "append", append)
        monkeypatch.setattr(Change, "set_head", fails_once)
        return append(*args)

    def fails_once(*args: Any) -> None:
        monkeypatch.setattr(Change, "set_head", set_head)
        failures.append(1)
        raise sqlite3.DatabaseError("database disk image is malformed")

    monkeypatch.setattr(Journal, "append", appended)
    saved = save(registry, 2)
    assert failures == [1]
    assert saved == "net:v2"
    assert sorted(version.name for version in all_versions(Registry(tmp_path / "r"))) == ["net:v1", "net:v2"]
    assert broken_rules(Registry(tmp_path / "r")) == []


def test_a_save_returns_although_its_version_is_removed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, other = Registry(tmp_path / "r"), Registry(tmp_path / "r")
    save(registry, 1)
    resolve = saving.resolve

    def removed_first(catalog: Catalog, reference: str) -> Any:
        monkeypatch.setattr(saving, "resolve", resolve)
        other.remove(["net:v2"], force=True)
        collect(other, grace=0, now=time.time() + 2 * GRACE)
        return resolve(catalog, reference)

    monkeypatch.setattr(saving, "resolve", removed_first)
    saved = registry.save("net", state(2), epoch=2)
    assert (saved.name, saved.epoch) == ("net:v2", 2)
    assert [version.name for version in all_versions(registry)] == ["net:v1"]


def test_an_artifact_that_is_dropped_while_it_is_read_is_given_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, other = Registry(tmp_path / "r"), Registry(tmp_path / "r")
    made = registry.cached(_computed)
    made()
    get = registry.store.get

    def dropped(*args: Any, **options: Any) -> Any:
        tree = get(*args, **options)
        other.artifacts.clear()
        collect(other, grace=0, now=time.time() + 2 * GRACE)
        return tree

    monkeypatch.setattr(registry.store, "get", dropped)
    assert torch.equal(made(), torch.arange(9.0))


def _computed() -> torch.Tensor:
    return torch.arange(9.0)
