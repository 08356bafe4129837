"""The catalog's file and what SQLite keeps beside it: replaced, deleted or without room, while programs use them."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
from support import all_versions, broken_rules, check_whole, dump, fork, in_child, kill_me, save, wait
from test_disk_trouble import fill, may_mount, small_disk

from registry import Registry
from registry.catalog import catalog
from registry.store.errors import StorageError

FILE = "catalog.sqlite"
WAL = "catalog.sqlite-wal"


def made_in_child(root: Path, *, removes: int, ends: bool) -> None:
    """Let a process remove versions from the first on and write a note; it ends, or is killed with its log unmerged."""

    def work() -> None:
        registry = Registry(root)
        for number in range(removes):
            there = sorted(one.name for one in all_versions(registry) if one.name.startswith("net"))
            registry.remove(there[:1])
            registry.add_note("last:v1", f"removed {number}")
        if not ends:
            kill_me()
        registry.catalog.close()

    status = in_child(work)
    assert (status == 0) == ends


def grown(root: Path, count: int = 40) -> None:
    """A catalog of many pages, none of which is in a write-ahead log."""
    registry = Registry(root)
    for number in range(count):
        save(registry, number, f"net{number:02d}")
    save(registry, count, "last")
    registry.catalog.close()
    assert not (root / WAL).exists()


def what_the_log_says(root: Path, tmp_path: Path) -> dict[str, list[str]]:
    shutil.copytree(root, tmp_path / "fold")
    for path in (tmp_path / "fold").glob(f"{FILE}*"):
        path.unlink()
    registry = Registry(tmp_path / "fold", create=False)
    found = dump(registry)
    registry.catalog.close()
    return found


@pytest.mark.parametrize("which", ["older", "newer"])
def test_a_catalog_beside_a_log_of_another_age_is_made_anew(tmp_path: Path, which: str) -> None:
    """As where a backup of the catalog's file alone was put back after a crash."""
    root = tmp_path / "r"
    grown(root)
    old = (root / FILE).read_bytes()
    if which == "older":
        made_in_child(root, removes=3, ends=True)
        made_in_child(root, removes=1, ends=False)
        assert (root / WAL).stat().st_size
        (root / FILE).write_bytes(old)
    else:
        made_in_child(root, removes=1, ends=False)
        wal = (root / WAL).read_bytes()
        made_in_child(root, removes=3, ends=True)
        (root / WAL).write_bytes(wal)
    expected = what_the_log_says(root, tmp_path)
    registry = Registry(root, create=False)
    assert dump(registry) == expected
    assert broken_rules(registry) == []
    name = save(registry, 77, "net00")
    assert name in {version.name for version in all_versions(registry)}
    assert broken_rules(registry) == []
    registry.catalog.close()


def test_a_crash_does_not_make_a_large_catalog_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the write-ahead log has been through: begun, begun again, partly merged, of one change or many."""
    root = tmp_path / "r"
    grown(root, 5)
    for removes, ends in ((0, False), (1, False), (1, True), (2, False), (1, False)):
        for number in range(removes):
            registry = Registry(root)
            save(registry, number, f"more{number}")
            registry.set_alias("last:v1", f"a{number}")
        made_in_child(root, removes=removes, ends=ends)
        registry = Registry(root)
        registry.catalog.query("SELECT 1")
        for mode in ("PASSIVE", "RESTART"):
            registry.catalog.connection().execute(f"PRAGMA wal_checkpoint({mode})")
            registry.add_note("last:v1", mode)
            assert in_child(lambda: Registry(root).catalog.query("SELECT 1")) == 0
        pid = fork(lambda: (Registry(root).add_note("last:v1", "in a child"), kill_me()))
        assert wait(pid) != 0
        assert broken_rules(Registry(root)) == []
    assert "made anew" not in caplog.text


def test_a_write_ahead_log_that_was_deleted_under_an_open_program_stops_nobody(tmp_path: Path) -> None:
    root = tmp_path / "r"
    registry = Registry(root)
    save(registry, 1)
    (root / WAL).unlink()

    def another() -> None:
        other = Registry(root, create=False)
        assert [version.name for version in all_versions(other)] == ["net:v1"]
        assert save(other, 2) == "net:v2"
        other.rebuild()

    assert in_child(another) == 0
    assert save(registry, 3) == "net:v3"
    registry.catalog.close()
    check_whole(root, {"net:v1": 1, "net:v2": 2, "net:v3": 3})


def texts(registry: Registry) -> set[str]:
    return {text for _, text in registry["net:v1"].notes}


def notes_without_room(folder: Path) -> None:
    registry = Registry(folder / "r")
    save(registry, 1)
    save(registry, 2)
    reader = Registry(folder / "r")
    assert len(all_versions(reader)) == 2
    ballast = fill(folder, 0)
    told = []
    catalog._LOOK_AGAIN = float("inf")
    try:
        for number in range(200):
            registry.add_note("net:v1", f"note {number}")
            told.append(f"note {number}")
            assert told[-1] in texts(registry)
            registry.set_alias("net:v1", f"alias{number}")
    except StorageError as error:
        assert "no space left" in str(error)
    assert len(told) > 1
    here = texts(registry)
    assert set(told) <= here
    assert texts(reader) == set()
    catalog._LOOK_AGAIN = 0.0
    assert set(told) <= texts(reader)

    def elsewhere() -> None:
        other = Registry(folder / "r", create=False)
        assert set(told) <= texts(other)
        with pytest.raises(StorageError, match="no space left"):
            other.save("net", {"model": {"w": torch.rand(200_000)}})

    assert in_child(elsewhere) == 0
    assert len(dump(registry)["notes"]) >= len(told)
    ballast.unlink()
    assert save(registry, 3) == "net:v3"
    assert set(told) <= texts(Registry(folder / "r"))
    assert len(reader.catalog.query("SELECT 1 FROM versions")) == 3
    registry.catalog.close()
    reader.catalog.close()
    check_whole(folder / "r", {"net:v1": 1, "net:v2": 2, "net:v3": 3})


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount a small file system")
def test_what_was_recorded_on_a_full_disk_is_seen_before_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", 3) as folder:
        assert in_child(lambda: notes_without_room(folder)) == 0


def test_a_reader_that_stays_open_sees_what_the_catalog_cannot_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.catalog.catalog._LOOK_AGAIN", 0.0)
    root = tmp_path / "r"
    registry = Registry(root)
    save(registry, 1)
    registry.catalog.close()
    behind = (root / FILE).read_bytes()
    registry.add_note("net:v1", "written")
    registry.catalog.close()
    (root / FILE).write_bytes(behind)
    (root / FILE).chmod(0o444)
    (root / WAL).unlink(missing_ok=True)
    reader = Registry(root)
    monkeypatch.setattr(type(reader.catalog), "is_writable", False)
    assert texts(reader) == {"written"}
    reader.catalog.close()
    (root / FILE).chmod(0o644)


@pytest.mark.damages
def test_gc_keeps_what_an_entry_without_effect_names(tmp_path: Path) -> None:
    """As where SQLite was killed while it merged its log, and that log was deleted: the next save may be void."""
    root = tmp_path / "r"
    registry = Registry(root)
    for number in range(4):
        save(registry, number)
    registry.catalog.close()

    def work() -> None:
        save(Registry(root), 9)
        kill_me()

    in_child(work)
    for name in (FILE, WAL):
        shutil.copy(root / name, tmp_path / name)
    merging = sqlite3.connect(tmp_path / FILE)
    merging.execute("PRAGMA wal_checkpoint(FULL)")
    merging.close()
    first_pages = (tmp_path / FILE).read_bytes()[: 2 * 4096]
    with (root / FILE).open("r+b") as file:
        file.write(first_pages)
    for name in (WAL, "catalog.sqlite-shm"):
        (root / name).unlink()

    later = Registry(root)
    save(later, 100)
    later.catalog.close()
    again = Registry(root)
    again.rebuild()
    for _ in range(2):
        again.collect_garbage(grace=0)
    again.rebuild(adopt=True)
    found = all_versions(again)
    assert sorted(one.epoch for one in found) == [0, 1, 2, 3, 9, 100]
    for one in found:
        again[one.name].load(verify=True)
