"""Storms: processes change one registry at once, and SIGKILL takes them at random times; nothing acknowledged is lost."""

from __future__ import annotations

import os
import select
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import soak
import torch
from storms import Storm
from support import Tree, all_versions, broken_rules, collect, fork, wait

from registry import Registry
from registry.catalog import database
from registry.catalog.database import Database
from registry.progress import Progress
from registry.store.manifest import Manifest
from registry.store.places import is_local
from registry.store.store import Store
from registry.upkeep import verification
from registry.upkeep.repacking import tidy

STEM = "test_storms"


@pytest.mark.slow
def test_a_storm_of_processes_and_kills_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    for i, seed in enumerate(soak.seeds(STEM, 25)):
        folder = tmp_path / str(i)
        folder.mkdir()
        one = Storm(folder, seed)
        with soak.replayable(STEM, seed, f"; what was left is in {folder}"):
            one.rage(one.chance.uniform(3, 8))
            known = one.check()
        counts = known.counts
        loads = counts["load"] + counts["load artifact"]
        soak.count(STEM, operations=sum(counts.values()), kills=one.kills, loads=loads, storms=1)
        print(dict(counts), "kills", one.kills)
        assert known.counts["save"]
        assert one.kills


# -- what storms have found ----------------------------------------------------------------------------------


def thinnable(number: int) -> Tree:
    optimizer = {"state": {0: torch.full((8_000,), float(number))}, "param_groups": []}
    return {"model": {"own": torch.full((50, 30), float(number))}, "optimizer": optimizer}


def test_a_version_is_thinned_whatever_gc_takes_away_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, other = Registry(tmp_path / "r"), Registry(tmp_path / "r")
    registry.save("net", thinnable(1))
    write_manifest = Store.write_manifest

    def write(store: Store, manifest: Manifest) -> tuple[str, bytes]:
        written = write_manifest(store, manifest)
        assert collect(other, grace=0).manifests == 1
        return written

    monkeypatch.setattr(Store, "write_manifest", write)
    registry.thin("net:v1")
    monkeypatch.undo()
    assert set(registry["net:v1"].load()) == {"model"}
    assert registry.store.has(registry["net:v1"].id)
    assert broken_rules(registry) == []


def test_verify_beside_thinning_and_gc_raises_no_alarm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, other = Registry(tmp_path / "r"), Registry(tmp_path / "r")
    registry.save("net", thinnable(1))
    packs = verification._Check.packs

    def thin_first(check: verification._Check, progress: Progress) -> None:
        other.thin("net:v1")
        assert collect(other, grace=0).packs == 1
        packs(check, progress)

    monkeypatch.setattr(verification._Check, "packs", thin_first)
    assert registry.verify().problems == ()


def test_a_pack_is_repacked_while_differences_that_nothing_needs_rest_on_it(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    embedding = torch.randn(20_000, 4)
    for number in range(1, 7):
        embedding[number] += 0.001
        model = {"embedding": embedding.clone(), "own": torch.full((900,), float(number))}
        registry.save("net", {"model": model})
    registry.save("kept", {"model": {"own": torch.full((900,), 6.0)}})
    registry.compact(["net"])
    registry.remove([f"net:v{number}" for number in range(1, 7)])
    packs = [digest for (digest,) in registry.catalog.query("SELECT digest FROM packs")]
    assert registry.catalog.query("SELECT 1 FROM tensors WHERE base IS NOT NULL")
    tidy(registry.catalog, registry.store, packs)
    assert broken_rules(registry) == []
    collect(registry, grace=0)
    tidy(registry.catalog, registry.store, packs)
    collect(registry, grace=0)
    assert torch.equal(registry["kept"].load()["model"]["own"], torch.full((900,), 6.0))
    assert sum(path.stat().st_size for path in registry.root.glob("packs/*/*")) < 10_000
    assert broken_rules(registry) == []


@pytest.mark.parametrize("times", [1, 2])
def test_a_catalog_that_is_deleted_while_it_is_opened_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    registry = Registry(tmp_path / "r")
    registry.save("net", thinnable(1))
    registry.catalog.close()
    connect = Database.connect
    deleted: list[Path] = []

    def delete_first(database: Database, path: Path, *given: Any, **named: Any) -> sqlite3.Connection:
        if len(deleted) < times and path.exists():
            deleted.append(path)
            path.unlink()
        return connect(database, path, *given, **named)

    monkeypatch.setattr(Database, "connect", delete_first)
    again = Registry(tmp_path / "r", create=False)
    assert set(again["net:v1"].load()) == {"model", "optimizer"}
    assert len(deleted) == times
    assert again.save("net", thinnable(2)).name == "net:v2"
    assert broken_rules(again) == []


# -- reading while somebody saves ----------------------------------------------------------------------------

READERS = 8


def test_saves_go_on_beside_an_open_reader_and_many_reading_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "r"
    if not is_local(tmp_path):
        pytest.skip("readers hold up who saves on a file system that may be shared")
    monkeypatch.setattr(database, "BUSY_SECONDS", 5)
    registry = Registry(root)
    registry.save("net", thinnable(1))
    registry.catalog.close()
    stop_reading, stop = os.pipe()
    told_reading, told = os.pipe()

    def read() -> None:
        os.close(stop)
        registry = Registry(root, create=False)
        stopping = select.poll()  # `select` takes no descriptor beyond 1,024.
        stopping.register(stop_reading)
        while not stopping.poll(0):
            for name in [version.name for version in all_versions(registry)]:
                assert set(registry[name].load()) == {"model", "optimizer"}
            os.write(told, b"r")

    readers = [fork(read) for _ in range(READERS)]
    os.close(told)  # So that readers which have failed end this, too.
    assert [os.read(told_reading, 1) for _ in range(READERS)] == [b"r"] * READERS
    reader = sqlite3.connect(root / database.NAME, isolation_level=None)
    reader.execute("BEGIN")
    count = "SELECT COUNT(*) FROM versions"
    assert reader.execute(count).fetchone() == (1,)
    for number in range(2, 7):
        assert registry.save("net", thinnable(number)).name == f"net:v{number}"
    assert reader.execute(count).fetchone() == (1,)  # It has read at one moment all the while.
    reader.execute("COMMIT")
    assert reader.execute(count).fetchone() == (6,)
    reader.close()
    os.close(stop)
    assert [wait(pid) for pid in readers] == [0] * READERS
    for descriptor in (stop_reading, told_reading):
        os.close(descriptor)
    assert broken_rules(registry) == []
