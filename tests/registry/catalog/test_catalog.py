"""The catalog: plain SQL, safe settings, indexed queries, forward migration, any text."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry import Registry
from registry.catalog import schema
from registry.catalog.versions import best_version, find_versions, list_models, list_versions
from registry.store.errors import Invalid, StorageError, Unsupported
from registry.upkeep.garbage import collect_garbage


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    found = Registry(tmp_path / "r")
    for i in range(3):
        found.save(
            "net", {"model": {"w": torch.full((3,), float(i))}}, loss=float(i), metrics={"a": float(i)}
        )
    return found


@pytest.mark.parametrize(("local", "mode", "synchronous"), [(True, "wal", 1), (False, "delete", 2)])
def test_the_database_is_set_up_to_survive(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, local: bool, mode: str, synchronous: int
) -> None:
    """A write-ahead log only on the file systems of one machine."""
    registry.catalog.close()
    monkeypatch.setattr("registry.catalog.database.is_local", lambda path: local)
    values = {
        name: registry.catalog.query(f"PRAGMA {name}")[0][0]
        for name in ("journal_mode", "synchronous", "foreign_keys")
    }
    assert values == {"journal_mode": mode, "synchronous": synchronous, "foreign_keys": 1}
    assert registry.catalog.query("PRAGMA busy_timeout")[0][0] >= 10_000
    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
        registry.catalog.connection().execute("INSERT INTO tags (id, name) VALUES ('nothing', 'x')")


def plans(registry: Registry, use: object) -> list[str]:
    """How SQLite answers the queries that a function makes."""
    connection = registry.catalog.connection()
    statements: list[str] = []
    connection.set_trace_callback(statements.append)
    try:
        use()  # type: ignore[operator]
    finally:
        connection.set_trace_callback(None)
    return [
        f"{row[3]} <- {statement}"
        for statement in statements
        if statement.startswith("SELECT")
        for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}")
    ]


def test_no_lookup_reads_a_whole_table(registry: Registry) -> None:
    id = registry["net:v1"].id
    registry.set_alias("net:v1", "x")
    for use in (
        lambda: registry["net"],
        lambda: registry["net:v1"],
        lambda: registry["net@x"],
        lambda: registry[id[:8]],
        lambda: best_version(registry.catalog, "net", "a"),
        lambda: best_version(registry.catalog, "net", "loss", smallest=True),
        lambda: list_versions(registry.catalog, "net", limit=5),
        lambda: registry.catalog.locate([t[3] for t in registry["net"].parameters()]),
        lambda: registry["net"].load(),
    ):
        for plan in plans(registry, use):
            assert not plan.startswith("SCAN") or plan.startswith("SCAN v USING INDEX sqlite_autoindex"), plan
    for plan in plans(registry, lambda: best_version(registry.catalog, "net", "a")):
        assert not ("TEMP B-TREE FOR ORDER BY" in plan and "FROM metrics t" in plan), plan


def test_models_are_listed_from_an_index(registry: Registry) -> None:
    assert [(m.name, m.versions, m.latest.name) for m in list_models(registry.catalog)] == [
        ("net", 3, "net:v3")
    ]
    assert any(
        "USING COVERING INDEX" in plan for plan in plans(registry, lambda: list_models(registry.catalog))
    )


@given(st.text(), st.text())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_comes_back_from_notes_and_facts(registry: Registry, note: str, fact: str) -> None:
    checkpoint = registry.save("text", {}, meta={"fact": fact, "'; DROP TABLE versions; --": note})
    checkpoint = registry.add_note(checkpoint.name, note)
    assert checkpoint.notes[-1][1] == note
    assert checkpoint.meta == {"fact": fact, "'; DROP TABLE versions; --": note}


@pytest.mark.damages
def test_a_newer_schema_is_refused(registry: Registry) -> None:
    registry.catalog.connection().execute("UPDATE state SET value = 99 WHERE key = 'schema'")
    registry.catalog.close()
    with pytest.raises(Unsupported, match=r"has schema 99, this version knows up to 11; upgrade"):
        registry["net"]


def test_tables_of_another_version_are_made_anew(registry: Registry) -> None:
    registry.catalog.connection().execute("UPDATE state SET value = 9 WHERE key = 'schema'")
    registry.catalog.connection().execute("ALTER TABLE runs ADD COLUMN host TEXT")
    registry.catalog.close()
    assert registry["net"].name == "net:v3"
    assert schema.version(registry.catalog.connection()) == schema.VERSION
    assert schema.is_ours(registry.catalog.connection())


HALF = "a\udc80b"


@pytest.mark.parametrize(
    "act",
    [
        lambda registry: registry.add_note("net", HALF),
        lambda registry: registry.save("net", {}, lineage=[{"kind": "pruned-from", "parent": HALF}]),
        lambda registry: registry.best("net", HALF),
        lambda registry: registry.best(HALF, "loss"),
        lambda registry: list_versions(registry.catalog, None, tag=HALF),
        lambda registry: registry.set_tag("net", HALF),
    ],
)
def test_half_a_character_is_refused(registry: Registry, act: Callable[[Registry], object]) -> None:
    with pytest.raises(Invalid, match=r"'a\\udc80b' (is not valid Unicode text|cannot be the name)"):
        act(registry)
    assert registry["net"].name == "net:v3"


def test_half_a_character_inside_a_state_and_its_facts_comes_back(registry: Registry) -> None:
    saved = registry.save("net", {"model": {HALF: HALF}}, meta={HALF: HALF})
    assert saved.load() == {"model": {HALF: HALF}}
    assert saved.meta == {HALF: HALF}


@pytest.mark.parametrize("edge", [{}, {"kind": "x"}, {"kind": "x", "parent": 3}])
def test_a_malformed_edge_is_refused(registry: Registry, edge: dict[str, str]) -> None:
    with pytest.raises(Invalid, match="lineage"):
        registry.save("net", {}, lineage=[edge])


def test_a_catalog_that_stays_locked_is_a_clear_error(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = sqlite3.connect(registry.catalog.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr("registry.catalog.database.BUSY_SECONDS", 0.05)
    registry.catalog.close()
    with pytest.raises(StorageError, match="another process has kept the catalog locked"):
        registry.set_tag("net", "x")
    other.execute("ROLLBACK")
    other.close()
    registry.set_tag("net", "x")


def test_the_status_sums_up(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    shared = torch.randn(1_000)
    for i in range(3):
        registry.save("net", {"model": {"shared": shared, "own": torch.full((10,), float(i))}})
    found = registry.status()
    assert (found.models, found.versions, found.packs, found.tensors) == (1, 3, 3, 4)
    assert found.logical == 3 * 4_040
    packs = sum(path.stat().st_size for path in registry.root.glob("packs/*/*"))
    assert found.stored == packs
    assert found.saved == max(found.logical - packs, 0)
    assert found.unused == 0
    registry.remove(["net:v3"])
    assert registry.status().unused == max(
        path.stat().st_size for path in registry.root.glob("packs/*/*") if path.stat().st_size < 5_000
    )


def test_gc_frees_what_nothing_needs_and_a_trial_changes_nothing(registry: Registry) -> None:
    def listing() -> set[str]:
        return {str(path) for path in registry.root.rglob("*") if path.is_file()}

    registry.store.put({"model": {"orphan": torch.ones(100)}})
    registry.remove(["net:v1"])
    before = listing()
    trial = registry.collect_garbage(grace=0, dry_run=True)
    assert (trial.packs, trial.manifests) == (2, 2)
    assert listing() == before
    told: list[Path] = []
    real = registry.collect_garbage(grace=0, tell=lambda path, size: told.append(path))
    assert (real.packs, real.manifests, real.bytes) == (2, 2, trial.bytes)
    assert {str(path) for path in told} == before - listing()
    later = time.time() + 1e9
    assert collect_garbage(registry.catalog, registry.store, grace=0, now=later).bytes == 0
    assert registry.verify().problems == ()
    assert len(find_versions(registry.catalog, "1 = 1")) == 2


def test_verify_counts_what_it_read(registry: Registry) -> None:
    seen: list[tuple[int, int]] = []
    found = registry.verify(progress=lambda done, total: seen.append((done, total)))
    assert (found.checkpoints, found.packs, found.tensors, found.problems) == (3, 3, 3, ())
    assert seen[-1] == (found.bytes, found.bytes)
    assert registry.verify(["net:v1", "net:v2"]).packs == 2
