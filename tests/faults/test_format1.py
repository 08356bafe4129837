"""Registries of format 1: read as they are, and taken to the present format, wholly or not at all."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Stepwise, all_versions, broken_rules, collect, copy, files, in_child, kill_me

from registry import Registry
from registry.log import settings
from registry.store import durable
from registry.store.digest import digest
from registry.store.errors import Corrupt, RegistryError

NAMES = {"mine:v1", "near:v1", "near:v2", "near:v3", "net:v1", "net:v2", "net:v4"}


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry that version 0.1 wrote: removed and thinned versions, differences, names, a run and an artifact."""
    folder = tmp_path_factory.mktemp("format1")
    with tarfile.open(Path(__file__).with_name("format1.tar.xz")) as archive:
        archive.extractall(folder, filter="data")
    return folder / "r"


@pytest.fixture
def root(golden: Path, tmp_path: Path) -> Path:
    return copy(golden, tmp_path / "r")


def check(registry: Registry) -> None:
    """Everything that the registry of version 0.1 held."""
    versions = {version.name: version for version in all_versions(registry)}
    assert set(versions) == NAMES
    for number in (1, 2, 4):
        tree = registry[f"net:v{number}"].load()
        assert torch.equal(tree["model"]["shared"], torch.arange(2000.0))
        assert torch.equal(tree["model"]["own"], torch.full((50, 30), float(number)))
        assert tree["extra"] == {"steps": [number]}
        assert ("optimizer" in tree) == (number != 1)
        assert registry[f"net:v{number}"].metrics == {"number": float(number)}
        assert registry[f"net:v{number}"].config == {"lr": 0.1}
    for number in (1, 2, 3):
        near = registry[f"near:v{number}"].load()["model"]["w"]
        assert torch.equal(near, torch.arange(20000.0) + [0.0, 0.001, 0.002][number - 1])
    assert versions["net:v2"].aliases == ("good",)
    assert versions["net:v4"].aliases == ("moved",)
    assert versions["net:v2"].tags == ("paper",)
    assert [text for _, text in versions["net:v2"].notes] == ["checked by hand"]
    assert [text for _, text in versions["net:v4"].notes] == ["nöte"]
    assert [(run.name, run.state) for run in registry.runs.find()] == [("mine/run-1", "finished")]
    (artifact,) = registry.artifacts.find()
    assert torch.equal(registry.artifacts.load(artifact.id), torch.arange(7.0))
    assert registry.verify().problems == ()


def test_it_is_read_as_it_is(root: Path) -> None:
    before = files(root)
    registry = Registry(root, create=False)
    check(registry)
    assert registry.status().versions == 7
    assert registry.collect_garbage(dry_run=True, grace=0).packs == 0
    registry.catalog.close()
    assert files(root) == before
    assert settings.read_format(root) == 1


def test_the_first_change_takes_it_to_the_present_format(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(root, create=False)
    check(registry)
    differences = registry.status().differences
    assert differences > 0
    registry.set_alias("net:v1", "first")
    assert settings.read_format(root) == 2
    registry.remove_alias("net", "first")
    registry.catalog.close()
    check(registry)
    assert "made anew" not in caplog.text
    assert registry.status().differences == differences
    assert broken_rules(registry) == []
    assert registry.save("net", {"model": {"w": torch.ones(2)}}).name == "net:v6"
    registry.remove(["net:v6"])
    assert (root / "catalog.sqlite.format1").exists()
    collect(registry, grace=3_600)
    assert (root / "manifests" / "journal.jsonl").exists()
    collect(registry, grace=3_600, now=time.time() + 4_000)
    assert not (root / "manifests" / "journal.jsonl").exists()
    assert not (root / "catalog.sqlite.format1").exists()
    check(registry)
    registry.rebuild()
    check(registry)
    registry.catalog.close()


def test_another_process_that_reads_it_goes_on(root: Path) -> None:
    reader = Registry(root, create=False)
    check(reader)
    Registry(root, create=False).set_tag("net:v4", "new")
    assert reader["net:v4"].tags == ("new",)
    reader.remove_tag("net:v4", "new")
    check(reader)


def test_killed_at_any_step_it_has_one_format_or_the_other(golden: Path, tmp_path: Path) -> None:
    formats = set()
    for step in range(1_000):
        for moment in ("before", "half"):
            root = copy(golden, tmp_path / "r")

            def at(count: int, when: str, path: Path, step: int = step, moment: str = moment) -> None:
                if (count, when) == (step, moment):
                    kill_me()

            def run(at: Any = at, root: Path = root) -> None:
                durable.disk = Stepwise(at)
                Registry(root, create=False).catalog.migrate()

            status = in_child(run)
            if status == 0:
                break
            assert status == -signal.SIGKILL
            formats.add(settings.read_format(root))
            check(Registry(root, create=False))
            registry = Registry(root, create=False)
            registry.set_tag("net:v1", "x")
            registry.remove_tag("net:v1", "x")
            check(registry)
            assert broken_rules(registry) == []
            registry.catalog.close()
        if (status, moment) == (0, "before"):
            break
    assert 5 < step < 999
    assert formats == {1, 2}


def test_a_program_that_knows_only_format_1_refuses_the_catalog_that_it_has_open(root: Path) -> None:
    with contextlib.closing(sqlite3.connect(root / "catalog.sqlite", isolation_level=None)) as old:
        assert old.execute("SELECT value FROM state WHERE key = 'schema'").fetchone() == (3,)
        Registry(root, create=False).set_tag("net:v1", "x")
        assert old.execute("SELECT value FROM state WHERE key = 'schema'").fetchone() == ("11",)


def line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return text + b"\t" + digest(text)[:16].encode() + b"\n"


def test_a_change_that_the_catalog_has_not_applied_is_taken_along(root: Path) -> None:
    registry = Registry(root, create=False)
    version_id = registry["net:v1"].id
    with (root / "manifests" / "journal.jsonl").open("ab") as file:
        file.write(line({"op": "alias", "model": "net", "alias": "late", "id": version_id}))
        file.write(line({"op": "alias", "model": "net", "alias": "torn", "id": version_id})[:-5])
    assert Registry(root, create=False)["net:v1"].aliases == ("late",)
    registry = Registry(root, create=False)
    registry.remove_alias("net", "late")
    check(registry)


def test_where_journal_and_catalog_differ_nothing_is_changed_until_a_rebuild_chooses(root: Path) -> None:
    with contextlib.closing(sqlite3.connect(root / "catalog.sqlite")) as connection:
        connection.execute("DELETE FROM aliases WHERE name = 'good'")
        connection.commit()
    before = files(root)
    registry = Registry(root, create=False)
    with pytest.raises(Corrupt, match="differ in their aliases; nothing was changed, registry rebuild"):
        registry.set_tag("net:v1", "x")
    changed = {path: data for path, data in files(root).items() if not path.startswith("journal/")}
    assert changed == before
    assert [problem.message for problem in registry.verify().problems] != []
    registry.rebuild()
    check(registry)


@pytest.mark.parametrize("lost", ["catalog", "journal", "a line"])
def test_what_one_of_the_two_has_lost_comes_from_the_other(root: Path, lost: str) -> None:
    journal = root / "manifests" / "journal.jsonl"
    if lost == "catalog":
        (root / "catalog.sqlite").unlink()
    elif lost == "journal":
        journal.unlink()
    else:
        journal.write_bytes(journal.read_bytes().replace(b'"paper"', b'"pbper"'))
    registry = Registry(root, create=False)
    check(registry)
    registry.set_tag("net:v4", "x")
    registry.remove_tag("net:v4", "x")
    check(registry)


def test_a_damaged_line_without_a_catalog_is_named(root: Path) -> None:
    journal = root / "manifests" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"paper"', b'"pbper"'))
    (root / "catalog.sqlite").unlink()
    registry = Registry(root, create=False)
    with pytest.raises(Corrupt, match=r"the line at byte \d+ is damaged"):
        registry.set_tag("net:v4", "x")
    found = registry.rebuild()
    assert any("is damaged" in text for text in found.damaged)
    assert registry["net:v2"].tags == ()


def test_a_folder_that_cannot_be_written_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and real(path, mode))
    registry = Registry(root, create=False)
    check(registry)
    with pytest.raises(RegistryError, match="cannot be written"):
        registry.set_tag("net:v4", "x")
    assert settings.read_format(root) == 1
