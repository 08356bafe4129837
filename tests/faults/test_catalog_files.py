"""The catalog's file and what SQLite keeps beside it: replaced, deleted or without room, while programs use them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import (
    all_versions,
    broken_rules,
    check_whole,
    collect,
    dump,
    fork,
    in_child,
    kill_me,
    save,
    wait,
)
from test_access import NOBODY
from test_disk_trouble import fill, may_mount, small_disk

from registry import Registry
from registry.catalog import catalog, refolding, transactions
from registry.catalog.change import Change
from registry.log.entries import Entry
from registry.log.journal import Journal, Position
from registry.store.errors import Conflict, Corrupt, NotFound, StorageError

FILE = "catalog.sqlite"
WAL = "catalog.sqlite-wal"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "r"


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


def test_a_parent_that_closes_the_catalog_takes_nothing_from_its_children(root: Path) -> None:
    """SQLite deletes the write-ahead log with the last connection. A child's must count as one."""
    registry = Registry(root)
    save(registry, 1)
    is_open, may_go_on = os.pipe(), os.pipe()

    def work() -> None:
        other = Registry(root, create=False)
        other.catalog.query("SELECT 1")
        os.write(is_open[1], b".")
        os.read(may_go_on[0], 1)
        other.add_note("net:v1", "in a child")

    child = fork(work)
    os.read(is_open[0], 1)
    log = (root / WAL).stat().st_ino
    registry.catalog.query("SELECT 1")
    registry.catalog.close()
    left = [path.stat().st_ino for path in root.glob(WAL)]
    reader = sqlite3.connect(root / FILE)
    os.write(may_go_on[1], b".")
    assert wait(child) == 0
    assert left == [log]
    # What the child changed is in the catalog that all others have, not only in the log.
    assert reader.execute("SELECT text FROM notes").fetchall() == [("in a child",)]
    reader.close()


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
    assert set(told) <= texts(registry)
    for _ in range(2):
        with pytest.raises(Conflict):
            registry.remove(["net:v1"])
        assert set(told) <= texts(registry)
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
    monkeypatch.setattr("registry.catalog.database.Database.is_writable", False)
    assert texts(reader) == {"written"}
    reader.catalog.close()
    (root / FILE).chmod(0o644)


def killed_while_merging(root: Path, tmp_path: Path, *, grows: bool) -> tuple[bytes, bytes]:
    """A registry whose last process was killed with its log unmerged, and the catalog's file before and after merging.

    SQLite merges the changed pages in the order of their numbers: what a kill meanwhile leaves is a mixture of the two.

    Args:
        grows: whether the file has more pages afterwards.
    """
    registry = Registry(root)
    for number in range(4):
        save(registry, number)
    registry.set_alias("net:v1", "prod")
    registry.catalog.close()

    def work() -> None:
        registry = Registry(root)
        registry.set_alias("net:v2", "prod")
        registry.set_tag("net:v3", "tagged")
        if grows:
            save(registry, 9)
        kill_me()

    in_child(work)
    before = (root / FILE).read_bytes()
    for name in (FILE, WAL):
        shutil.copy(root / name, tmp_path / name)
    merging = sqlite3.connect(tmp_path / FILE)
    merging.execute("PRAGMA wal_checkpoint(FULL)")
    merging.close()
    return before, (tmp_path / FILE).read_bytes()


@pytest.mark.parametrize(("grows", "rest"), [(False, 0), (True, 0), (False, 32), (False, 0.4), (True, 0.8)])
def test_a_kill_while_sqlite_merges_loses_nothing_where_its_log_is_cut(
    tmp_path: Path, grows: bool, rest: float
) -> None:
    """Whatever the pages that were merged, and whatever is left of the write-ahead log: bytes, or a share of it."""
    root = tmp_path / "r"
    before, after = killed_while_merging(root, tmp_path, grows=grows)
    wal = (root / WAL).read_bytes()
    expected = what_the_log_says(root, tmp_path)
    size = max(len(before), len(after))
    changed = [
        start for start in range(0, size, 4096) if before[start : start + 4096] != after[start : start + 4096]
    ]
    assert len(changed) > 4
    assert changed[0] == 0
    assert (len(after) > len(before)) == grows
    for count in range(len(changed) + 1):
        torn = bytearray(before)
        for start in changed[:count]:
            torn[start : start + 4096] = after[start : start + 4096]
        folder = tmp_path / f"torn{count}"
        shutil.copytree(root, folder)
        (folder / FILE).write_bytes(torn)
        (folder / f"{FILE}-shm").unlink()
        if rest:
            (folder / WAL).write_bytes(wal[: int(rest if rest > 1 else rest * len(wal))])
        else:
            (folder / WAL).unlink()
        registry = Registry(folder)
        assert dump(registry) == expected, count
        assert save(registry, 100) == f"net:v{5 + grows}"
        registry.set_alias("net:v3", "prod")
        registry.catalog.close()
        again = Registry(folder)
        assert again.resolve("net@prod").name == "net:v3"
        assert broken_rules(again) == []
        again.catalog.close()
        shutil.rmtree(folder)


def test_the_catalog_of_another_registry_below_a_write_ahead_log_is_made_anew(tmp_path: Path) -> None:
    for name in ("a", "b"):
        registry = Registry(tmp_path / name)
        for number in range(4):
            save(registry, number)
        registry.set_alias(f"net:v{1 + (name == 'a')}", "prod")
        registry.add_note("net:v1", f"of {name}")
        registry.catalog.close()

    def work() -> None:
        registry = Registry(tmp_path / "a")
        registry.add_note("net:v3", "later")
        kill_me()

    in_child(work)
    expected = what_the_log_says(tmp_path / "a", tmp_path)
    shutil.copy(tmp_path / "b" / FILE, tmp_path / "a" / FILE)
    registry = Registry(tmp_path / "a")
    assert dump(registry) == expected
    registry.catalog.close()


def test_a_catalog_that_is_made_anew_beside_an_open_program_counts(tmp_path: Path) -> None:
    """What lies in the place of its file does not matter as long as all of it is in the write-ahead log."""
    root = tmp_path / "r"
    registry = Registry(root)
    save(registry, 0)
    registry.catalog.close()
    before = (root / FILE).read_bytes()
    for number in range(1, 4):
        save(registry, number)
    registry.catalog.close()
    for _ in range(2):
        (root / FILE).write_bytes(before)
        holder = Registry(root)
        holder.add_note("net:v2", "held")
        holder.rebuild()
        command(root, "note", "net:v3", "while another holds it")
        for _ in range(2):
            assert len(command(root, "list", "net")) == 5
        assert broken_rules(Registry(root)) == []
        holder.catalog.close()


def test_a_copy_of_the_catalog_from_before_it_was_made_anew_does_not_count(tmp_path: Path) -> None:
    """Its write-ahead log then has the changes since, and not what was made anew before it began."""
    root = tmp_path / "r"
    grown(root, 5)
    old = (root / FILE).read_bytes()
    registry = Registry(root)
    registry.set_alias("net01:v1", "later")
    registry.rebuild()
    registry.catalog.close()
    made_in_child(root, removes=1, ends=False)
    expected = what_the_log_says(root, tmp_path)
    (root / FILE).write_bytes(old)
    registry = Registry(root)
    assert dump(registry) == expected
    assert broken_rules(registry) == []
    registry.catalog.close()


def test_a_catalog_that_was_closed_is_not_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After a change, after none, by the last program or not, after it was made anew, copied, or seen by another tool."""
    root = tmp_path / "r"
    grown(root, 5)
    for _ in range(3):
        for change in (lambda r: r.add_note("last:v1", "x"), lambda r: r.rebuild(), lambda r: None):
            registry, other = Registry(root), Registry(root)
            other.catalog.query("SELECT 1")
            change(registry)
            registry.catalog.close()
            other.catalog.close()
            assert not (root / WAL).exists()
            with sqlite3.connect(root / FILE) as tool:
                assert tool.execute("SELECT COUNT(*) FROM versions").fetchone() == (6,)
            tool.close()
            shutil.copytree(root, tmp_path / "copy")
            Registry(tmp_path / "copy").catalog.query("SELECT 1")
            (tmp_path / "copy" / FILE).chmod(0o444)
            reader = Registry(tmp_path / "copy", create=False)
            assert len(all_versions(reader)) == 6
            reader.catalog.close()
            shutil.rmtree(tmp_path / "copy")
    assert "made anew" not in caplog.text


def locks_on(path: Path) -> set[str]:
    """What the system says of the locks on a file, without the numbers that it counts them by."""
    number = f":{path.stat().st_ino} "
    return {line.partition(":")[2] for line in Path("/proc/locks").read_text().splitlines() if number in line}


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="needs a list of the locks that are held")
def test_whatever_a_program_does_sqlite_keeps_its_locks(tmp_path: Path) -> None:
    """Closing any file gives up all locks of a process on it, and others would then remove what it has open."""
    root = tmp_path / "r"
    registry = Registry(root)
    save(registry, 1)
    for step in (
        lambda: Registry(root).catalog.query("SELECT 1"),
        lambda: save(Registry(root), 2),
        lambda: registry.verify(),
        lambda: registry.rebuild(),
        lambda: registry.collect_garbage(grace=0),
        lambda: registry.compact(),
        lambda: Registry(root).catalog.close(),
    ):
        step()
        registry.catalog.query("SELECT 1")
        assert locks_on(root / FILE)
        assert locks_on(root / f"{FILE}-shm")


def command(root: Path, *words: str) -> list[str]:
    """What another program prints."""
    call = [sys.executable, "-m", "registry.cli", "--root", str(root), *words]
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_program_that_stays_open_sees_what_others_do_that_come_and_go(tmp_path: Path) -> None:
    """Each of them opens the catalog and closes it again, as if it were the last to do so."""
    root = tmp_path / "r"
    registry = Registry(root)
    save(registry, 1)

    for number in range(2, 5):
        assert [line.split()[0] for line in command(root, "list", "net")[1:]] == [
            f"net:v{one}" for one in range(number - 1, 0, -1)
        ]
        assert registry.resolve("net").version == number - 1
        command(root, "note", "net:v1", f"note {number}")
        assert len(registry.resolve("net:v1").notes) == number - 1
        assert save(registry, number) == f"net:v{number}"
        assert (root / WAL).exists()
    registry.catalog.close()
    check_whole(root, {f"net:v{number}": number for number in range(1, 5)})


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount a small file system")
def test_a_full_disk_where_the_catalog_must_be_made_anew_can_be_read(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", 3) as folder:

        def work() -> None:
            registry = Registry(folder / "r")
            save(registry, 1)
            registry.catalog.close()
            (folder / "r" / "catalog.sqlite-whole").unlink()
            ballast = fill(folder, 0)
            registry = Registry(folder / "r")
            assert [version.name for version in all_versions(registry)] == ["net:v1"]
            with pytest.raises(StorageError, match="no space left"):
                registry.add_note("net:v1", "x" * 4000)
            ballast.unlink()
            registry.add_note("net:v1", "room")
            assert texts(registry) == {"room"}
            registry.catalog.close()

        assert in_child(work) == 0


def test_a_program_whose_registry_is_renamed_says_so_and_makes_nothing(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "old")
    save(registry, 1)
    (tmp_path / "old").rename(tmp_path / "new")
    steps = (
        lambda: all_versions(registry),
        lambda: save(registry, 2),
        lambda: registry.add_note("net:v1", "x"),
        lambda: registry.rebuild(),
        lambda: registry.collect_garbage(grace=0),
        lambda: registry.compact(),
        lambda: registry.verify(),
    )
    for step in steps:
        with pytest.raises(NotFound, match="renamed or deleted meanwhile; open it by its new name"):
            step()
        assert not (tmp_path / "old").exists()
    check_whole(tmp_path / "new", {"net:v1": 1})


def test_a_reader_notices_another_registry_in_the_place_of_the_one_that_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its catalog is in memory, as of a folder that it cannot write, and the two logs have one size."""
    for name, number in ("r", 1), ("other", 2):
        registry = Registry(tmp_path / name)
        registry.save("net", {"model": {"w": torch.full((3,), float(number))}})
        registry.catalog.close()
        (tmp_path / name / "catalog.sqlite-whole").unlink()
    logs = [(tmp_path / name / "journal" / f"{1:016}.log").stat().st_size for name in ("r", "other")]
    monkeypatch.setattr("registry.catalog.database.Database.is_writable", False)
    reader = Registry(tmp_path / "r", create=False)
    assert reader["net"].load()["model"]["w"][0] == 1
    shutil.rmtree(tmp_path / "r")
    (tmp_path / "other").rename(tmp_path / "r")
    assert logs[0] == logs[1]
    assert reader["net"].load()["model"]["w"][0] == 2
    reader.catalog.close()


@pytest.mark.damages
def test_gc_keeps_what_an_entry_without_effect_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a program without a check like ours changed a catalog that is a mixture: what it saved is void."""
    root = tmp_path / "r"
    _, after = killed_while_merging(root, tmp_path, grows=True)
    with (root / FILE).open("r+b") as file:
        file.seek(4096)
        file.write(after[4096:8192])
    for name in (WAL, "catalog.sqlite-shm"):
        (root / name).unlink()

    monkeypatch.setattr("registry.catalog.pairing.is_paired", lambda *_, **__: True)
    later = Registry(root)
    save(later, 100)
    later.catalog.close()
    monkeypatch.undo()
    again = Registry(root)
    again.rebuild()
    assert len(all_versions(again)) == 5
    for _ in range(2):
        again.collect_garbage(grace=0)
    again.rebuild(adopt=True)
    found = all_versions(again)
    assert sorted(one.epoch for one in found) == [0, 1, 2, 3, 9, 100]
    for one in found:
        again[one.name].load(verify=True)


def test_what_the_log_takes_and_the_catalog_cannot_is_shown_whole(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A removal takes aliases, tags and notes with it; an alias that is free again is shown where it points now."""
    registry = Registry(root)
    for number in range(3):
        save(registry, number)
    registry.set_alias("net:v2", "prod")
    registry.set_tag("net:v2", "good")
    registry.add_note("net:v2", "a note")
    registry.catalog.close()

    append, set_head, taken = Journal.append, Change.set_head, []

    def noted(journal: Journal, entry: Entry, end: Position) -> Position:
        taken.append(entry)
        return append(journal, entry, end)

    def refused(change: Change, last: Entry, end: Position) -> None:
        if taken and taken.pop() == last:
            raise sqlite3.OperationalError("database or disk is full")
        set_head(change, last, end)

    # As where the last bytes of a disk are enough for a line of the log, and not for a page of the catalog.
    monkeypatch.setattr(Journal, "append", noted)
    monkeypatch.setattr(Change, "set_head", refused)
    monkeypatch.setattr(transactions, "finish_interrupted", lambda *_: False)
    here = Registry(root)
    here.remove(["net:v2"], force=True)
    here.set_alias("net:v3", "prod")
    here.set_tag("net:v3", "good")
    for registry in (here, Registry(root)):
        assert registry["net@prod"].name == "net:v3"
        assert [row.name for row in registry.versions(tag="good")] == ["net:v3"]
        assert registry.verify().problems == ()
    # Or nothing of this was tried.
    assert int(here.catalog.query("SELECT value FROM state WHERE key = 'seq'")[0][0]) == 10
    with contextlib.closing(sqlite3.connect(root / FILE)) as connection:
        assert connection.execute("SELECT value FROM state WHERE key = 'seq'").fetchone() == ("7",)
    monkeypatch.undo()
    registry = Registry(root)
    assert registry["net@prod"].name == "net:v3"
    assert broken_rules(registry) == []


def test_the_note_of_a_whole_catalog_is_a_hint_alone(root: Path) -> None:
    registry = Registry(root)
    save(registry, 1)
    registry.catalog.close()
    note = root / f"{FILE}-whole"
    assert note.exists()
    note.chmod(0)

    def look() -> None:
        if os.geteuid() == 0:
            for path in (root, *root.rglob("*")):
                if path != note:
                    os.chown(path, NOBODY, NOBODY)
            for folder in root.parents:
                if "pytest" in str(folder) and folder.stat().st_uid == 0:
                    folder.chmod(0o755)
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        registry = Registry(root)
        assert len(all_versions(registry)) == 1
        save(registry, 2)
        assert registry.verify().problems == ()

    assert in_child(look) == 0


def test_whoever_may_use_the_catalog_may_read_the_note_beside_it(root: Path) -> None:
    registry = Registry(root)
    save(registry, 1)
    registry.catalog.close()
    (root / FILE).chmod(0o664)

    def close_last() -> None:
        os.umask(0o077)
        registry = Registry(root)
        save(registry, 2)
        registry.catalog.close()

    (root / f"{FILE}-whole").unlink(missing_ok=True)
    assert in_child(close_last) == 0
    assert stat.S_IMODE((root / f"{FILE}-whole").stat().st_mode) == 0o664


def damaged_in_both(root: Path) -> None:
    """Damage an alias's entry in the log, and the catalog's tables elsewhere; its copy of the log stays whole."""
    registry = Registry(root)
    for number in range(3):
        save(registry, number)
    registry.set_alias("net:v2", "prod")
    registry.add_note("net:v2", "behind it")
    registry.catalog.close()
    (segment,) = (root / "journal").glob("*.log")
    segment.write_bytes(segment.read_bytes().replace(b'"prod"', b'"prQd"'))
    connection = sqlite3.connect(root / FILE)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    ((size,),) = connection.execute("PRAGMA page_size").fetchall()
    ((page,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'metrics'").fetchall()
    connection.close()
    with (root / FILE).open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)


@pytest.mark.damages
def test_a_rebuild_that_was_killed_behind_setting_the_catalog_aside_loses_no_copy(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged_in_both(root)

    def killed() -> None:
        monkeypatch.setattr(refolding, "_touch", lambda database: kill_me())
        Registry(root).rebuild()

    assert in_child(killed) == -signal.SIGKILL
    assert list(root.glob(f"{FILE}.damaged-*"))
    registry = Registry(root)
    assert registry["net@prod"].name == "net:v2"
    assert registry.rebuild().damaged == ()
    assert registry.verify().problems == ()


@pytest.mark.damages
@pytest.mark.parametrize("is_sound", [True, False])
def test_a_catalog_with_another_history_is_refused_as_long_as_it_lies_there(
    tmp_path: Path, is_sound: bool
) -> None:
    """One with a damaged page would be set aside, and what only it names deleted by the next gc."""
    registry, root = Registry(tmp_path / "r"), tmp_path / "r"
    for number in range(3):
        save(registry, number)
    (segment,) = root.glob("journal/*.log")
    old = segment.read_bytes()
    for number in range(3, 6):
        save(registry, number)
    registry.catalog.close()
    kept = {path: path.read_bytes() for path in root.glob("catalog.sqlite*")}
    for path in kept:
        path.unlink()
    segment.write_bytes(old)
    registry = Registry(root)
    save(registry, 7)
    registry.catalog.close()
    for path in root.glob("catalog.sqlite*"):
        path.unlink()
    for path, data in kept.items():
        path.write_bytes(data)
    if not is_sound:
        with contextlib.closing(sqlite3.connect(root / "catalog.sqlite")) as connection:
            ((page,),) = connection.execute(
                "SELECT rootpage FROM sqlite_master WHERE name = 'versions'"
            ).fetchall()
            ((size,),) = connection.execute("PRAGMA page_size").fetchall()
        with (root / "catalog.sqlite").open("r+b") as file:
            file.seek((page - 1) * size)
            file.write(b"\xff" * 64)
    for _ in range(2):
        for command in (
            lambda one: one.names(),
            lambda one: one.rebuild(),
            lambda one: collect(one, grace=0),
        ):
            with pytest.raises(Corrupt, match="tell different histories"):
                command(Registry(root))
    assert len(list(root.glob("manifests/*/*.json"))) == 7
